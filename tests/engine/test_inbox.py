"""The engine thread sleeps until there is something to do, and no longer."""

from __future__ import annotations

import select
import socket
import threading

from tandem.engine.inbox import Inbox
from tests.engine_harness import TIMEOUT_S


def test_calls_run_in_order() -> None:
    inbox, seen = Inbox(), list[int]()
    for number in range(5):
        inbox.put(lambda number=number: seen.append(number))
    inbox.sleep(None, [])
    inbox.run_all()
    assert seen == [0, 1, 2, 3, 4]


def test_a_call_wakes_the_sleeper_every_time() -> None:
    inbox, seen, stopped = Inbox(), list[int](), threading.Event()

    def engine() -> None:
        while not stopped.is_set():
            inbox.sleep(None, [])
            inbox.run_all()

    thread = threading.Thread(target=engine)
    thread.start()
    for number in range(2000):
        done = threading.Event()
        inbox.put(lambda number=number: seen.append(number))
        inbox.put(done.set)
        assert done.wait(TIMEOUT_S)
    inbox.put(stopped.set)
    thread.join(TIMEOUT_S)
    assert not thread.is_alive()
    assert seen == list(range(2000))


def test_what_it_watches_wakes_it_and_so_does_time() -> None:
    inbox = Inbox()
    ours, theirs = socket.socketpair()
    with ours, theirs:
        inbox.sleep(0.01, [(ours.fileno(), select.POLLIN)])
        theirs.send(b"x")
        inbox.sleep(None, [(ours.fileno(), select.POLLIN)])
        assert ours.recv(1) == b"x"
