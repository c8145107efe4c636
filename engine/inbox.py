"""Calls that other threads hand to the engine thread, which sleeps until one comes or a descriptor can be read."""

from __future__ import annotations

import queue
import select
import socket
from collections.abc import Callable
from concurrent.futures import Future
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
        """Appends a call. From any thread, at any time."""
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

    def carry_out(self, call: Callable[[], None], is_served: Callable[[], bool]) -> bool:
        """Puts `call` and waits until it was carried out; raises what it raises. False: it was not and will not be, as
        nobody empties the inbox any more, which `is_served` says."""
        done: Future[None] = Future()

        def carry() -> None:
            """Makes the call, and hands its end or its exception to the thread that waits."""
            try:
                call()
                done.set_result(None)
            except Exception as error:
                done.set_exception(error)

        if not is_served():
            return False
        self.put(carry)
        while True:
            try:
                done.result(timeout=1.0)
                return True
            except TimeoutError:
                if not is_served() and not done.done():
                    return False

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
