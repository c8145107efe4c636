"""The order of a batch against what it promises: every shared prefix computed once, decode-heavy groups first."""

from __future__ import annotations

import random
from collections.abc import Callable

from hypothesis import given, settings
from hypothesis import strategies as st

from tandem.router.batch.order import BLOCK_TOKENS, Item, LineOrder, prompt_keys, shared_blocks

Prompts = list[list[int]]


@st.composite
def prompts(draw: st.DrawFn) -> Prompts:
    """Few different blocks, so that prefixes are shared at every depth; ragged ends."""
    blocks = st.lists(st.integers(0, 2), max_size=5)
    made = []
    for path in draw(st.lists(blocks, max_size=14)):
        tail = draw(st.integers(0, BLOCK_TOKENS - 1))
        made.append([token for block in path for token in [block] * BLOCK_TOKENS] + [7] * tail)
    return made


def blocks_of(prompt: list[int]) -> set[tuple[int, ...]]:
    """The obvious form of keys: every prefix of whole blocks; the first token of a block stands for it."""
    return {tuple(prompt[:end:BLOCK_TOKENS]) for end in range(BLOCK_TOKENS, len(prompt) + 1, BLOCK_TOKENS)}


def items_of(given: Prompts, outputs: Callable[[int], int] = lambda index: 10) -> list[Item]:
    return [Item(prompt_keys(prompt), len(prompt), outputs(index)) for index, prompt in enumerate(given)]


@settings(deadline=None, max_examples=40)
@given(prompts())
def test_shared_blocks_is_what_comparing_prompts_gives(given: Prompts) -> None:
    for left in given:
        for right in given:
            expected = len(blocks_of(left) & blocks_of(right))
            assert shared_blocks(prompt_keys(left), prompt_keys(right)) == expected


@settings(deadline=None, max_examples=50)
@given(prompts(), st.integers(0, 2**32))
def test_every_item_runs_once_and_no_block_is_computed_twice(given: Prompts, seed: int) -> None:
    rng = random.Random(seed)
    plan = LineOrder(items_of(given))
    cached: set[tuple[int, ...]] = set()
    computing: dict[int, set[tuple[int, ...]]] = {}
    waiting = set(range(len(given)))
    blocks = [blocks_of(prompt) for prompt in given]
    while waiting or computing:
        if computing and rng.random() < 0.5:
            index = rng.choice(sorted(computing))
            cached |= computing.pop(index)
            plan.computed(index)
            continue
        index_or_none = plan.next()
        if index_or_none is None:
            assert computing, "items wait for nobody"
            continue
        index = index_or_none
        assert index in waiting
        if rng.random() < 0.1:
            plan.put_back(index)
            continue
        waiting.discard(index)
        mine = blocks[index] - cached
        for other in computing.values():
            assert not mine & other
        computing[index] = mine


@settings(deadline=None, max_examples=50)
@given(prompts())
def test_one_at_a_time_the_same_prefix_is_never_left_and_taken_up_again(given: Prompts) -> None:
    plan = LineOrder(items_of(given))
    order: list[int] = []
    while (index := plan.next()) is not None:
        plan.computed(index)
        order.append(index)
    assert sorted(order) == list(range(len(given)))
    runs = [blocks_of(given[index]) for index in order]
    for prefix in set().union(*runs):
        places = [place for place, blocks in enumerate(runs) if prefix in blocks]
        assert places == list(range(places[0], places[-1] + 1))


@settings(deadline=None, max_examples=50)
@given(prompts(), st.integers(0, 2**32))
def test_groups_with_more_to_decode_for_each_token_to_compute_go_first(given: Prompts, seed: int) -> None:
    rng = random.Random(seed)
    outputs = [rng.randrange(1, 500) for _ in given]
    plan = LineOrder(items_of(given, outputs.__getitem__))
    order: list[int] = []
    while (index := plan.next()) is not None:
        plan.computed(index)
        order.append(index)
    shares: list[float] = []
    while order:
        first = given[order[0]]
        top = (first[0],) if len(first) >= BLOCK_TOKENS else None
        group = [index for index in order if top is not None and top in blocks_of(given[index])] or [order[0]]
        order = [index for index in order if index not in group]
        blocks = set().union(*(blocks_of(given[index]) for index in group))
        ends = sum(len(given[index]) % BLOCK_TOKENS for index in group)
        shares.append(sum(outputs[index] for index in group) / max(1, BLOCK_TOKENS * len(blocks) + ends))
    assert shares == sorted(shares, reverse=True)


def test_the_first_of_a_group_goes_ahead_and_other_groups_fill_the_wait() -> None:
    first, second = [1] * (4 * BLOCK_TOKENS), [2] * (4 * BLOCK_TOKENS)
    plan = LineOrder(items_of([[*first, 5], [*first, 6], [*second, 5], [*second, 6]]))
    leaders = [plan.next(), plan.next()]
    assert plan.next() is None
    assert plan.awaited(leaders[0] or 0)
    plan.computed(leaders[0] or 0)
    follower = plan.next()
    assert follower is not None
    assert follower // 2 == (leaders[0] or 0) // 2
    assert plan.next() is None


def test_prompts_of_different_salts_share_nothing() -> None:
    prompt = [3] * (2 * BLOCK_TOKENS)
    assert shared_blocks(prompt_keys(prompt, "a"), prompt_keys(prompt, "b")) == 0
    assert shared_blocks(prompt_keys(prompt, "a"), prompt_keys(prompt, "a")) == 2


def test_a_deep_chain_of_turns_needs_no_recursion() -> None:
    keys = random.Random(1).randbytes(8 * 1500)
    plan = LineOrder([Item(keys[: 8 * length], BLOCK_TOKENS * length, 10) for length in range(1, 1501)])
    order = []
    while (index := plan.next()) is not None:
        plan.computed(index)
        order.append(index)
    assert sorted(order) == list(range(1500))


def test_fifty_thousand_requests_are_ordered() -> None:
    rng = random.Random(1)
    groups = [rng.randbytes(8 * 30) for _ in range(500)]
    items = [Item(rng.choice(groups) + rng.randbytes(16), 2048, rng.randrange(1, 512)) for _ in range(50_000)]
    plan = LineOrder(items)
    seen = 0
    while (index := plan.next()) is not None:
        plan.computed(index)
        seen += 1
    assert seen == len(items)
