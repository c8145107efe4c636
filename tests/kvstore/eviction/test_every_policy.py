"""Each policy against its slow reference, and what all of them promise: the product's, and those that `bench/` compares
with them."""

from __future__ import annotations

import gc
import random
from typing import TypeAlias

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from bench.policies import POLICIES
from tandem.common.errors import ConfigError
from tandem.kvstore import eviction
from tandem.kvstore.eviction import DEFAULT_POLICY
from tandem.kvstore.eviction.ghosts import Ghosts
from tandem.kvstore.interfaces import ObjectInfo, ObjectKey
from tests.kvstore.eviction.references import REFERENCES

every_policy = pytest.mark.parametrize("name", POLICIES)


def key(number: int) -> ObjectKey:
    return ObjectKey(number.to_bytes(32, "big"))


def info(size: int, recompute_s: float = 0.0, start_position: int = 0) -> ObjectInfo:
    return ObjectInfo(size=size, num_tokens=1, recompute_s=recompute_s, start_position=start_position)


def anything(_key: ObjectKey) -> bool:
    return True


Step: TypeAlias = tuple[str, int, int, float, set[int]]
STEP = st.tuples(
    st.sampled_from(["use", "use", "use", "hit", "remove", "evict"]),
    st.integers(0, 24),
    st.integers(1, 6),
    st.sampled_from([0.0, 1.0, 5.0]),
    st.sets(st.integers(0, 24), max_size=8),
)


def compare(name: str, steps: list[Step], capacity: int) -> None:
    policy, reference = POLICIES[name](capacity), REFERENCES[name](capacity)
    resident: dict[ObjectKey, int] = {}
    for operation, number, size, recompute_s, leased in steps:
        held = {key(each) for each in leased}

        def may_leave(candidate: ObjectKey, held: set[ObjectKey] = held) -> bool:
            return candidate not in held

        if operation == "remove":
            policy.remove(key(number))
            reference.remove(key(number))
            resident.pop(key(number), None)
        elif operation == "evict":
            victim = policy.evict(may_leave)
            assert victim == reference.evict(may_leave)
            assert (victim is None) == (resident.keys() <= held)
            if victim is not None:
                del resident[victim]
        elif operation == "hit" or key(number) in resident:
            policy.hit(key(number))
            reference.hit(key(number))
        else:
            while resident and sum(resident.values()) + size > capacity:
                victim = policy.evict(may_leave)
                assert victim == reference.evict(may_leave)
                if victim is None:
                    break
                del resident[victim]
            described = info(size, recompute_s, start_position=number % 5)
            policy.insert(key(number), described)
            reference.insert(key(number), described)
            resident[key(number)] = size
        assert len(policy) == len(reference) == len(resident)


READ_OFTEN: list[Step] = [
    ("use", 1, 1, 0.0, set()),
    *[("hit", 1, 1, 0.0, set[int]())] * 58,
    ("evict", 0, 1, 0.0, set()),
]
"""The only object of a tier waits in the small queue with many reads."""


@every_policy
@settings(max_examples=20, deadline=None)
@example(steps=READ_OFTEN, capacity=20)
@given(steps=st.lists(STEP, min_size=20, max_size=80), capacity=st.integers(10, 60))
def test_it_decides_as_the_obvious_code_does(name: str, steps: list[Step], capacity: int) -> None:
    compare(name, steps, capacity)


@pytest.mark.slow
@every_policy
@settings(max_examples=120, deadline=None)
@given(steps=st.lists(STEP, min_size=30, max_size=200), capacity=st.integers(10, 60))
def test_it_decides_as_the_obvious_code_does_for_long(name: str, steps: list[Step], capacity: int) -> None:
    compare(name, steps, capacity)


@every_policy
def test_everything_leaves_once(name: str) -> None:
    policy = POLICIES[name](100)
    for number in range(100):
        policy.insert(key(number), info(1))
        policy.hit(key(number // 2))
    assert {policy.evict(anything) for _ in range(100)} == {key(number) for number in range(100)}
    assert policy.evict(anything) is None
    assert len(policy) == 0


@every_policy
def test_an_object_that_may_not_leave_stays_and_can_leave_later(name: str) -> None:
    policy = POLICIES[name](10)
    for number in range(10):
        policy.insert(key(number), info(1))
    assert [policy.evict(lambda each: each == key(7)) for _ in range(2)] == [key(7), None]
    assert len(policy) == 9


@every_policy
def test_unknown_keys_are_ignored(name: str) -> None:
    policy = POLICIES[name](10)
    policy.hit(key(1))
    policy.remove(key(1))
    assert policy.evict(anything) is None


@every_policy
def test_memory_stays_bounded(name: str) -> None:
    """Two million bytes of churn through a tier of 2,000: what is remembered does not grow with it."""
    policy, rng = POLICIES[name](2000), random.Random(1)
    resident: set[int] = set()

    def churn(first: int, count: int) -> None:
        for number in range(first, first + count):
            policy.insert(key(number), info(1))
            resident.add(number)
            policy.hit(key(rng.randrange(max(number - 3000, 0), number + 1)))
            if len(resident) > 2000:
                victim = policy.evict(anything)
                assert victim is not None
                resident.discard(int.from_bytes(victim, "big"))

    def collect() -> None:
        """Twice: tuples that hold tuples are untracked one level at a time."""
        gc.collect()
        gc.collect()

    churn(0, 20_000)
    collect()
    before = len(gc.get_objects())
    churn(20_000, 20_000)
    collect()
    assert len(gc.get_objects()) < before + 6000
    assert len(policy) == len(resident) == 2000


def test_cost_keeps_what_is_dear_to_compute() -> None:
    policy = POLICIES["cost"](100)
    for number in range(100):
        policy.insert(key(number), info(1, recompute_s=8.0 if number % 4 == 0 else 1.0))
    victims = [policy.evict(anything) for _ in range(75)]
    assert all(victim is not None and int.from_bytes(victim, "big") % 4 for victim in victims)


def test_cost_lets_the_tail_of_a_chain_leave_before_its_head() -> None:
    policy = POLICIES["cost"](100)
    for number in range(40):
        policy.insert(key(number), info(1, start_position=256 * (number % 20)))
    assert [policy.evict(anything) for _ in range(4)] == [key(19), key(39), key(18), key(38)]


def test_cost_orders_chains_within_half_of_a_small_tier_and_an_eighth_of_a_large_one() -> None:
    for capacity, batch in ((100, 50), (800, 400), (2000, 512), (8000, 1000)):
        policy = POLICIES["cost"](capacity)
        for number in range(batch + 40):
            policy.insert(key(number), info(1, start_position=number))
        assert [policy.evict(anything) for _ in range(batch)] == [key(number) for number in reversed(range(batch))]


def test_marking_survives_predictions_that_are_all_wrong() -> None:
    """Objects that look popular and never return against a loop that looks new: no worse than twice LRU's misses."""

    def misses(name: str) -> int:
        policy, resident, count = POLICIES[name](20), set[ObjectKey](), 0
        for turn in range(2000):
            for each in (key(turn % 12), *([key(1000 + turn)] * 3)):
                if each in resident:
                    policy.hit(each)
                    continue
                count += 1
                if len(resident) == 20:
                    victim = policy.evict(anything)
                    assert victim is not None
                    resident.discard(victim)
                policy.insert(each, info(1))
                resident.add(each)
        return count

    assert misses("marking") <= 2 * misses("lru")


@every_policy
def test_what_is_remembered_can_be_bounded_at_any_time(name: str) -> None:
    policy = POLICIES[name](20)
    tables = [each for each in vars(policy).values() if isinstance(each, Ghosts)]
    assert bool(tables) == (name != "lru")
    for most in (100, 6, 0, 9):
        policy.remember(most)
        assert sum(map(len, tables)) <= most
        for number in range(100):
            policy.insert(key(number), info(1))
            policy.hit(key(max(number - 3, 0)))
            if len(policy) > 20:
                assert policy.evict(anything) is not None
            assert sum(map(len, tables)) <= most


def test_an_unknown_policy_is_refused_with_the_names_there_are() -> None:
    with pytest.raises(ConfigError, match=r"kv_eviction is 'cost'.*lru, reuse"):
        eviction.make_policy("cost", 10)
    assert DEFAULT_POLICY in eviction.POLICIES
