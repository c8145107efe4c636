from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from tandem.router.tenants.fair_cache import FairCache

CAPACITY = 20
STEPS = st.lists(st.tuples(st.sampled_from("abc"), st.integers(0, 9), st.integers(1, 14)), max_size=60)


@given(STEPS)
def test_it_keeps_what_a_slow_obvious_one_keeps(steps: list[tuple[str, int, int]]) -> None:
    cache: FairCache[int, int] = FairCache(CAPACITY)
    kept: list[tuple[str, int, int, int]] = []
    for number, (owner, key, weight) in enumerate(steps):
        cache.put(owner, key, number, weight)
        kept = [each for each in kept if each[:2] != (owner, key)] + [(owner, key, number, weight)]
        while sum(each[3] for each in kept if each[0] == owner) > CAPACITY // 2:
            kept.remove(next(each for each in kept if each[0] == owner))
        while sum(each[3] for each in kept) > CAPACITY:
            kept.pop(0)
        assert list(cache.newest()) == [(key, value) for _, key, value, _ in reversed(kept)]
        assert all(cache.get(owner, key) == value for owner, key, value, _ in kept)
    for owner, key, _, _ in kept:
        cache.pop(owner, key)
        cache.pop(owner, key)
    assert not len(cache)
    assert not cache._keys
    assert not cache._weights


def test_one_owner_evicts_only_itself() -> None:
    cache: FairCache[int, str] = FairCache(10)
    for number in range(5):
        cache.put("victim", number, "kept")
    for number in range(1000):
        cache.put("greedy", number, "")
    assert [cache.get("victim", number) for number in range(5)] == ["kept"] * 5
    assert len(cache) == 10
