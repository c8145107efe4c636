"""The arena against a list of bytes that are taken; and what other processes see of it."""

from __future__ import annotations

import mmap
import os
import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tandem.common.errors import ConfigError
from tandem.kvstore.interfaces import StoreIntegrityError
from tandem.kvstore.node.arena import ALIGNMENT, HostArena


@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 2**32), num_pages=st.integers(1, 40))
def test_runs_never_overlap_and_a_run_is_found_whenever_one_exists(seed: int, num_pages: int) -> None:
    rng = random.Random(seed)
    arena = HostArena(num_pages * ALIGNMENT)
    taken = [False] * num_pages
    live: dict[int, int] = {}
    for _ in range(120):
        if live and rng.random() < 0.45:
            offset = rng.choice(list(live))
            arena.free(offset)
            for page in range(offset // ALIGNMENT, offset // ALIGNMENT + live.pop(offset)):
                taken[page] = False
        else:
            size = rng.randint(1, 6 * ALIGNMENT)
            pages = -(-size // ALIGNMENT)
            fits = any(not any(taken[at : at + pages]) for at in range(num_pages - pages + 1))
            place = arena.allocate(size)
            assert (place is not None) == fits
            if place is not None:
                assert place % ALIGNMENT == 0
                at = place // ALIGNMENT
                assert not any(taken[at : at + pages])
                taken[at : at + pages] = [True] * pages
                live[place] = pages
        assert arena.used_bytes == sum(taken) * ALIGNMENT
        arena.check_integrity()
    for offset in live:
        arena.free(offset)
    assert arena.largest_free == arena.capacity_bytes
    arena.check_integrity()
    arena.close()


def test_another_mapping_of_the_descriptor_sees_the_bytes() -> None:
    arena = HostArena(1 << 20)
    offset = arena.allocate(5000)
    assert offset is not None
    arena.view(offset, 5000)[:] = b"x" * 5000
    with mmap.mmap(arena.fd, arena.capacity_bytes) as other:
        assert other[offset : offset + 5000] == b"x" * 5000
    arena.close()


def test_the_descriptor_cannot_be_shrunk() -> None:
    arena = HostArena(1 << 20)
    with pytest.raises(PermissionError):
        os.ftruncate(arena.fd, 0)
    arena.close()


def test_memory_is_taken_when_it_is_written_and_then_used_again() -> None:
    arena = HostArena(1 << 33)
    for _ in range(50):
        offset = arena.allocate(1 << 20)
        assert offset is not None
        arena.view(offset, 1 << 20)[::4096] = bytes(256)
        arena.free(offset)
    assert os.fstat(arena.fd).st_blocks * 512 <= 4 << 20
    arena.close()


def test_the_smallest_run_that_fits_is_taken() -> None:
    arena = HostArena(20 * ALIGNMENT)
    runs = [arena.allocate(pages * ALIGNMENT) for pages in (1, 6, 1, 3, 1)]
    assert None not in runs
    for offset in (runs[1], runs[3]):
        assert offset is not None
        arena.free(offset)
    assert arena.allocate(3 * ALIGNMENT) == runs[3]
    assert arena.allocate(4 * ALIGNMENT) == runs[1]
    assert 0 < arena.fragmentation < 1
    arena.close()


def test_views_outlive_close() -> None:
    arena = HostArena(ALIGNMENT)
    view = arena.view(0, 10)
    arena.close()
    view[:] = b"0123456789"
    assert view.tobytes() == b"0123456789"


def test_no_page_is_a_configuration_error_and_no_bytes_a_wrong_call() -> None:
    with pytest.raises(ConfigError, match="kv_host_bytes"):
        HostArena(100)
    arena = HostArena(ALIGNMENT)
    with pytest.raises(ValueError, match="0 bytes"):
        arena.allocate(0)
    with pytest.raises(KeyError):
        arena.free(0)
    arena.close()


def test_check_integrity_finds_bytes_that_are_handed_out_twice() -> None:
    arena = HostArena(4 * ALIGNMENT)
    arena.allocate(ALIGNMENT)
    arena._runs[2 * ALIGNMENT] = ALIGNMENT
    with pytest.raises(StoreIntegrityError, match="twice"):
        arena.check_integrity()
    arena.close()
