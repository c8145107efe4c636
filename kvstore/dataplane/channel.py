"""One connection of a worker to its node, shared by its threads.

Whoever waits for an answer reads the connection itself, and hands the others theirs: a thread that only reads would
cost each call a change of threads, which takes longer than the node's work. While nobody waits, `run` looks now and
then whether something has come.
"""

from __future__ import annotations

import itertools
import logging
import threading
import time
from collections.abc import Callable, Sequence
from typing import TypeVar

from tandem.kvstore.dataplane import protocol
from tandem.kvstore.dataplane.link import Link, expect
from tandem.kvstore.dataplane.protocol import ALL_LAYERS, MAX_KEYS, Body, Header, Kind, ProtocolError
from tandem.kvstore.interfaces import Fetch, Located, ObjectInfo, ObjectKey, PutTicket, Refusal
from tandem.kvstore.node.pages import PageWarmer
from tandem.kvstore.node.settings import PUT_LEASE_S

logger = logging.getLogger(__name__)

CALL_S = 3.0
"""A node that does not answer for this long is taken for dead: the connection is given up."""
SURE_S = PUT_LEASE_S / 3
"""A put that is committed within this time cannot have lapsed."""
_LOOK_S = 0.1
"""How often `run` looks for what came while nobody waited (progress of prefetches), and readers at what others did."""
_Answer = TypeVar("_Answer", bound=Body)


class _Call:
    """One request that waits for its answer."""

    __slots__ = ("answer", "ended")

    def __init__(self) -> None:
        self.answer: Body | None = None
        self.ended = False
        """The answer is here, or will not come."""


class Channel:
    """A connection, and everything that lives and dies with it."""

    def __init__(self, link: Link, arena: memoryview) -> None:
        self._link = link
        self._changed = threading.Condition(threading.Lock())
        """Guards what follows; notified when any of it changes."""
        self._is_read = False
        """A thread has the connection's reading end."""
        self._calls: dict[int, _Call] = {}
        self._fetches: dict[int, RemoteFetch] = {}
        self._tickets: dict[int, RemoteTicket] = {}
        self._ids = itertools.count(1)
        self.arena = arena
        self._pages = PageWarmer(arena)
        self.alive = True
        self.reason = ""
        """Why it is not alive any more."""

    def call(self, kind: Kind, body: Body, wanted: type[_Answer], frame_id: int = 0) -> _Answer | None:
        """None: the connection is gone, or gone by now."""
        call = _Call()
        frame_id = frame_id or next(self._ids)
        with self._changed:
            if not self.alive:
                return None
            self._calls[frame_id] = call
        if self.post(kind, frame_id, body) and not self.wait(lambda: call.ended, CALL_S):
            logger.warning("the store node does not answer")
            self.fail("the store node does not answer")
        with self._changed:
            self._calls.pop(frame_id, None)
        return call.answer if isinstance(call.answer, wanted) else None

    def post(self, kind: Kind, frame_id: int, body: Body | None = None) -> bool:
        try:
            self._link.send(kind, frame_id, body)
        except (OSError, ValueError) as error:
            logger.debug("cannot send to the store node: %s", error)
            if isinstance(error, OSError):
                self.fail(str(error))
            return False
        return True

    def wait(self, done: Callable[[], bool], timeout_s: float) -> bool:
        """Until `done`, reading frames if no other thread does. False: time is up, or the connection is gone. What
        `done` looks at is changed by frames, or under `_changed` by other threads."""
        deadline = time.monotonic() + timeout_s
        with self._changed:
            while self._is_read and self.alive and not done() and (left := deadline - time.monotonic()) > 0:
                self._changed.wait(left)
            if self._is_read or not self.alive or done():
                return done()
            self._is_read = True
        try:
            self._read_until(done, deadline)
        finally:
            with self._changed:
                self._is_read = False
                self._changed.notify_all()  # one of those who wait reads on
        return done()

    def run(self) -> None:
        """Until the connection is gone, and nobody uses it any more. Keeps pages ready meanwhile."""
        while self.alive:
            self._link.wait_for_end(0.0 if self._pages.warm() else _LOOK_S)
            self.wait(lambda: False, 0.0)
        with self._changed:
            self._changed.wait_for(lambda: not self._is_read)

    def _read_until(self, done: Callable[[], bool], deadline: float) -> None:
        try:
            while self.alive and not done():
                left = deadline - time.monotonic()
                if self._link.wait_for_frame(min(max(left, 0.0), _LOOK_S)):
                    self._take(*self._link.receive())
                elif left <= _LOOK_S:
                    return
        except (OSError, ProtocolError) as error:
            self.fail(str(error))
        except Exception as error:
            logger.exception("the connection to the store node failed")
            self.fail(repr(error))

    def _take(self, header: Header, body: Body) -> None:
        with self._changed:
            if header.kind is Kind.PROGRESS:
                fetch = self._fetches.get(header.id)
                if fetch is not None:
                    progress = expect(body, protocol.Progress)
                    fetch.update(progress.layers, failed=progress.failed)
            elif (call := self._calls.get(header.id)) is not None:
                call.answer, call.ended = body, True
            self._changed.notify_all()

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
        self.used_up_to(answer.offset + info.size)
        buffer = self.arena[answer.offset : answer.offset + info.size]
        ticket = RemoteTicket(self, number, key, buffer, asked_at)
        with self._changed:
            self._tickets[number] = ticket
        return ticket

    def fetch(self, located: Sequence[Located], overlap_s: float) -> Fetch:
        fetch = RemoteFetch(self, next(self._ids))
        with self._changed:
            self._fetches[fetch.number] = fetch  # before the answer, which progress may follow at once
        order = protocol.Fetch(list(located[:MAX_KEYS]), overlap_s)
        answer = self.call(Kind.FETCH, order, protocol.Fetching, fetch.number)
        with self._changed:
            if answer is None:
                fetch.lose()
            else:
                fetch.start(answer)
        return fetch

    def used_up_to(self, end: int) -> None:
        self._pages.used_up_to(end)

    def end_ticket(self, number: int) -> bool:
        """False: it had ended."""
        with self._changed:
            return self._tickets.pop(number, None) is not None

    def end_fetch(self, fetch: RemoteFetch) -> None:
        with self._changed:
            fetch.lose()
            alive = self._fetches.pop(fetch.number, None) is not None and self.alive
            self._changed.notify_all()
        if alive:
            self.post(Kind.CLOSE_FETCH, fetch.number)

    def fail(self, reason: str) -> None:
        """Everybody who waits is told."""
        with self._changed:
            if self.alive:
                self.alive, self.reason = False, reason
            for call in self._calls.values():
                call.ended = True
            for fetch in self._fetches.values():
                fetch.lose()
            self._fetches.clear()
            self._tickets.clear()
            self._changed.notify_all()
        self._link.shutdown()

    def close(self) -> None:
        """Gives back what is still open, so that the node need not wait for late writers."""
        with self._changed:
            tickets = list(self._tickets.values())
        for ticket in tickets:
            ticket.abort()
        self.fail("closed")


class RemoteTicket:
    """A `PutTicket` whose buffer is the node's own memory."""

    def __init__(self, channel: Channel, number: int, key: ObjectKey, buffer: memoryview, asked_at: float) -> None:
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

    def __init__(self, channel: Channel, number: int) -> None:
        self._channel = channel
        self.number = number
        self.sources: Sequence[Located] = ()
        self._offsets: Sequence[int] = ()
        self._layers = 0
        self._failed = False
        self._ended = False
        """Closed, or the connection is gone."""

    # By the channel, under its lock

    def start(self, answer: protocol.Fetching) -> None:
        end = len(self._channel.arena)
        places = list(zip(answer.sources, answer.offsets, strict=False))
        if not all(0 <= offset <= end - source.size for source, offset in places):
            self.lose()
            return
        self.sources, self._offsets = tuple(answer.sources), tuple(answer.offsets)
        self._channel.used_up_to(max((offset + source.size for source, offset in places), default=0))
        self.update(answer.layers, failed=False)

    def update(self, layers: int, *, failed: bool) -> None:
        self._layers = max(self._layers, layers)
        self._failed = self._failed or failed

    def lose(self) -> None:
        self._failed = self._ended = True

    # By its user

    def wait(self, num_layers: int, timeout_s: float) -> bool:
        if self._layers < num_layers and not self._failed:
            self._channel.wait(lambda: self._layers >= num_layers or self._failed, timeout_s)
        return self._layers >= num_layers and not self._failed

    def intact(self) -> int:
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
        self._channel.end_fetch(self)
