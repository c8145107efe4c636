"""Calls that other threads hand to the engine thread, which sleeps until one comes or a descriptor can be read."""

from __future__ import annotations

import queue
import select
import socket
from collections.abc import Callable
from contextlib import suppress


class Inbox:
    """Bounded in effect: the engine empties it before each step."""

    def __init__(self) -> None:
        self._calls: queue.SimpleQueue[Callable[[], None]] = queue.SimpleQueue()
        self._asleep = False
        self._bell, self._rung = socket.socketpair()
        self._bell.setblocking(False)
        self._rung.setblocking(False)

    def put(self, call: Callable[[], None]) -> None:
        """From any thread, at any time."""
        self._calls.put(call)
        if self._asleep:  # set before it looks whether there are calls
            with suppress(BlockingIOError):  # it has been rung often enough
                self._bell.send(b"!")

    def __bool__(self) -> bool:
        """Whether there are calls."""
        return not self._calls.empty()

    def run_next(self) -> bool:
        """False: there is no call."""
        if self._calls.empty():
            return False
        self._calls.get_nowait()()
        return True

    def run_all(self) -> None:
        while self.run_next():
            pass

    def sleep(self, timeout_s: float | None, watched: list[tuple[int, int]]) -> None:
        """Until there is a call, `poll` has an event of `watched` (descriptors and events), or time is up."""
        self._asleep = True
        try:
            if self._calls.empty():
                poll = select.poll()
                poll.register(self._rung, select.POLLIN)
                for descriptor, events in watched:
                    poll.register(descriptor, events)
                poll.poll(None if timeout_s is None else timeout_s * 1000)
        finally:
            self._asleep = False
            with suppress(BlockingIOError):
                while self._rung.recv(4096):
                    pass
