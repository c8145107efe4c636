"""`interfaces.HomeNode` over the unix socket of the host's store node. Bulk bytes never pass the socket: they are
written and read in the node's arena, which this process maps.

A reading thread keeps the connection: it connects, hands answers to those who wait for them, and after a loss tries
again with a growing pause. While the node is out of reach every call fails at once, as a miss.
"""

from __future__ import annotations

import contextlib
import itertools
import logging
import mmap
import os
import threading
import time
from collections.abc import Sequence
from typing import TypeVar

from tandem.kvstore.dataplane import protocol
from tandem.kvstore.dataplane.auth import HandshakeRefused, greet
from tandem.kvstore.dataplane.link import Link, connect_unix, expect
from tandem.kvstore.dataplane.protocol import ALL_LAYERS, MAX_KEYS, Body, Kind, ProtocolError
from tandem.kvstore.interfaces import Fetch, Located, ObjectInfo, ObjectKey, PutTicket, Refusal
from tandem.kvstore.node.settings import PUT_LEASE_S

logger = logging.getLogger(__name__)

CALL_S = 3.0
"""A node that does not answer for this long is taken for dead: the connection is given up."""
SURE_S = PUT_LEASE_S / 3
"""A put that is committed within this time cannot have lapsed."""
_FIRST_PAUSE_S = 0.05
_LONGEST_PAUSE_S = 2.0
_Answer = TypeVar("_Answer", bound=Body)


class _Call:
    """One request that waits for its answer."""

    def __init__(self) -> None:
        self.answer: Body | None = None
        self._waiting = threading.Lock()  # half the price of an Event
        self._waiting.acquire()

    def wait(self, timeout_s: float) -> bool:
        return self._waiting.acquire(timeout=timeout_s)

    def end(self) -> None:
        """The answer is here, or will not come."""
        with contextlib.suppress(RuntimeError):  # said twice
            self._waiting.release()


class _Channel:
    """One connection, and everything that lives and dies with it."""

    def __init__(self, link: Link, arena: memoryview) -> None:
        self._link = link
        self._lock = threading.Lock()
        self._ids = itertools.count(1)
        self._calls: dict[int, _Call] = {}
        self._fetches: dict[int, RemoteFetch] = {}
        self._tickets: dict[int, RemoteTicket] = {}
        self.arena = arena
        self.alive = True

    def call(self, kind: Kind, body: Body, wanted: type[_Answer], frame_id: int = 0) -> _Answer | None:
        """None: the connection is gone, or gone by now."""
        call = _Call()
        frame_id = frame_id or next(self._ids)
        with self._lock:
            if not self.alive:
                return None
            self._calls[frame_id] = call
        if self.post(kind, frame_id, body) and not call.wait(CALL_S):
            logger.warning("the store node does not answer")
            self.fail()
        with self._lock:
            self._calls.pop(frame_id, None)
        return call.answer if isinstance(call.answer, wanted) else None

    def post(self, kind: Kind, frame_id: int, body: Body | None = None) -> bool:
        try:
            self._link.send(kind, frame_id, body)
        except (OSError, ValueError) as error:
            logger.debug("cannot send to the store node: %s", error)
            if isinstance(error, OSError):
                self.fail()
            return False
        return True

    def begin_put(self, key: ObjectKey, info: ObjectInfo) -> PutTicket | Refusal:
        number = next(self._ids)
        asked_at = time.monotonic()
        answer = self.call(Kind.BEGIN_PUT, protocol.BeginPut(key, info), protocol.Ticket, number)
        if answer is None:
            return Refusal.CLOSED
        if answer.refusal is not None:
            return answer.refusal
        if not 0 <= answer.offset <= len(self.arena) - info.size:
            self.post(Kind.ABORT, number)
            return Refusal.CLOSED
        buffer = self.arena[answer.offset : answer.offset + info.size]
        ticket = RemoteTicket(self, number, key, buffer, asked_at)
        with self._lock:
            self._tickets[number] = ticket
        return ticket

    def fetch(self, located: Sequence[Located]) -> Fetch:
        fetch = RemoteFetch(self, next(self._ids))
        with self._lock:
            self._fetches[fetch.number] = fetch  # before the answer, which progress may follow at once
        answer = self.call(Kind.FETCH, protocol.Fetch(list(located[:MAX_KEYS])), protocol.Fetching, fetch.number)
        if answer is None:
            fetch.fail()
        else:
            fetch.start(answer)
        return fetch

    def end_ticket(self, number: int) -> bool:
        """False: it had ended."""
        with self._lock:
            return self._tickets.pop(number, None) is not None

    def end_fetch(self, number: int) -> None:
        with self._lock:
            alive = self._fetches.pop(number, None) is not None and self.alive
        if alive:
            self.post(Kind.CLOSE_FETCH, number)

    def run(self) -> None:
        """Reads until the connection is gone. Raises OSError, ProtocolError."""
        while True:
            header, body = self._link.receive()
            if header.kind is Kind.PROGRESS:
                with self._lock:
                    fetch = self._fetches.get(header.id)
                if fetch is not None:
                    progress = expect(body, protocol.Progress)
                    fetch.update(progress.layers, failed=progress.failed)
                continue
            with self._lock:
                call = self._calls.get(header.id)
            if call is not None:
                call.answer = body
                call.end()

    def fail(self) -> None:
        """Everybody who waits is told; the reading thread ends."""
        with self._lock:
            self.alive = False
            calls, fetches = list(self._calls.values()), list(self._fetches.values())
            self._fetches.clear()
            self._tickets.clear()
        self._link.shutdown()
        for call in calls:
            call.end()
        for fetch in fetches:
            fetch.fail()

    def close(self) -> None:
        """Gives back what is still open, so that the node need not wait for late writers."""
        with self._lock:
            tickets = list(self._tickets.values())
        for ticket in tickets:
            ticket.abort()
        self.fail()


class RemoteTicket:
    """A `PutTicket` whose buffer is the node's own memory."""

    def __init__(self, channel: _Channel, number: int, key: ObjectKey, buffer: memoryview, asked_at: float) -> None:
        self._channel = channel
        self._number = number
        self.key = key
        self.buffer = buffer
        self._sure_until = asked_at + SURE_S

    def commit(self) -> bool:
        """Waits for the node only if the put took so long that it may have lapsed: a round trip costs as much as
        copying a megabyte. Look-ups through the same connection see the object at once."""
        if not self._channel.end_ticket(self._number):
            return False
        if time.monotonic() < self._sure_until:
            return self._channel.post(Kind.COMMIT, 0, protocol.Commit(self._number, answer=False))
        answer = self._channel.call(Kind.COMMIT, protocol.Commit(self._number, answer=True), protocol.Done)
        return answer is not None and answer.done

    def abort(self) -> None:
        if self._channel.end_ticket(self._number):
            self._channel.post(Kind.ABORT, self._number)


class RemoteFetch:
    """A `Fetch` whose progress the node pushes."""

    def __init__(self, channel: _Channel, number: int) -> None:
        self._channel = channel
        self.number = number
        self.sources: Sequence[Located] = ()
        self._offsets: Sequence[int] = ()
        self._layers = 0
        self._failed = False
        self._ended = False
        """Closed, or the connection is gone."""
        self._changed = threading.Condition()

    def start(self, answer: protocol.Fetching) -> None:
        end = len(self._channel.arena)
        places = zip(answer.sources, answer.offsets, strict=False)
        if not all(0 <= offset <= end - source.size for source, offset in places):
            self.fail()
            return
        self.sources, self._offsets = tuple(answer.sources), tuple(answer.offsets)
        self.update(answer.layers, failed=False)

    def update(self, layers: int, *, failed: bool) -> None:
        with self._changed:
            self._layers = max(self._layers, layers)
            self._failed = self._failed or failed
            self._changed.notify_all()

    def fail(self) -> None:
        with self._changed:
            self._failed = self._ended = True
            self._changed.notify_all()

    def wait(self, num_layers: int, timeout_s: float) -> bool:
        with self._changed:
            self._changed.wait_for(lambda: self._layers >= num_layers or self._failed, timeout_s)
            return self._layers >= num_layers and not self._failed

    def intact(self) -> int:
        with self._changed:
            if self._ended:
                return 0
            if self._layers >= ALL_LAYERS:
                return len(self.sources)
        count = self._channel.call(Kind.INTACT, protocol.Intact(self.number), protocol.Count)
        return 0 if count is None else min(count.count, len(self.sources))

    def buffer(self, index: int) -> memoryview:
        """Raises ValueError after `close`, or when the connection is gone."""
        if self._ended:
            raise ValueError("the fetch is closed or lost: its memory may hold other objects")
        offset = self._offsets[index]
        return self._channel.arena[offset : offset + self.sources[index].size].toreadonly()

    def close(self) -> None:
        self.fail()
        self._channel.end_fetch(self.number)


class _NoFetch:
    """While the node is out of reach."""

    sources: Sequence[Located] = ()

    def wait(self, num_layers: int, timeout_s: float) -> bool:
        return False

    def intact(self) -> int:
        return 0

    def buffer(self, index: int) -> memoryview:
        raise IndexError(f"object {index} of a fetch without any")

    def close(self) -> None: ...


class RemoteHomeNode:
    """`interfaces.HomeNode`. Never raises, and never waits longer than `CALL_S`."""

    def __init__(self, unix_path: str, name: str, *, secret: bytes = b"") -> None:
        """Connects in the background. `name` is the worker's, for the node's log."""
        self._path = unix_path
        self._name = name
        self._secret = secret
        self._node_id = ""
        self._channel: _Channel | None = None
        self._changed = threading.Condition()
        self._closing = threading.Event()
        self._thread = threading.Thread(target=self._run, name="kv-home", daemon=True)
        self._thread.start()

    @property
    def node_id(self) -> str:
        """Of the node that was there last; empty before any."""
        return self._node_id

    @property
    def connected(self) -> bool:
        return self._channel is not None

    def wait_connected(self, timeout_s: float) -> bool:
        with self._changed:
            return self._changed.wait_for(lambda: self._channel is not None, timeout_s)

    def begin_put(self, key: ObjectKey, info: ObjectInfo) -> PutTicket | Refusal:
        channel = self._channel
        return Refusal.CLOSED if channel is None else channel.begin_put(key, info)

    def locate(self, keys: Sequence[ObjectKey]) -> list[Located]:
        channel = self._channel
        if channel is None or not keys:
            return []
        answer = channel.call(Kind.LOCATE, protocol.Locate(list(keys[:MAX_KEYS])), protocol.LocatedRun)
        return [] if answer is None else answer.located

    def fetch(self, located: Sequence[Located]) -> Fetch:
        channel = self._channel
        return _NoFetch() if channel is None or not located else channel.fetch(located)

    def quarantine(self, key: ObjectKey, reason: str) -> None:
        channel = self._channel
        if channel is not None:
            channel.post(Kind.QUARANTINE, 0, protocol.Quarantine(key, reason[:1024]))

    def close(self) -> None:
        self._closing.set()
        with self._changed:
            channel = self._channel
        if channel is not None:
            channel.close()
        self._thread.join()

    def _run(self) -> None:
        pause_s = _FIRST_PAUSE_S
        complaint = ""
        while not self._closing.is_set():
            try:
                link = connect_unix(self._path)
            except OSError as error:
                reason = str(error)
            else:
                reason, was_up = self._serve(link)
                link.close()
                if was_up:
                    pause_s, complaint = _FIRST_PAUSE_S, ""
            if reason != complaint and not self._closing.is_set():
                logger.warning("no connection to the store node at %s: %s", self._path, reason)
                complaint = reason
            self._closing.wait(pause_s)
            pause_s = min(2 * pause_s, _LONGEST_PAUSE_S)

    def _serve(self, link: Link) -> tuple[str, bool]:
        """Until the connection is gone: why, and whether it had been of use."""
        channel: _Channel | None = None
        try:
            channel = self._open(link)
            with self._changed:
                self._channel = channel
                self._changed.notify_all()
            if not self._closing.is_set():
                logger.info("connected to the store node at %s", self._path)
                channel.run()
            reason = "closed"
        except (OSError, ProtocolError, HandshakeRefused) as error:
            reason = str(error)
        except Exception as error:
            logger.exception("the connection to the store node failed")
            reason = repr(error)
        with self._changed:
            self._channel = None
        if channel is not None:
            channel.fail()
        return reason, channel is not None

    def _open(self, link: Link) -> _Channel:
        greeting = greet(link, self._name, self._secret)
        if greeting.descriptor is None:
            raise ProtocolError("the node has no shared memory, so it cannot be a home node")
        self._node_id = greeting.server.node_id
        return _Channel(link, map_arena(greeting.descriptor, greeting.arena_bytes))


def map_arena(descriptor: int, size: int) -> memoryview:
    """The whole arena; takes ownership of `descriptor`. Unmapped when the last slice of it is gone. Raises OSError,
    ProtocolError."""
    try:
        if os.fstat(descriptor).st_size < size:
            raise ProtocolError(f"the arena has {os.fstat(descriptor).st_size} bytes, {size} were announced")
        return memoryview(mmap.mmap(descriptor, size))
    finally:
        os.close(descriptor)
