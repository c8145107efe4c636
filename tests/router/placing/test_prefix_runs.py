"""Runs of a chain and the guess at a worker's cache, against one block at a time."""

from __future__ import annotations

from collections import OrderedDict

from hypothesis import given, settings
from hypothesis import strategies as st

from tandem.kvstore.identity import BlockHash, Namespace, prefix_chain
from tandem.router.placing.prefix_runs import Recent, Run

ROOT = Namespace(b"r" * 32)
tokens = st.lists(st.integers(0, 1), min_size=1, max_size=12)


def chain(of: list[int]) -> list[BlockHash]:
    return prefix_chain(ROOT, of, 1)


@settings(deadline=None)
@given(tokens, tokens, st.data())
def test_what_two_chains_have_in_common(one: list[int], other: list[int], data: st.DataObject) -> None:
    left, right = chain(one), chain(other)
    same = next((i for i, (a, b) in enumerate(zip(left, right, strict=False)) if a != b), min(len(left), len(right)))
    if same:
        start = data.draw(st.integers(0, same - 1))
        position = data.draw(st.integers(start, same - 1))
        assert Run(start, left[start:]).common(right, position, position) == same - position


@settings(deadline=None)
@given(tokens, st.integers(0, 12), st.integers(0, 12), st.integers(0, 5))
def test_a_cut_run_is_the_same_blocks(of: list[int], low: int, high: int, start: int) -> None:
    low, high = sorted((min(low, len(of)), min(high, len(of))))
    blocks = chain(of)
    run = Run(start, blocks, 6)
    parts = run.cut(low, high)
    assert any(part is run for part in parts)
    assert [block for part in parts for block in part.blocks] == blocks
    assert [part.start - start for part in parts] == sorted({0, low, high} - {len(of)})
    assert all(part.entry == 6 and part.blocks for part in parts)


@settings(deadline=None)
@given(st.lists(tokens, max_size=25), st.integers(0, 20))
def test_it_keeps_what_least_recently_used_order_over_single_blocks_keeps(prompts: list[list[int]], most: int) -> None:
    recent, expected = Recent(most), OrderedDict[BlockHash, None]()
    for of in prompts:
        blocks = chain(of)
        left = [block for run in recent.use(blocks) for block in run.blocks]
        for block in reversed(blocks):
            expected[block] = None
            expected.move_to_end(block)
        gone = [expected.popitem(last=False)[0] for _ in range(len(expected) - most)]
        assert sorted(left) == sorted(gone)
        assert recent.blocks() == list(expected)
        recent.check_integrity()


def test_what_left_knows_its_depth() -> None:
    recent = Recent(3)
    blocks = chain([1, 0, 1, 0, 1])
    assert [(run.start, run.blocks) for run in recent.use(blocks)] == [(3, blocks[3:])]
