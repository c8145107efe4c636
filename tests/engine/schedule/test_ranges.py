"""Ranges of tokens against plain sets of positions."""

from __future__ import annotations

from hypothesis import example, given
from hypothesis import strategies as st

from tandem.engine.schedule.ranges import EMPTY, TokenRanges

MOST = 40
PLACES = st.integers(0, MOST)
PARTS = st.lists(st.tuples(PLACES, PLACES), max_size=6)


def positions(ranges: TokenRanges) -> set[int]:
    """Checks that `ranges` is in order."""
    flat = [place for part in ranges for place in part]
    assert flat == sorted(set(flat)), "sorted, none empty, a gap between any two"
    return {token for first, end in ranges for token in range(first, end)}


def tokens(parts: list[tuple[int, int]]) -> set[int]:
    return {token for first, end in parts for token in range(first, end)}


@given(PARTS, PARTS)
@example([(0, 3), (3, 5)], [])
@example([(5, 9), (0, 6)], [(4, 2)])
def test_unions_hold_what_either_has(left: list[tuple[int, int]], right: list[tuple[int, int]]) -> None:
    ranges = TokenRanges.of(*left)
    assert positions(ranges) == tokens(left)
    assert positions(ranges.union(right)) == tokens(left) | tokens(right)
    assert ranges.union(right) == TokenRanges.of(*right).union(left), "equal sets are equal values"


@given(PARTS, PLACES, PLACES)
def test_a_window_is_split_into_what_is_there_and_the_gaps(parts: list[tuple[int, int]], first: int, end: int) -> None:
    ranges, there, window = TokenRanges.of(*parts), tokens(parts), set(range(first, end))
    assert positions(ranges.within(first, end)) == there & window
    assert positions(ranges.gaps(first, end)) == window - there


@given(PARTS, PLACES)
def test_counts_ends_and_first_gaps(parts: list[tuple[int, int]], start: int) -> None:
    ranges, there = TokenRanges.of(*parts), tokens(parts)
    assert (ranges.count, ranges.end, bool(ranges)) == (len(there), max(there, default=-1) + 1, bool(there))
    assert ranges.first_gap(start) == next(token for token in range(start, MOST + 2) if token not in there)
    assert ranges.first_gap() == ranges.first_gap(0)
    assert positions(TokenRanges.up_to(start)) == set(range(start))


@given(PARTS, st.integers(-1, MOST))
def test_the_leading_tokens_are_the_lowest(parts: list[tuple[int, int]], count: int) -> None:
    ranges = TokenRanges.of(*parts)
    assert positions(ranges.leading(count)) == set(sorted(positions(ranges))[: max(count, 0)])


def test_nothing_is_one_value() -> None:
    assert TokenRanges.up_to(0) == TokenRanges.of((3, 3), (5, 2)) == TokenRanges.up_to(7).within(9, 12) == EMPTY
