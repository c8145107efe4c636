"""What a sequence met with since its last token, and how long it rests before the next retry."""

from __future__ import annotations

from itertools import pairwise

import pytest

from tandem.router.fleet.retry import FIRST_PAUSE_S, LONGEST_PAUSE_S, MAX_LOSSES, Setbacks, pause_s


def test_a_pause_doubles_from_the_first_to_the_longest() -> None:
    longest = [pause_s(retries, 1.0) for retries in range(10)]
    assert longest[0] == FIRST_PAUSE_S
    for shorter, longer in pairwise(longest):
        assert longer == min(2 * shorter, LONGEST_PAUSE_S)
    assert longest[-1] == LONGEST_PAUSE_S


def test_a_sequence_pauses_longer_each_time_until_it_has_a_token() -> None:
    setbacks = Setbacks()
    assert [setbacks.next_pause_s(0.5) for _ in range(3)] == [pause_s(retries, 0.5) for retries in range(3)]
    setbacks.over()
    assert setbacks.next_pause_s(0.5) == pause_s(0, 0.5)


@pytest.mark.parametrize("first", [0.0, 7.0])
def test_trouble_lasts_since_the_first_setback_until_the_next_token(first: float) -> None:
    setbacks = Setbacks()
    for now in (first, first + 1.0, first + 5.0):
        setbacks.begin(now)
    assert setbacks.since == first
    setbacks.over()
    assert setbacks.since is None
    setbacks.begin(first + 9.0)
    assert setbacks.since == first + 9.0


def test_what_kills_one_worker_after_the_other_is_given_up() -> None:
    setbacks = Setbacks()
    assert [setbacks.lost() for _ in range(MAX_LOSSES)] == [True] * (MAX_LOSSES - 1) + [False]
    setbacks.over()
    assert setbacks.lost()


def test_full_workers_are_asked_again_and_those_that_failed_are_not() -> None:
    setbacks = Setbacks()
    setbacks.left(("gone", 1))
    setbacks.full(("full", 1))
    assert setbacks.avoid == {("gone", 1), ("full", 1)}
    setbacks.ask_all_again()
    assert setbacks.avoid == {("gone", 1)}
    setbacks.full(("full", 1))
    setbacks.over()
    assert setbacks.avoid == {("gone", 1)}
