"""Fixtures for rooms with threads and sockets: nothing is left over, and waiting polls."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable, Iterator

import pytest

DEADLINE_S = 30.0


@pytest.fixture(autouse=True)
def nothing_left_over() -> Iterator[None]:
    """Every test gives back its threads and descriptors."""
    threads = set(threading.enumerate())
    yield
    deadline = time.monotonic() + DEADLINE_S
    while time.monotonic() < deadline and (extra := set(threading.enumerate()) - threads):
        for thread in extra:
            thread.join(0.1)
    left = {thread.name for thread in set(threading.enumerate()) - threads if thread.name.startswith("kv-")}
    assert not left


@pytest.fixture
def open_descriptors() -> Callable[[], int]:
    return lambda: len(os.listdir("/proc/self/fd"))


@pytest.fixture
def eventually() -> Callable[[Callable[[], object]], None]:
    def wait(predicate: Callable[[], object], timeout_s: float = DEADLINE_S) -> None:
        deadline = time.monotonic() + timeout_s
        while not predicate():
            assert time.monotonic() < deadline, "did not become true in time"
            time.sleep(0.005)

    return wait
