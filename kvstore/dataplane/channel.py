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
from tandem.kvstore.dataplane.protocol import ALL_LAYERS, MAX_KEYS, Kind
from tandem.kvstore.dataplane.puts import Call, RemotePuts
from tandem.kvstore.interfaces import Fetch, Located, ObjectKey
from tandem.kvstore.node.pages import PageWarmer
from tandem.wire.header import Header, ProtocolError
from tandem.wire.link import Link
from tandem.wire.protocol import Body, expect

logger = logging.getLogger(__name__)

CALL_S = 3.0
"""A node that does not answer for this long is taken for dead: the connection is given up."""
_LOOK_S = 0.1
"""How often `run` looks for what came while nobody waited (progress of prefetches), and readers at what others did."""
BEGUN_S = 0.1
"""A fetch that a look-up began ends if nobody asks for it for so long."""
_Answer = TypeVar("_Answer", bound=Body)


class Channel:
    """A connection, and everything that lives and dies with it."""

    def __init__(self, link: Link, arena: memoryview) -> None:
        self._link = link
        link.look_every(_LOOK_S)
        self._changed = threading.Condition(threading.Lock())
        """Guards what follows; notified when any of it changes."""
        self._is_read = False
        """A thread has the connection's reading end."""
        self._calls: dict[int, Call] = {}
        self._fetches: dict[int, RemoteFetch] = {}
        self._begun: tuple[RemoteFetch, float] | None = None
        """The fetch that the last look-up began, and when; nobody has asked for it so far."""
        self._ids = itertools.count(1)
        self.arena = arena
        self._pages = PageWarmer(arena)
        self.puts = RemotePuts(self)
        self.alive = True
        self.reason = ""
        """Why it is not alive any more."""

    def call(self, kind: Kind, body: Body, wanted: type[_Answer], frame_id: int = 0) -> _Answer | None:
        """None: the connection is gone, or gone by now."""
        return self.answer(self.ask(kind, body, frame_id), wanted)

    def new_id(self) -> int:
        return next(self._ids)

    def ask(self, kind: Kind, body: Body, frame_id: int = 0) -> Call:
        """Sends it; `answer` waits."""
        call = Call()
        frame_id = frame_id or self.new_id()
        with self._changed:
            call.ended = not self.alive
            self._calls[frame_id] = call
        if call.ended or not self.post(kind, frame_id, body):
            with self._changed:
                call.ended = True
                self._calls.pop(frame_id, None)
        return call

    def answer(self, call: Call, wanted: type[_Answer]) -> _Answer | None:
        """None: the connection is gone, or gone by now."""
        if not call.ended and not self.wait(lambda: call.ended, CALL_S):
            logger.warning("the store node does not answer")
            self.fail("the store node does not answer")
        return call.answer if isinstance(call.answer, wanted) else None

    def post(self, kind: Kind, frame_id: int, body: Body | None = None) -> bool:
        """Sends it; nobody answers. False: nothing was sent."""
        try:
            self._link.send(kind, frame_id, body)
        except (OSError, ValueError) as error:
            logger.debug("cannot send to the store node: %s", error)
            if isinstance(error, OSError):
                self.fail(str(error))
            return False
        return True

    def wait(self, done: Callable[[], bool], timeout_s: float) -> bool:
        """Waits until `done`, reading frames if no other thread does. False: time is up, or the connection is gone.
        What `done` looks at is changed by frames, or under `_changed` by other threads."""
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
        """Reads until the connection is gone, and nobody uses it any more. Keeps pages ready meanwhile."""
        while self.alive:
            self._link.wait_for_end(0.0 if self._pages.warm() else _LOOK_S)
            self.tidy()
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
            elif (call := self._calls.pop(header.id, None)) is not None:
                call.answer, call.ended = body, True
            self._changed.notify_all()

    def locate(self, keys: Sequence[ObjectKey]) -> list[Located]:
        """Looks up the leading run of `keys`; the node may begin a fetch of it, which `fetch` then finds."""
        fetch = RemoteFetch(self, self.new_id())
        with self._changed:
            self._fetches[fetch.number] = fetch
        order = protocol.Locate(list(keys[:MAX_KEYS]), fetch.number)
        answer = self.call(Kind.LOCATE, order, protocol.LocatedRun)
        has_begun = answer is not None and bool(answer.offsets)
        with self._changed:
            if answer is not None and has_begun:
                fetch.start(protocol.Fetching(answer.located, answer.offsets, ALL_LAYERS))
                last, self._begun = self._begun, (fetch, time.monotonic())
            else:
                self._fetches.pop(fetch.number, None)
                last = None
        if last is not None:
            last[0].close()
        return [] if answer is None else answer.located

    def tidy(self) -> None:
        """Ends what was begun ahead and is not wanted."""
        self.puts.tidy()
        with self._changed:
            begun = self._begun
            if begun is None or time.monotonic() - begun[1] < BEGUN_S:
                return
            self._begun = None
        begun[0].close()

    def fetch(self, located: Sequence[Located], overlap_s: float) -> Fetch:
        """Begins a fetch, or takes the one that the look-up of the same objects has begun."""
        with self._changed:
            begun, self._begun = self._begun, None
        if begun is not None:
            if list(begun[0].sources) == list(located):
                return begun[0]
            begun[0].close()
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

    def end_fetch(self, fetch: RemoteFetch) -> None:
        """Ends it here and on the node."""
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
            self._calls.clear()
            for fetch in self._fetches.values():
                fetch.lose()
            self._fetches.clear()
            self._changed.notify_all()
        self.puts.lose()
        self._link.shutdown()

    def close(self) -> None:
        """Gives back what is still open, so that the node need not wait for late writers."""
        self.puts.close()
        self.fail("closed")


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
        """Takes the answer: where the objects are. A place outside the arena loses the fetch."""
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
        """Number of leading objects that are complete; 0 when the connection is gone."""
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
