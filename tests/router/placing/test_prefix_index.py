"""The prefix index against a slow obvious reference, and its bounds."""

from __future__ import annotations

import sys
from collections import OrderedDict
from collections.abc import Sequence

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from tandem.kvstore.identity import BlockHash, Namespace, prefix_chain
from tandem.router.placing.prefix_index import PrefixIndex
from tandem.router.placing.prefix_runs import Run

ROOT = Namespace(b"r" * 32)


def chain(*tokens: int) -> list[BlockHash]:
    return prefix_chain(ROOT, tokens, 1)


chains = st.lists(st.integers(0, 1), min_size=1, max_size=6).map(lambda tokens: chain(*tokens))


class Books(RuleBasedStateMachine):
    """Sets of blocks per worker say the same as the index's bits. Nothing is forgotten for lack of room here."""

    max_blocks = 1000
    capacity = 5
    """Blocks that a worker without events keeps."""

    @initialize()
    def begin(self) -> None:
        self.index = PrefixIndex(self.max_blocks)
        self.present: dict[int, OrderedDict[BlockHash, None]] = {}
        self.promised: dict[int, set[BlockHash]] = {}
        self.guessed: set[int] = set()
        self.open: list[tuple[int, list[BlockHash], int]] = []

    @rule(guessed=st.booleans())
    def add(self, guessed: bool) -> None:
        if len(self.present) < 4:
            slot = self.index.add(self.capacity if guessed else None)
            assert slot not in self.present
            self.present[slot], self.promised[slot] = OrderedDict(), set()
            self.guessed.update([slot] * guessed)

    @rule(pick=st.integers(0, 9))
    def retire(self, pick: int) -> None:
        if self.present:
            slot = sorted(self.present)[pick % len(self.present)]
            self.index.retire(slot)
            del self.present[slot], self.promised[slot]
            self.guessed.discard(slot)
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
    def compute(self, pick: int) -> None:
        if self.open:
            slot, blocks, _ = self.open[pick % len(self.open)]
            self.index.computed(slot, blocks)
            if slot in self.guessed:
                present = self.present[slot]
                self.promised[slot].difference_update(blocks)
                for block in reversed(blocks):
                    present[block] = None
                    present.move_to_end(block)
                while len(present) > self.capacity:
                    present.popitem(last=False)

    @rule(pick=st.integers(0, 9))
    def end(self, pick: int) -> None:
        if self.open:
            slot, blocks, start = self.open.pop(pick % len(self.open))
            self.index.ended(slot, blocks, start)
            self.promised[slot].difference_update(blocks[start:])

    @rule(pick=st.integers(0, 9), blocks=chains, first=st.integers(0, 5), stored=st.booleans(), back=st.booleans())
    def event(self, pick: int, blocks: list[BlockHash], first: int, stored: bool, back: bool) -> None:
        told = sorted(self.present.keys() - self.guessed)
        if told:
            slot = told[pick % len(told)]
            named = blocks[first:][:: -1 if back else 1]
            if stored:
                self.index.stored(slot, named)
                self.present[slot].update(dict.fromkeys(named))
            else:
                self.index.removed(slot, named)
                for block in named:
                    self.present[slot].pop(block, None)

    @invariant()
    def balanced(self) -> None:
        if hasattr(self, "index"):
            self.index.check_integrity()

    def expected(self, blocks: list[BlockHash]) -> dict[int, tuple[int, int]]:
        expected = {}
        for slot, held in self.present.items():
            present = leading(blocks, set(held))
            covered = leading(blocks, set(held) | self.promised[slot])
            if covered:
                expected[slot] = (present, covered - present)
        return expected

    @rule(blocks=chains)
    def match(self, blocks: list[BlockHash]) -> None:
        found = self.index.match(blocks)
        assert {slot: (present, promised) for slot, present, promised in found} == self.expected(blocks)
        assert len(found) == len(self.expected(blocks))


class ForgetfulBooks(Books):
    """What does not fit is forgotten: of the rest nothing is made up."""

    max_blocks = 8

    @rule(blocks=chains)
    def match(self, blocks: list[BlockHash]) -> None:
        expected = self.expected(blocks)
        for slot, present, promised in self.index.match(blocks):
            assert present <= expected[slot][0]
            assert present + promised <= sum(expected[slot])


def leading(blocks: Sequence[BlockHash], held: set[BlockHash]) -> int:
    return next((i for i, block in enumerate(blocks) if block not in held), len(blocks))


TestBooks = Books.TestCase
TestBooks.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)
TestForgetfulBooks = ForgetfulBooks.TestCase
TestForgetfulBooks.settings = settings(max_examples=40, stateful_step_count=40, deadline=None)


def runs(index: PrefixIndex) -> int:
    return len({value for value in index._entries.values() if isinstance(value, Run)})


def test_a_conversation_is_few_runs_however_many_turns_and_evictions_it_has_had() -> None:
    index = PrefixIndex()
    here, there = index.add(None), index.add(None)
    whole = chain(*range(300))
    for turn in range(100, 301, 20):
        prompt = whole[:turn]
        start = next((a + b for slot, a, b in index.match(prompt) if slot == here), 0)
        index.promise(here, prompt, start)
        for first in range(start, turn, 7):
            index.stored(here, prompt[first : first + 7])
        index.ended(here, prompt, start)
        for block in prompt[start:]:
            index.stored(there, [block])
    assert index.match(whole) == [(here, 300, 0), (there, 300, 0)]
    for block in reversed(whole[120:]):
        index.removed(there, [block])
    assert index.match(whole) == [(there, 120, 0), (here, 300, 0)]
    index.promise(here, whole, 300)
    assert runs(index) == 2
    index.check_integrity()


def test_events_without_their_prompts_become_runs_with_the_next_prompt() -> None:
    index = PrefixIndex()
    slot = index.add(None)
    blocks = chain(*range(50))
    index.stored(slot, sorted(blocks))
    assert (index.match(blocks), runs(index)) == ([(slot, 50, 0)], 0)
    index.promise(slot, blocks, 50)
    assert (index.match(blocks), runs(index)) == ([(slot, 50, 0)], 1)
    index.check_integrity()


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


def test_it_shrinks_little_by_little_and_counts_what_did_not_fit() -> None:
    index = PrefixIndex(8000)
    slot = index.add(None)
    held = chain(*range(8000))
    index.stored(slot, held)
    index.resize(1000)
    sizes = []
    while len(index) > 1000:
        index.promise(slot, held[-1:], 1)
        index.check_integrity()
        sizes.append(len(index))
    assert len(sizes) > 10, "no change forgets all of it"
    assert index.forgotten == 8000 - len(index)
    index.resize(3000)
    index.stored(slot, chain(9, *range(2500)))
    assert 2500 < len(index) <= 3000
    assert index.forgotten == 8000 + 2501 - len(index)


def test_wiping_a_lost_worker_costs_the_others_nothing() -> None:
    index = PrefixIndex(8000)
    lost, slot = index.add(None), index.add(None)
    kept = chain(1, *range(2000))
    index.stored(slot, kept)
    index.stored(lost, chain(2, *range(3999)))
    index.retire(lost)
    index.resize(3000)
    for _ in range(30):
        index.promise(slot, kept[:1], 1)
    assert index.match(kept) == [(slot, len(kept), 0)]
    assert (len(index), index.max_blocks, index.forgotten) == (len(kept), 3000, 0)
