"""The directory in Redis or Valkey: one for any number of nodes and routers. `redis_scripts.py` says how it lies there.

Redis may go away, hang, or come back empty or with yesterday's content: nodes notice by the number of their last update
and say everything again.
"""

from __future__ import annotations

import re
import time
from collections.abc import Sequence
from itertools import islice
from typing import cast

import msgspec
import redis
from redis.backoff import NoBackoff
from redis.retry import Retry

from tandem.common.errors import ConfigError
from tandem.common.redis_url import without_password
from tandem.kvstore.directory import redis_scripts as scripts
from tandem.kvstore.directory.messages import (
    FORGET_S,
    NODE_TTL_S,
    UNREACHABLE,
    Dump,
    NodeState,
    Page,
    Reply,
    Update,
    Verdict,
)
from tandem.kvstore.directory.remote import CALL_TIMEOUT_S, LOOKUP_TIMEOUT_S, DirectoryFault, RemoteDirectory
from tandem.kvstore.interfaces import DirectoryEvent, EventBatch, Location, NodeInfo, ObjectKey, TierName

STREAM_UPDATES = 2_000
"""Kept for watchers: 45 MB if every one is full, as a rule far less."""
_PAGE_UPDATES = 64
_SWEEP_KEYS = 200
_SWEEP_EMPTY = 50
_SWEEPS_PER_ROUND = 50
_MAX_DUMP = 4_000_000
"""Entries of a node that are read: as many as a table of a directory holds."""
_MAX_SEQ = 10**11
_SEQ = re.compile(rb"\d{1,11}")
_SIZE = re.compile(rb"[1-9]\d{0,14}")
_MAX_PARSED = 4_096
"""Locations kept ready: as a rule there are a few per node, of one size each."""
_TTL_MS = int(NODE_TTL_S * 1000)
_PREFIX = scripts.PREFIX

_LETTERS = {
    TierName.DEVICE: b"v",
    TierName.HOST: b"h",
    TierName.DISK: b"d",
    TierName.PEER: b"p",
    TierName.REMOTE: b"r",
}
_TIERS = {letter: name for name, letter in _LETTERS.items()}
_VERDICTS = {verdict.value.encode(): verdict for verdict in Verdict}
_FAULTS = (redis.RedisError, OSError, ValueError, KeyError, IndexError, TypeError, msgspec.MsgspecError)
"""Exceptions that a broken connection raises, or an answer that is not in our format."""


class RedisDirectory(RemoteDirectory):
    """A `RemoteDirectory` whose state is in Redis or Valkey. For any thread; faults of Redis are answers here, never
    exceptions."""

    def __init__(self, url: str) -> None:
        """Raises ConfigError for a malformed URL; Redis itself need not be there yet."""
        super().__init__(without_password(url))
        try:
            self._fast = _connect(url, LOOKUP_TIMEOUT_S)
            self._slow = _connect(url, CALL_TIMEOUT_S)
        except ValueError as error:
            raise ConfigError(f"kv_directory {without_password(url)}: {error}; use redis://HOST:PORT/DB") from error
        self._lookup_script = self._fast.register_script(scripts.LOOKUP)
        self._announce_script = self._slow.register_script(scripts.ANNOUNCE)
        self._apply_script = self._slow.register_script(scripts.APPLY)
        self._bury_script = self._slow.register_script(scripts.BURY)
        self._states_script = self._slow.register_script(scripts.STATES)
        self._sweep_script = self._slow.register_script(scripts.SWEEP)
        self._bury_at = 0.0
        self._parsed: dict[tuple[bytes, bytes], Location] = {}
        self._start()

    # Uplink

    def announce(self, node: NodeInfo, seq: int) -> Reply:
        """Tells that a node lives; the reply says what has to be said again, or that Redis is away."""
        try:
            info = msgspec.msgpack.encode(node)
            args = (node.node_id, _epoch(node.epoch), seq, info, _TTL_MS)
            return _reply(self._announce_script([_PREFIX], args))
        except _FAULTS:
            return UNREACHABLE

    def apply(self, update: Update) -> Reply:
        """Writes one batch of changes; the reply as that of `announce`."""
        batch = update.batch
        try:
            who = (batch.node_id, _epoch(batch.epoch), batch.seq)
            args = (*who, int(update.reset), _pack(batch.events), _TTL_MS, STREAM_UPDATES)
            return _reply(self._apply_script([_PREFIX], args))
        except _FAULTS:
            return UNREACHABLE

    def withdraw(self, node_id: str, epoch: int) -> None:
        """Takes a node out, with all its entries; without Redis they lapse in a few seconds."""
        try:
            self._bury_script([_PREFIX], [node_id, _epoch(epoch), ""])
        except _FAULTS:
            return  # its entries lapse in a few seconds

    # Feed

    def states(self) -> dict[str, NodeState] | None:
        """Live nodes as Redis has them; None: it is away."""
        try:
            return {it.state.info.node_id: it.state for it in self._members() if it.alive}
        except DirectoryFault:
            return None

    def read(self, cursor: str) -> Page | None:
        """A page of updates after `cursor`; empty: from the last one on. None: Redis is away."""
        stream = f"{_PREFIX}:stream"
        try:
            if not cursor:
                last = cast("list[tuple[bytes, object]]", self._slow.xrevrange(stream, count=1))
                return Page((), last[0][0].decode() if last else "0-0")
            raw = self._slow.xrange(stream, min=f"({cursor}", count=_PAGE_UPDATES)
            entries = cast("list[tuple[bytes, dict[bytes, bytes]]]", raw)
            if not entries:
                return Page((), self._cursor_after_nothing(cursor))
            updates = [update for _, fields in entries if (update := _update(fields)) is not None]
            return Page(tuple(updates), entries[-1][0].decode())
        except _FAULTS:
            return None

    def dump(self, node_id: str) -> Dump | None:
        """All that one node holds. None: it does not live, or Redis is away."""
        try:
            member = next((it for it in self._members() if it.alive and it.state.info.node_id == node_id), None)
            if member is None:
                return None
            held = f"{_PREFIX}:held:".encode() + member.incarnation
            fields = islice(self._slow.hscan_iter(held, count=1_000), _MAX_DUMP)
            events = [event for field, size in fields if (event := _event(field[:-1], field[-1:], size)) is not None]
            return Dump(member.state.info.epoch, member.state.seq, events)
        except (DirectoryFault, *_FAULTS):
            return None

    # RemoteDirectory

    def _find(self, keys: Sequence[ObjectKey]) -> list[tuple[Location, ...]]:
        try:
            found = cast("list[list[bytes]]", self._lookup_script([_PREFIX, *keys]))
            if len(found) != len(keys):
                raise DirectoryFault(f"{len(found)} answers to {len(keys)} keys")
            return [
                tuple([it for i in range(0, len(row), 2) if (it := self._location(row[i], row[i + 1])) is not None])
                for row in found
            ]
        except _FAULTS as error:
            raise DirectoryFault(str(error)) from error

    def _location(self, field: bytes, size: bytes) -> Location | None:
        """None for an entry that is none of ours."""
        location = self._parsed.get((field, size))
        if location is None:
            epoch_end = 1 + scripts.EPOCH_DIGITS
            tier = _TIERS.get(field[:1])
            try:
                node_id, epoch = field[epoch_end + scripts.GENERATION_DIGITS :].decode(), int(field[1:epoch_end])
            except ValueError:
                return None
            if tier is None or not _SIZE.fullmatch(size):
                return None
            if len(self._parsed) >= _MAX_PARSED:
                self._parsed.clear()
            location = self._parsed[field, size] = Location(node_id, epoch, tier, int(size))
        return location

    def _tend(self) -> None:
        """Buries the long dead and sweeps what is void: any client may, and all at once do no harm."""
        now = time.monotonic()
        try:
            if now >= self._bury_at:
                self._bury_at = now + FORGET_S / 4
                self._bury(FORGET_S)
            for _ in range(_SWEEPS_PER_ROUND):
                if not self._sweep_script([_PREFIX], [_SWEEP_KEYS, _SWEEP_EMPTY]) or self._closing.is_set():
                    return
        except _FAULTS as error:
            raise DirectoryFault(str(error)) from error

    def _bury(self, silent_s: float) -> None:
        for node, epoch, *_, ago, alive in self._rows():
            if alive != 1 and float(cast(bytes, ago)) > silent_s:
                self._bury_script([_PREFIX], [node, epoch, silent_s])

    def _disconnect(self) -> None:
        self._fast.close()
        self._slow.close()

    # Inside

    def _members(self) -> list[_Member]:
        return [member for row in self._rows() if (member := _Member.parse(row)) is not None]

    def _rows(self) -> list[list[bytes | int]]:
        try:
            found = self._states_script([_PREFIX])
        except _FAULTS as error:
            raise DirectoryFault(str(error)) from error
        if not isinstance(found, list):
            raise DirectoryFault("there are more members than nodes can be; they are made anew")
        return found

    def _cursor_after_nothing(self, cursor: str) -> str:
        """A stream that ends before the cursor is a new one: Redis came back without it."""
        last = cast("list[tuple[bytes, object]]", self._slow.xrevrange(f"{_PREFIX}:stream", count=1))
        end = last[0][0].decode() if last else "0-0"
        return cursor if _place(end) >= _place(cursor) else "0-0"


class _Member(msgspec.Struct, frozen=True):
    state: NodeState
    incarnation: bytes
    alive: bool

    @classmethod
    def parse(cls, row: Sequence[bytes | int]) -> _Member | None:
        """None for a row that is none of ours: of that node nothing is known."""
        node, epoch, generation, seq, info, _, alive = row
        try:
            told = msgspec.msgpack.decode(cast(bytes, info), type=NodeInfo)
            if (
                told.node_id.encode() != node
                or _epoch(told.epoch).encode() != epoch
                or not _SEQ.fullmatch(cast(bytes, seq))
            ):
                return None
        except (msgspec.MsgspecError, UnicodeError, TypeError):
            return None
        return cls(NodeState(told, int(seq)), epoch + cast(bytes, generation) + node, alive == 1)


def _connect(url: str, timeout_s: float) -> redis.Redis:
    pool = redis.BlockingConnectionPool.from_url(
        url,
        max_connections=8,
        timeout=timeout_s,
        socket_timeout=timeout_s,
        socket_connect_timeout=timeout_s,
        # Once, at once, and only where a connection had been closed since its last use: after a restart of Redis.
        retry=Retry(NoBackoff(), 1, supported_errors=(redis.ConnectionError,)),
        decode_responses=False,
    )
    return redis.Redis(connection_pool=pool)


def _epoch(epoch: int) -> str:
    return f"{epoch:0{scripts.EPOCH_DIGITS}d}"


def _reply(raw: object) -> Reply:
    verdict, seq = cast("tuple[bytes, int]", raw)
    return Reply(_VERDICTS[verdict], int(seq))


def _pack(events: Sequence[DirectoryEvent]) -> bytes:
    out = bytearray()
    for event in events:
        out.append(len(event.key))
        out += event.key + _LETTERS[event.tier] + b"%015d" % event.size
    return bytes(out)


def _unpack(packed: bytes) -> tuple[DirectoryEvent, ...]:
    events = []
    at = 0
    while at < len(packed):
        end = at + 1 + packed[at]
        size = int(packed[end + 1 : end + 1 + scripts.SIZE_DIGITS])
        events.append(DirectoryEvent(ObjectKey(packed[at + 1 : end]), _TIERS[packed[end : end + 1]], size))
        at = end + 1 + scripts.SIZE_DIGITS
    return tuple(events)


def _update(fields: dict[bytes, bytes]) -> Update | None:
    """None for an entry of the stream that is none of ours."""
    try:
        epoch, seq = int(fields[b"epoch"]), int(fields[b"seq"])
        batch = EventBatch(fields[b"node"].decode(), epoch, seq, _unpack(fields[b"events"]))
        return Update(batch, fields[b"reset"] == b"1") if 0 <= epoch < 1 << 64 and 0 <= seq < _MAX_SEQ else None
    except (KeyError, ValueError, IndexError):
        return None


def _event(key: bytes, letter: bytes, size: bytes) -> DirectoryEvent | None:
    tier = _TIERS.get(letter)
    if tier is None or not key or len(key) > 255 or not _SIZE.fullmatch(size):
        return None
    return DirectoryEvent(ObjectKey(key), tier, int(size))


def _place(cursor: str) -> tuple[int, int]:
    milliseconds, _, number = cursor.partition("-")
    return int(milliseconds), int(number or 0)
