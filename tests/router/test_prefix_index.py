"""The prefix index against a slow obvious reference, and its bounds."""

from __future__ import annotations

import sys
from collections.abc import Sequence

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from tandem.kvstore.identity import BlockHash, Namespace, prefix_chain
from tandem.router.prefix_index import PrefixIndex

ROOT = Namespace(b"r" * 32)


def chain(*tokens: int) -> list[BlockHash]:
    return prefix_chain(ROOT, tokens, 1)


chains = st.lists(st.integers(0, 1), min_size=1, max_size=6).map(lambda tokens: chain(*tokens))


class Books(RuleBasedStateMachine):
    """Sets of blocks per worker say the same as the index's bits. Nothing is forgotten for lack of room here."""

    @initialize()
    def begin(self) -> None:
        self.index = PrefixIndex()
        self.present: dict[int, set[BlockHash]] = {}
        self.promised: dict[int, set[BlockHash]] = {}
        self.open: list[tuple[int, list[BlockHash], int]] = []

    @rule()
    def add(self) -> None:
        if len(self.present) < 4:
            slot = self.index.add(None)
            assert slot not in self.present
            self.present[slot], self.promised[slot] = set(), set()

    @rule(pick=st.integers(0, 9))
    def retire(self, pick: int) -> None:
        if self.present:
            slot = sorted(self.present)[pick % len(self.present)]
            self.index.retire(slot)
            del self.present[slot], self.promised[slot]
            self.open = [entry for entry in self.open if entry[0] != slot]

    @rule(pick=st.integers(0, 9), blocks=chains)
    def place(self, pick: int, blocks: list[BlockHash]) -> None:
        if self.present:
            slot = sorted(self.present)[pick % len(self.present)]
            start = next((a + b for s, a, b in self.index.match(blocks) if s == slot), 0)
            self.index.promise(slot, blocks, start)
            self.promised[slot].update(blocks[start:])
            self.open.append((slot, blocks, start))

    @rule(pick=st.integers(0, 9))
    def end(self, pick: int) -> None:
        if self.open:
            slot, blocks, start = self.open.pop(pick % len(self.open))
            self.index.ended(slot, blocks, start)
            self.promised[slot].difference_update(blocks[start:])

    @rule(pick=st.integers(0, 9), blocks=chains, first=st.integers(0, 5), stored=st.booleans())
    def event(self, pick: int, blocks: list[BlockHash], first: int, stored: bool) -> None:
        if self.present:
            slot = sorted(self.present)[pick % len(self.present)]
            if stored:
                self.index.stored(slot, blocks[first:])
                self.present[slot].update(blocks[first:])
            else:
                self.index.removed(slot, blocks[first:])
                self.present[slot].difference_update(blocks[first:])

    @invariant()
    def balanced(self) -> None:
        if hasattr(self, "index"):
            self.index.check_integrity()

    @rule(blocks=chains)
    def match(self, blocks: list[BlockHash]) -> None:
        expected = {}
        for slot in self.present:
            present = leading(blocks, self.present[slot])
            covered = leading(blocks, self.present[slot] | self.promised[slot])
            if covered:
                expected[slot] = (present, covered - present)
        found = self.index.match(blocks)
        assert {slot: (present, promised) for slot, present, promised in found} == expected
        assert len(found) == len(expected)


def leading(blocks: Sequence[BlockHash], held: set[BlockHash]) -> int:
    return next((i for i, block in enumerate(blocks) if block not in held), len(blocks))


TestBooks = Books.TestCase
TestBooks.settings = settings(max_examples=60, stateful_step_count=30, deadline=None)


def test_a_worker_without_events_is_believed_to_keep_its_last_blocks_first_ones_longest() -> None:
    index = PrefixIndex()
    slot = index.add(4)
    old, new = chain(1, 1, 1), chain(2, 2)
    for blocks in (old, new):
        index.promise(slot, blocks, 0)
        index.computed(slot, blocks)
        index.ended(slot, blocks, 0)
        index.check_integrity()
    assert index.match(new) == [(slot, 2, 0)]
    assert index.match(old) == [(slot, 2, 0)], "its last block had to go"
    index.computed(slot, chain(3, 3, 3, 3, 3, 3))
    assert index.match(new) == []
    assert index.match(chain(3, 3, 3, 3, 3, 3)) == [(slot, 4, 0)]


def test_the_same_list_asked_for_again_hears_of_every_change() -> None:
    index, blocks = PrefixIndex(), chain(1, 2)
    with_events, without = index.add(None), index.add(100)
    assert index.match(blocks) == index.match(blocks) == []
    index.promise(without, blocks, 0)
    assert index.match(blocks) == index.match(blocks) == [(without, 0, 2)]
    index.computed(without, blocks)
    assert index.match(blocks) == [(without, 2, 0)]
    index.stored(with_events, blocks[:1])
    assert index.match(blocks) == [(with_events, 1, 0), (without, 2, 0)]
    index.removed(with_events, blocks)
    assert index.match(blocks) == [(without, 2, 0)]
    index.retire(without)
    assert index.match(blocks) == []


def test_what_was_promised_and_never_came_is_forgotten() -> None:
    index = PrefixIndex()
    with_events, without = index.add(None), index.add(100)
    for slot in (with_events, without):
        index.promise(slot, chain(1, 2), 0)
    assert index.match(chain(1, 2, 3)) == [(with_events, 0, 2), (without, 0, 2)]
    for slot in (with_events, without):
        index.ended(slot, chain(1, 2), 0)
    assert index.match(chain(1, 2, 3)) == []
    assert len(index) == 0


def test_a_restarted_worker_starts_empty_and_its_place_is_used_again() -> None:
    index = PrefixIndex()
    slot, other = index.add(None), index.add(None)
    blocks = chain(*range(3000))
    index.stored(slot, blocks)
    index.stored(other, blocks[:10])
    index.retire(slot)
    assert index.match(blocks) == [(other, 10, 0)]
    again = index.add(None)
    assert again != slot, "old entries still have its bits"
    for _ in range(20):  # every change wipes a little
        index.stored(other, blocks[:10])
    assert len(index) == 10
    assert index.add(None) == slot
    assert index.match(blocks) == [(other, 10, 0)]
    index.check_integrity()


def test_renewed_for_a_snapshot() -> None:
    index = PrefixIndex()
    slot = index.add(None)
    index.stored(slot, chain(1, 2))
    slot = index.renew(slot)
    assert index.match(chain(1, 2)) == []
    index.stored(slot, chain(1))
    assert index.match(chain(1, 2)) == [(slot, 1, 0)]


@settings(deadline=None)
@given(st.lists(st.tuples(chains, st.integers(0, 2), st.booleans()), max_size=40), st.integers(1, 8))
def test_it_never_grows_beyond_its_bound(prompts: list[tuple[list[BlockHash], int, bool]], most: int) -> None:
    index = PrefixIndex(most)
    slots = [index.add(None), index.add(3), index.add(1000)]
    for blocks, slot, stored in prompts:
        if stored and slot == 0:
            index.stored(slots[0], blocks)
        else:
            index.promise(slots[slot], blocks, 0)
            index.computed(slots[slot], blocks)
        index.check_integrity()


def test_what_is_used_outlives_what_is_not() -> None:
    index = PrefixIndex(2000)
    slot = index.add(None)
    hot = chain(*range(100))
    index.stored(slot, hot)
    for i in range(100):
        index.stored(slot, chain(*[10_000 + i] * 100))
        index.promise(slot, hot, 100)
        index.ended(slot, hot, 100)
    assert index.match(hot) == [(slot, 100, 0)]
    assert len(index) <= 2000


@pytest.mark.parametrize("workers", [1, 40])
def test_memory_per_block_is_small(workers: int) -> None:
    index = PrefixIndex()
    slots = [index.add(None) for _ in range(workers)]
    count = 20_000
    blocks = chain(*range(count))
    for slot in slots:
        index.stored(slot, blocks)
    values = {id(entry): entry for entry in index._entries.values()}
    held = sys.getsizeof(index._entries) + sum(map(sys.getsizeof, values.values()))
    assert held / count < 100, "bytes beyond the hash itself"
