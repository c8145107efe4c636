"""The puts of one connection of a worker to its node.

Chunks of one prompt are put one after the other and are of one size. Once two such puts have come in a row, the node is
asked to hold memory for the next ones, some ahead. Such a put copies, and says with its commit what the memory is for:
one message that nobody waits for, where a round trip between two processes costs as much as copying a megabyte.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from dataclasses import dataclass
from typing import Protocol, TypeVar

from tandem.kvstore.dataplane import protocol
from tandem.kvstore.dataplane.protocol import Kind
from tandem.kvstore.interfaces import ObjectInfo, ObjectKey, PutTicket, Refusal
from tandem.kvstore.node.settings import PUT_LEASE_S
from tandem.wire.protocol import Body

SURE_S = PUT_LEASE_S / 3
"""A put that is committed within this time cannot have lapsed."""
NEXT_S = 0.1
"""A put that begins so soon after another one of its size and owner follows it; for longer nothing is held."""
NUM_AHEAD = 3
"""While one put is copied, the answer about the memory of a later one arrives."""
_Answer = TypeVar("_Answer", bound=Body)


class Call:
    """One request that waits for its answer."""

    __slots__ = ("answer", "ended")

    def __init__(self) -> None:
        self.answer: Body | None = None
        self.ended = False
        """The answer is here, or will not come."""


class PutChannel(Protocol):
    """The connection, as its puts see it."""

    arena: memoryview

    def new_id(self) -> int: ...

    def ask(self, kind: Kind, body: Body, frame_id: int = 0) -> Call: ...

    def answer(self, call: Call, wanted: type[_Answer]) -> _Answer | None: ...

    def post(self, kind: Kind, frame_id: int, body: Body | None = None) -> bool: ...

    def used_up_to(self, end: int) -> None: ...


@dataclass(frozen=True, slots=True)
class _Held:
    """Memory for a put to come, if the answer to `call` says so."""

    number: int
    call: Call
    index: int
    """Place in the answer."""
    size: int
    owner: str
    asked_at: float


class RemotePuts:
    """Safe from any thread."""

    def __init__(self, channel: PutChannel) -> None:
        self._channel = channel
        self._lock = threading.Lock()
        self._tickets: dict[int, RemoteTicket] = {}
        self._held: deque[_Held] = deque()
        """All of one size and owner: those of the last put."""
        self._last: tuple[int, str] = (0, "")
        self._last_at = 0.0
        """When a put began or ended."""

    def begin(self, key: ObjectKey, info: ObjectInfo) -> PutTicket | Refusal:
        """Begins a put: in memory that is held for it, or in what the node gives now."""
        now = time.monotonic()
        with self._lock:
            kind = (info.size, info.owner)
            follows = self._last == kind and (now - self._last_at < NEXT_S or bool(self._tickets))
            self._last, self._last_at = kind, now
            held = self._held.popleft() if follows and self._held else None
            others = [] if follows else self._take_all()
        self._give_back(others)
        if held is not None:
            offset = self._offset(held)
            if offset is not None and now - held.asked_at < SURE_S:
                return self._open(held.number, key, info, offset, held.asked_at, is_held=True)
            self._give_back([held])
        number = self._channel.new_id()
        call = self._channel.ask(Kind.BEGIN_PUT, protocol.BeginPut(key, info), number)
        answer = self._channel.answer(call, protocol.Ticket)
        if answer is None:
            return Refusal.CLOSED
        if answer.refusal is not None:
            return answer.refusal
        if not self._fits(answer.offset, info.size):
            self._channel.post(Kind.ABORT, number)
            return Refusal.CLOSED
        return self._open(number, key, info, answer.offset, now, asks_for_more=follows)

    def _open(
        self,
        number: int,
        key: ObjectKey,
        info: ObjectInfo,
        offset: int,
        asked_at: float,
        *,
        is_held: bool = False,
        asks_for_more: bool = True,
    ) -> RemoteTicket:
        self._channel.used_up_to(offset + info.size)
        buffer = self._channel.arena[offset : offset + info.size]
        ticket = RemoteTicket(self, number, key, info, buffer, asked_at, is_held=is_held, asks_for_more=asks_for_more)
        with self._lock:
            self._tickets[number] = ticket
        return ticket

    def _offset(self, held: _Held) -> int | None:
        answer = self._channel.answer(held.call, protocol.Held)
        if answer is None or held.index >= len(answer.offsets):
            return None
        offset = answer.offsets[held.index]
        return offset if self._fits(offset, held.size) else None

    def _fits(self, offset: int, size: int) -> bool:
        return 0 <= offset <= len(self._channel.arena) - size

    def commit(self, ticket: RemoteTicket) -> bool:
        """Commits a put, and has memory held for the next ones. False: it has ended, or had lapsed."""
        if not self._end(ticket):
            return False
        now = time.monotonic()
        named = (ticket.key, ticket.info) if ticket.is_held else (None, None)
        if now - ticket.asked_at >= SURE_S:
            call = self._channel.ask(Kind.COMMIT, protocol.Commit(ticket.number, True, *named))
            answer = self._channel.answer(call, protocol.Done)
            return answer is not None and answer.done
        with self._lock:
            suits = ticket.asks_for_more and self._last == (ticket.info.size, ticket.info.owner)
            count = NUM_AHEAD - len(self._held) if suits else 0
            numbers = [self._channel.new_id() for _ in range(count)]
        if not numbers:
            return self._channel.post(Kind.COMMIT, 0, protocol.Commit(ticket.number, False, *named))
        call = self._channel.ask(
            Kind.COMMIT, protocol.Commit(ticket.number, False, named[0], ticket.info, numbers), numbers[0]
        )
        held = [
            _Held(number, call, index, ticket.info.size, ticket.info.owner, now) for index, number in enumerate(numbers)
        ]
        with self._lock:
            suits = self._last == (ticket.info.size, ticket.info.owner) and len(self._held) + count <= NUM_AHEAD
            if suits:
                self._held += held
        if not suits:  # another thread was quicker
            self._give_back(held)
        return not call.ended or call.answer is not None

    def abort(self, ticket: RemoteTicket) -> None:
        if self._end(ticket):
            self._channel.post(Kind.ABORT, ticket.number)

    def _end(self, ticket: RemoteTicket) -> bool:
        """False: it had ended."""
        with self._lock:
            self._last_at = time.monotonic()
            return self._tickets.pop(ticket.number, None) is not None

    def tidy(self) -> None:
        """Gives back what no put has come for. Call it now and then."""
        with self._lock:
            is_idle = not self._tickets and time.monotonic() - self._last_at >= NEXT_S
            held = self._take_all() if is_idle else []
        self._give_back(held)

    def _take_all(self) -> list[_Held]:
        held = list(self._held)
        self._held.clear()
        return held

    def _give_back(self, held: list[_Held]) -> None:
        for each in held:
            self._channel.post(Kind.ABORT, each.number)

    def lose(self) -> None:
        """The connection is gone."""
        with self._lock:
            self._tickets.clear()
            self._held.clear()

    def close(self) -> None:
        """Gives back what is still open, so that the node need not wait for late writers."""
        with self._lock:
            tickets, held = list(self._tickets.values()), self._take_all()
        for ticket in tickets:
            ticket.abort()
        self._give_back(held)
        if held:  # a node that cannot send its answer any more reads no further
            self._channel.answer(held[-1].call, protocol.Held)


class RemoteTicket:
    """A `PutTicket` whose buffer is the node's own memory."""

    def __init__(
        self,
        puts: RemotePuts,
        number: int,
        key: ObjectKey,
        info: ObjectInfo,
        buffer: memoryview,
        asked_at: float,
        *,
        is_held: bool,
        asks_for_more: bool,
    ) -> None:
        self._puts = puts
        self.number = number
        self.key = key
        self.info = info
        self.buffer = buffer
        self.asked_at = asked_at
        self.is_held = is_held
        """The node does not know yet what the memory is for."""
        self.asks_for_more = asks_for_more

    def commit(self) -> bool:
        """Waits for the node only if the put took so long that it may have lapsed. True also where somebody else was
        first to put the object: it is there, or about to be. Look-ups through the same connection see it at once."""
        return self._puts.commit(self)

    def abort(self) -> None:
        self._puts.abort(self)
