"""The default policy: what it learns, beside a reference that keeps every observation."""

from __future__ import annotations

import itertools
import math
import random

import pytest
from hypothesis import Phase, example, given, settings
from hypothesis import strategies as st

from tandem.kvstore.eviction import make_policy, reuse
from tandem.kvstore.eviction.reuse import USE_CLASSES, Reuse, ReuseRates, class_of, exposure, falling_rates
from tandem.kvstore.interfaces import ObjectInfo, ObjectKey
from tests.kvstore.eviction.references import SlowReuse


def key(number: int) -> ObjectKey:
    return ObjectKey(number.to_bytes(32, "big"))


def info(size: int = 1, recompute_s: float = 0.0, start_position: int = 0) -> ObjectInfo:
    return ObjectInfo(size=size, num_tokens=1, recompute_s=recompute_s, start_position=start_position)


def anything(_key: ObjectKey) -> bool:
    return True


@settings(max_examples=30, deadline=None, phases=[Phase.explicit, Phase.reuse, Phase.generate])
@given(seed=st.integers(0, 2**32), capacity=st.integers(10, 80), chunks=st.integers(12, 60), ghosts=st.integers(0, 30))
@example(seed=81171, capacity=15, chunks=42, ghosts=21)
def test_it_decides_as_the_obvious_code_does_while_it_learns(
    seed: int, capacity: int, chunks: int, ghosts: int
) -> None:
    """Rates are sums of floats in another order, so values within a hair of the least count as the least."""
    rng = random.Random(seed)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(reuse, "LEAST_GHOSTS", ghosts)
        patch.setattr(reuse, "LEAST_OBSERVATIONS", 5)
        patch.setattr(reuse, "DOUBT", 0.5)
        policy, reference = Reuse(capacity), SlowReuse(capacity)
        resident: dict[ObjectKey, int] = {}
        for _ in range(150):
            number, size = min(rng.randrange(chunks), rng.randrange(chunks)), rng.randint(1, 4)
            if key(number) in resident:
                operation = rng.choice(["hit", "hit", "hit", "remove"])
                getattr(policy, operation)(key(number))
                getattr(reference, operation)(key(number))
                if operation == "remove":
                    del resident[key(number)]
                continue
            while sum(resident.values()) + size > capacity:
                held = {each for each in resident if rng.random() < 0.1}
                values = reference.values(lambda each, held=held: each not in held)  # type: ignore[misc]
                victim = policy.evict(lambda each, held=held: each not in held)  # type: ignore[misc]
                if victim is None:
                    assert not values
                    continue
                least = min(values.values())
                assert math.isclose(values[victim][0], least[0], rel_tol=1e-9)
                if least[0] == 0.0 or not reference.learned:
                    assert values[victim] == least
                reference.left(victim)
                del resident[victim]
            chunk = info(size, rng.choice([0.0, 1.0, 5.0]), number % 7)
            policy.insert(key(number), chunk)
            reference.insert(key(number), chunk)
            resident[key(number)] = size
            assert len(policy) == len(reference) == len(resident)


@given(st.lists(st.tuples(st.floats(0, 100), st.floats(0.01, 100)), min_size=1, max_size=30))
def test_falling_rates_fall_and_keep_the_sum(observed: list[tuple[float, float]]) -> None:
    uses, times = [use for use, _ in observed], [time for _, time in observed]
    rates = falling_rates(uses, times)
    assert all(later <= earlier * (1 + 1e-9) for earlier, later in itertools.pairwise(rates))
    assert sum(rate * time for rate, time in zip(rates, times, strict=True)) == pytest.approx(sum(uses))
    if all(a / b >= c / d for (a, b), (c, d) in itertools.pairwise(observed)):
        assert rates == pytest.approx([use / time for use, time in observed])


@given(st.lists(st.integers(0, 10), min_size=1, max_size=20))
def test_exposure_is_the_time_everybody_spent_up_to_the_middle_of_the_last_step(counts: list[int]) -> None:
    edges = [2 ** (step / 4) for step in range(len(counts) + 1)]
    spent = sum(n * ((edges[step] + edges[step + 1]) / 2 - 1) for step, n in enumerate(counts))
    assert sum(exposure([float(n) for n in counts])) == pytest.approx(spent)


def test_classes_begin_where_they_say() -> None:
    assert [class_of(uses) for uses in (1, 2, 3, 4, 5, 6, 7, 1000)] == [0, 1, 2, 3, 4, 4, 5, 5]


def test_a_class_that_is_used_again_more_often_is_rated_higher_at_every_age() -> None:
    rates, rng = ReuseRates(1.0), random.Random(3)
    for _ in range(2000):
        use_class = rng.randrange(len(USE_CLASSES))
        age = rng.expovariate(1 / 50)
        rates.observe(use_class, int(age), reused=rng.random() < (use_class + 1) / 8)
    rates.learn()
    for age in (0, 3, 30, 100):
        by_class = [rates.rate(use_class, age) for use_class in range(len(USE_CLASSES))]
        assert by_class == sorted(by_class)
        assert by_class[0] < by_class[-1]
    by_age = [rates.rate(0, age) for age in range(300)]
    assert by_age == sorted(by_age, reverse=True)


def test_before_anything_is_learned_it_is_lru_that_takes_the_tail_of_a_prompt_first() -> None:
    policy = Reuse(1000)
    for prompt in range(4):
        for depth in range(50):
            policy.insert(key(50 * prompt + depth), info(start_position=depth))
    assert [policy.evict(anything) for _ in range(100)] == [key(n) for n in (*range(49, -1, -1), *range(99, 49, -1))]


def test_prompts_stored_at_the_same_time_still_lose_their_tails_first() -> None:
    policy = Reuse(32 * 160)
    for depth in range(40):
        for prompt in range(4):
            policy.insert(key(100 * prompt + depth), info(start_position=depth))
    for _ in range(10):
        assert {policy.evict(anything) for _ in range(4)} == {key(100 * prompt + depth) for prompt in range(4)}
        depth -= 1


def test_what_came_back_outlives_what_never_does(monkeypatch: pytest.MonkeyPatch) -> None:
    """A loop beside a stream that never returns, too much for the tier together: LRU has no hit at all. The other
    learns of the stream when its ghosts are forgotten."""

    def hits(name: str) -> int:
        policy, resident, count = make_policy(name, 100), set[ObjectKey](), 0
        for turn in range(6000):
            for each in (key(turn % 40), key(10_000 + 3 * turn), key(10_001 + 3 * turn), key(10_002 + 3 * turn)):
                if each in resident:
                    count += 1
                    policy.hit(each)
                    continue
                if len(resident) == 100:
                    victim = policy.evict(anything)
                    assert victim is not None
                    resident.discard(victim)
                policy.insert(each, info())
                resident.add(each)
        return count

    monkeypatch.setattr(reuse, "LEAST_GHOSTS", 1000)
    assert hits("lru") == 0
    assert hits("reuse") > 4000


def test_it_keeps_what_is_dear_to_compute() -> None:
    policy = Reuse(100)
    for number in range(100):
        policy.insert(key(number), info(recompute_s=8.0 if number % 4 == 0 else 1.0))
    victims = [policy.evict(anything) for _ in range(70)]
    assert all(victim is not None and int.from_bytes(victim, "big") % 4 for victim in victims)
