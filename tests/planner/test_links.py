"""What a hand-over costs over each link: learned from what arrives and what fails, forgotten slowly, tried again."""

from __future__ import annotations

import itertools
import random
from collections.abc import Callable

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tandem.planner.links import HALF_LIFE_S, MAX_LINKS, MAX_S, Links

NEAR, FAR = (5e-3, 1e-6), (6e-3, 1e-6)
LINK, OTHER = ("a", "b"), ("a", "c")


def slow(tokens: int) -> float:
    """20 Mbit/s with 30 KB per token."""
    return 0.05 + 0.012 * tokens


def taught(law: Callable[[int], float] = slow, count: int = 5) -> Links:
    links, sizes = Links(NEAR, FAR), random.Random(3)
    for second in range(count):
        tokens = sizes.randrange(50, 400)
        links.observe(LINK, tokens, law(tokens), float(second))
    return links


def test_each_link_is_learned_by_itself_and_begins_with_a_guess_of_its_kind() -> None:
    links = taught()
    assert links.seconds(LINK, 128, 5.0) == pytest.approx(slow(128), rel=0.2)
    assert links.seconds(OTHER, 128, 5.0) == pytest.approx(FAR[0] + 128 * FAR[1])
    assert links.seconds(("b", "a"), 128, 5.0) == links.seconds(OTHER, 128, 5.0), "the other way is another link"
    assert links.seconds(("a", "a"), 128, 5.0) == pytest.approx(NEAR[0] + 128 * NEAR[1])


def test_one_hand_over_is_enough_to_leave_a_new_link_alone() -> None:
    links = taught(count=1)
    assert links.seconds(LINK, 200, 1.0) > 0.5


def test_a_link_that_becomes_slow_is_believed_after_two_hand_overs() -> None:
    links = taught(lambda tokens: 0.01, count=50)
    links.observe(LINK, 200, slow(200), 50.0)
    assert links.seconds(LINK, 200, 50.0) < 0.1, "one may be an accident"
    links.observe(LINK, 200, slow(200), 51.0)
    assert links.seconds(LINK, 200, 51.0) > slow(200) / 2


def test_a_hand_over_that_was_given_up_would_have_taken_at_least_as_long() -> None:
    links = Links(NEAR, FAR)
    links.failed(LINK, 200, 3.0, 0.0)
    assert links.seconds(LINK, 200, 0.0) == pytest.approx(3.0, rel=0.2)
    links.failed(LINK, 200, 0.5, 1.0)
    assert links.seconds(LINK, 200, 1.0) > 2.5, "a link that fails early is not quick"


def test_a_slow_link_is_forgotten_slowly_and_tried_by_one_at_a_time() -> None:
    links = taught()
    believed = [links.seconds(LINK, 100, 5.0 + pause * HALF_LIFE_S) for pause in range(12)]
    assert believed == sorted(believed, reverse=True)
    assert believed[1] == pytest.approx(believed[0] / 2, rel=0.1)
    assert believed[11] < 0.02
    links.tried(LINK, 5.0 + 11 * HALF_LIFE_S)
    assert links.seconds(LINK, 100, 6.0 + 11 * HALF_LIFE_S) == pytest.approx(believed[0], rel=0.05)


def test_a_repaired_link_comes_back_with_the_first_try() -> None:
    links = taught(count=50)
    now = 50.0 + 8 * HALF_LIFE_S
    links.tried(LINK, now)
    links.observe(LINK, 100, 0.008, now)
    assert links.seconds(LINK, 100, now) < 0.1


def test_a_link_that_stays_slow_is_tried_less_and_less_often() -> None:
    links, now, threshold, tries = taught(), 5.0, 0.1, []
    while now < 86_400.0:
        if links.seconds(LINK, 100, now) < threshold:
            links.tried(LINK, now)
            tries.append(now)
            links.observe(LINK, 100, slow(100), now + slow(100))
        now += 10.0
    pauses = [later - earlier for earlier, later in itertools.pairwise(tries)]
    assert len(tries) < 15
    assert pauses[-1] > 10 * pauses[0]


def test_impossible_times_teach_nothing_and_links_are_bounded() -> None:
    links = Links(NEAR, FAR)
    for seconds in (0.0, -1.0, float("nan"), float("inf")):
        links.observe(LINK, 100, seconds, 0.0)
    assert links.seconds(LINK, 100, 0.0) == FAR[0] + 100 * FAR[1]
    links.observe(LINK, 100, 9.0, 0.0)
    for number in range(MAX_LINKS):
        links.observe(("a", str(number)), 100, 9.0, 0.0)
    assert links.seconds(LINK, 100, 0.0) == FAR[0] + 100 * FAR[1], "used longest ago"
    assert links.seconds(("a", "0"), 100, 0.0) > 1.0


@given(st.lists(st.tuples(st.integers(1, 10**6), st.floats(), st.floats(0, 1e4)), min_size=1, max_size=80))
def test_whatever_is_measured_costs_are_bounded_and_grow_with_the_tokens(
    hand_overs: list[tuple[int, float, float]],
) -> None:
    links, now = Links(NEAR, FAR), 0.0
    for tokens, seconds, pause in hand_overs:
        now += pause
        links.observe(LINK, tokens, seconds, now)
        longest = max(tokens for tokens, _, _ in hand_overs)
        assert 0.0 <= links.seconds(LINK, 1, now) <= links.seconds(LINK, longest, now)
        assert links.seconds(LINK, 1, now) < 10 * MAX_S
