"""The arena's allocator, and its two ends."""

from __future__ import annotations

import os

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tandem.handover.arena import ALIGNMENT, MAX_ARENA_BYTES, ArenaReceiver, ArenaSender, Ring
from tandem.wire.header import ProtocolError
from tandem.wire.shared_memory import SharedMemory

CAPACITY = 16 * ALIGNMENT


@given(st.lists(st.one_of(st.integers(1, CAPACITY), st.sampled_from(["free", "cancel"])), max_size=200))
def test_live_regions_never_overlap(steps):
    ring = Ring(CAPACITY)
    live: list[range] = []
    for step in steps:
        if step == "free":
            if live:
                live.pop(0)
                ring.free_through(ring.freed + 1)
        elif step == "cancel":
            if live:
                live.pop()
                ring.cancel()
        else:
            start = ring.allocate(step)
            if start is None:
                assert live, "an empty ring has room for everything"
                continue
            region = range(start, start + step)
            assert start % ALIGNMENT == 0
            assert region.stop <= CAPACITY
            assert all(region.stop <= other.start or other.stop <= region.start for other in live)
            live.append(region)


def test_the_whole_ring_can_be_used():
    ring = Ring(CAPACITY)
    assert [ring.allocate(ALIGNMENT) for _ in range(17)] == [*range(0, CAPACITY, ALIGNMENT), None]
    ring.free_through(2)
    assert ring.allocate(2 * ALIGNMENT) == 0
    assert ring.allocate(1) is None


def test_an_acknowledgement_of_what_was_never_sent_is_an_error():
    ring = Ring(CAPACITY)
    ring.allocate(1)
    ring.free_through(1)
    for count in (0, 2):
        with pytest.raises(ProtocolError, match="acknowledges"):
            ring.free_through(count)


@pytest.mark.parametrize("length", [0, CAPACITY + 1])
def test_a_region_that_can_never_fit_is_an_error(length):
    with pytest.raises(ValueError, match="fit"):
        Ring(CAPACITY).allocate(length)


def test_what_is_written_at_one_end_is_read_at_the_other():
    sender = ArenaSender(CAPACITY)
    receiver = ArenaReceiver(SharedMemory(os.dup(sender.memory.descriptor), CAPACITY))
    region = sender.reserve(5)
    region[:] = b"hello"
    assert bytes(receiver._view[:5]) == b"hello"
    sender.close()
    receiver.close()


def test_an_arena_beyond_the_limit_is_refused(open_descriptors):
    before = open_descriptors()
    sender = ArenaSender(CAPACITY)
    with pytest.raises(ProtocolError, match="limit"):
        ArenaReceiver(SharedMemory(os.dup(sender.memory.descriptor), MAX_ARENA_BYTES + 1))
    sender.close()
    assert open_descriptors() == before
