"""`PageWarmer`: pages come ahead of use, within bounds, and nothing that is written changes."""

from __future__ import annotations

import os
import sys

import pytest

from tandem.kvstore.node.arena import HostArena
from tandem.kvstore.node.pages import AHEAD_BYTES, AHEAD_SHARE

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="pages are asked for on Linux only")

CAPACITY = 16 << 20
AHEAD = min(AHEAD_BYTES, CAPACITY // AHEAD_SHARE)


def held(arena: HostArena) -> int:
    """Bytes that the system has given to the arena."""
    return os.fstat(arena.fd).st_blocks * 512


def warm(arena: HostArena) -> None:
    while arena.pages.warm():
        pass


def test_pages_are_there_ahead_of_what_is_used_and_no_further() -> None:
    arena = HostArena(CAPACITY)
    assert held(arena) == 0
    warm(arena)
    if not arena.pages.warmed:
        pytest.skip("this kernel does not take MADV_POPULATE_WRITE")
    assert held(arena) == AHEAD
    size = 3 << 20
    for number in range(1, 4):
        assert arena.allocate(size) is not None
        warm(arena)
        assert held(arena) == number * size + AHEAD
    while (offset := arena.allocate(1 << 20)) is not None:
        last = offset
    warm(arena)
    assert held(arena) == arena.pages.warmed == CAPACITY
    arena.free(last)
    assert arena.allocate(1 << 20) == last
    assert not arena.pages.warm()
    arena.close()


def test_what_is_written_before_stays() -> None:
    arena = HostArena(CAPACITY)
    offset = arena.allocate(CAPACITY)
    assert offset is not None
    content = os.urandom(CAPACITY)
    arena.view(offset, CAPACITY)[:] = content
    warm(arena)
    assert arena.view(offset, CAPACITY) == content
    arena.close()
