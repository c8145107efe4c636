"""`PageWarmer`: pages come ahead of use, within bounds, and nothing that is written changes."""

from __future__ import annotations

import ctypes
import errno
import os
import sys
import tempfile
import threading
from pathlib import Path

import pytest

from tandem.kvstore.node.arena import HostArena
from tandem.kvstore.node.pages import AHEAD_BYTES, AHEAD_SHARE, COLLAPSE, PageWarmer
from tandem.wire.shared_memory import HUGE_PAGE_BYTES, map_shared

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="pages are asked for on Linux only")

CAPACITY = 16 << 20
AHEAD = min(AHEAD_BYTES, CAPACITY // AHEAD_SHARE)


def held(arena: HostArena) -> int:
    """Bytes that the system has given to the arena."""
    return os.fstat(arena.fd).st_blocks * 512


def warm(arena: HostArena) -> None:
    warm_all(arena.pages)


def warm_all(pages: PageWarmer) -> None:
    while pages.warm():
        pass


@pytest.mark.parametrize("huge", [True, False])
def test_pages_are_there_ahead_of_what_is_used_and_no_further(huge: bool) -> None:
    arena = HostArena(CAPACITY)
    assert held(arena) == 0
    arena.pages.huge = huge
    warm(arena)
    if not arena.pages.warmed:
        pytest.skip("this kernel does not take MADV_POPULATE_WRITE")
    assert held(arena) == AHEAD
    size = 3 << 20
    for number in range(1, 4):
        assert arena.allocate(size) is not None
        warm(arena)
        page = HUGE_PAGE_BYTES if arena.pages.huge else 1
        assert held(arena) == -(-(number * size + AHEAD) // page) * page
    while (offset := arena.allocate(1 << 20)) is not None:
        last = offset
    warm(arena)
    assert held(arena) == arena.pages.warmed == CAPACITY
    arena.free(last)
    assert arena.allocate(1 << 20) == last
    assert not arena.pages.warm()
    arena.close()


def test_an_arena_that_ends_within_a_huge_page_is_warmed_to_its_end() -> None:
    arena = HostArena(CAPACITY + 5 * 4096)
    assert arena.allocate(CAPACITY + 5 * 4096) is not None
    warm(arena)
    if not arena.pages.warmed:
        pytest.skip("this kernel does not take MADV_POPULATE_WRITE")
    assert held(arena) == arena.pages.warmed == CAPACITY + 5 * 4096
    arena.close()


@pytest.mark.parametrize(
    ("failure", "stays_huge"), [(errno.EINVAL, False), (errno.ENOMEM, False), (errno.EAGAIN, True)]
)
def test_where_huge_pages_are_refused_small_ones_come(failure: int, stays_huge: bool) -> None:
    arena = HostArena(CAPACITY)
    if not arena.pages.warm():
        pytest.skip("this kernel does not take MADV_POPULATE_WRITE")
    arena.pages.huge = True
    ask = arena.pages._advise
    arena.pages._advise = lambda *advice: failure if advice[2] == COLLAPSE else ask(*advice)  # type: ignore[method-assign]
    arena.allocate(CAPACITY)
    warm(arena)
    assert held(arena) == arena.pages.warmed == CAPACITY
    assert arena.pages.huge == stays_huge
    arena.close()


def test_two_mappings_warmed_at_once_keep_what_others_write() -> None:
    arena = HostArena(CAPACITY)
    other = map_shared(arena.fd, CAPACITY)
    arena.allocate(CAPACITY)
    theirs = PageWarmer(other)
    theirs.used_up_to(CAPACITY)
    threads = [threading.Thread(target=warm_all, args=(warmer,)) for warmer in (arena.pages, theirs)]
    content = os.urandom(CAPACITY)
    for thread in threads:
        thread.start()
    for start in range(0, CAPACITY, 1 << 16):
        mine = other if start % (1 << 17) else arena.view(0, CAPACITY)
        mine[start : start + (1 << 16)] = content[start : start + (1 << 16)]
    for thread in threads:
        thread.join()
    assert arena.view(0, CAPACITY) == content == other
    arena.close()


@pytest.mark.parametrize("size", [1, 4096, 4097, HUGE_PAGE_BYTES - 4096, HUGE_PAGE_BYTES, 3 * HUGE_PAGE_BYTES + 8192])
def test_a_mapping_starts_on_a_huge_page_has_its_size_and_goes_with_its_last_slice(size: int) -> None:
    with tempfile.TemporaryFile() as file:
        file.truncate(size)
        mapped = map_shared(file.fileno(), size)
        start = ctypes.addressof(ctypes.c_char.from_buffer(mapped))
        assert (start % HUGE_PAGE_BYTES, len(mapped), mapped.format) == (0, size, "B")
        mapped[size - 1] = 7
        assert os.pread(file.fileno(), 1, size - 1) == b"\x07"
        last = mapped[size - 1 :]
        del mapped
        assert last[0] == 7
        assert is_mapped(start)
        del last
        assert not is_mapped(start)


def test_what_cannot_be_mapped_is_an_error() -> None:
    with pytest.raises(OSError, match="cannot be mapped"), open(os.devnull, "rb") as file:
        map_shared(file.fileno(), 4096)


def is_mapped(address: int) -> bool:
    maps = [line.split("-", 1)[0] for line in Path("/proc/self/maps").read_text().splitlines()]
    return f"{address:x}" in maps


def test_what_is_written_before_stays() -> None:
    arena = HostArena(CAPACITY)
    offset = arena.allocate(CAPACITY)
    assert offset is not None
    content = os.urandom(CAPACITY)
    arena.view(offset, CAPACITY)[:] = content
    warm(arena)
    assert arena.view(offset, CAPACITY) == content
    arena.close()
