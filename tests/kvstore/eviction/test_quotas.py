"""Quotas: the bytes are right, and nobody pays for somebody else."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tandem.common.errors import ConfigError
from tandem.kvstore.eviction import POLICIES, Quotas, Shares, make_policy
from tandem.kvstore.eviction.reuse import Reuse
from tandem.kvstore.interfaces import ObjectInfo, ObjectKey

CAPACITY = 40


def key(number: int) -> ObjectKey:
    return ObjectKey(number.to_bytes(32, "big"))


def info(owner: str, size: int = 1) -> ObjectInfo:
    return ObjectInfo(size=size, num_tokens=1, owner=owner)


def quotas(fraction: float, policy: str = "lru") -> Quotas:
    return Quotas(CAPACITY, Shares(fraction), new_policy=lambda capacity: make_policy(policy, capacity))


def anything(_key: ObjectKey) -> bool:
    return True


STEP = st.tuples(
    st.sampled_from(["put", "put", "put", "hit", "remove"]),
    st.integers(0, 40),
    st.integers(1, 5),
    st.sampled_from("abcd"),
    st.sets(st.integers(0, 40), max_size=6),
)


@pytest.mark.parametrize("policy", POLICIES)
@settings(max_examples=25, deadline=None)
@given(steps=st.lists(STEP, min_size=20, max_size=80), fraction=st.sampled_from([0.25, 0.5, 0.9, 1.0]))
def test_isolation(policy: str, steps: list[tuple[str, int, int, str, set[int]]], fraction: float) -> None:
    books = quotas(fraction, policy)
    resident: dict[ObjectKey, tuple[str, int]] = {}

    def held_by(owner: str) -> int:
        return sum(size for each, size in resident.values() if each == owner)

    for operation, number, size, owner, leased in steps:
        held = {key(each) for each in leased}

        def may_leave(candidate: ObjectKey, held: set[ObjectKey] = held) -> bool:
            return candidate not in held

        if operation == "hit":
            books.hit(key(number))
        elif operation == "remove":
            books.remove(key(number))
            resident.pop(key(number), None)
        elif key(number) not in resident:
            while not books.fits(owner, size) or sum(each for _, each in resident.values()) + size > CAPACITY:
                over = fraction < 1.0 and held_by(owner) + size > books.limit_bytes(owner)
                assert over == (not books.fits(owner, size))
                victim = books.evict_for(owner, size, may_leave)
                if victim is None:
                    candidates = [each for each, (whose, _) in resident.items() if whose == owner or not over]
                    assert held.issuperset(candidates), "something could have left"
                    break
                assert victim not in held
                if over:
                    assert resident[victim][0] == owner, "an owner over its quota evicted somebody else"
                del resident[victim]
            else:
                books.insert(key(number), info(owner, size))
                resident[key(number)] = (owner, size)
        assert len(books) == len(resident)
        assert dict(books.used) == {each: held_by(each) for each in "abcd" if held_by(each)}
        assert fraction == 1.0 or all(used <= books.limit_bytes(each) for each, used in books.used.items())


def test_who_holds_least_is_safe_while_another_holds_more() -> None:
    books = quotas(0.8)
    for number in range(8):
        books.insert(key(number), info("small"))
    for number in range(100, 132):
        books.insert(key(number), info("large"))
    victims = [books.evict_for("newcomer", 1, anything) for _ in range(20)]
    assert victims == [key(number) for number in range(100, 120)]


@pytest.mark.parametrize("policy", POLICIES)
@settings(max_examples=25, deadline=None)
@given(steps=st.lists(STEP, min_size=20, max_size=80), limits=st.booleans())
def test_who_has_no_more_than_an_equal_part_loses_nothing_to_others(
    policy: str, steps: list[tuple[str, int, int, str, set[int]]], limits: bool
) -> None:
    """Also without `kv_quotas`: whoever loses an object has most bytes, the new object included, of those who have one
    that may leave."""
    books = quotas(0.9 if limits else 1.0, policy)
    resident: dict[ObjectKey, tuple[str, int]] = {}

    def bytes_of(owner: str) -> int:
        return sum(size for whose, size in resident.values() if whose == owner)

    for operation, number, size, owner, leased in steps:
        held = {key(each) for each in leased}
        if operation != "put" or key(number) in resident:
            books.hit(key(number))
            continue
        while not books.fits(owner, size) or sum(each for _, each in resident.values()) + size > CAPACITY:
            within_quota = books.fits(owner, size)
            victim = books.evict_for(owner, size, lambda candidate, held=held: candidate not in held)  # type: ignore[misc]
            if victim is None:
                break
            loser = resident[victim][0]
            if within_quota:
                needed = {each: bytes_of(each) + (size if each == owner else 0) for each in "abcd"}
                losers = {whose for each, (whose, _) in resident.items() if each not in held}
                assert needed[loser] == max(needed[each] for each in losers)
                if losers == {whose for whose, _ in resident.values()} | {owner}:
                    owners = sum(1 for each in needed.values() if each)
                    assert needed[loser] * owners > CAPACITY, "it had no more than an equal part"
            del resident[victim]
        else:
            books.insert(key(number), info(owner, size))
            resident[key(number)] = (owner, size)


@pytest.mark.parametrize("policy", POLICIES)
@settings(max_examples=25, deadline=None)
@given(steps=st.lists(STEP, min_size=20, max_size=80))
def test_a_single_owner_has_what_its_policy_alone_would_give_it(
    policy: str, steps: list[tuple[str, int, int, str, set[int]]]
) -> None:
    books, alone = quotas(1.0, policy), make_policy(policy, CAPACITY)
    resident: dict[ObjectKey, int] = {}
    for operation, number, size, _, leased in steps:
        held = {key(each) for each in leased}

        def may_leave(candidate: ObjectKey, held: set[ObjectKey] = held) -> bool:
            return candidate not in held

        if operation == "remove":
            books.remove(key(number))
            alone.remove(key(number))
            resident.pop(key(number), None)
        elif operation == "hit" or key(number) in resident:
            books.hit(key(number))
            alone.hit(key(number))
        else:
            while sum(resident.values()) + size > CAPACITY:
                victim = books.evict_for("a", size, may_leave)
                assert victim == alone.evict(may_leave)
                if victim is None:
                    break
                del resident[victim]
            else:
                books.insert(key(number), info("a", size))
                alone.insert(key(number), info("a", size))
                resident[key(number)] = size


def test_a_load_whose_owner_is_not_known_yet_finds_room_among_the_others() -> None:
    books = quotas(1.0)
    for number in range(10):
        books.insert(key(number), info("a"))
    books.reserve("", 30)
    assert books.evict_for("", 1, anything) == key(0)


def test_all_owners_together_remember_no_more_than_one_would(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tandem.kvstore.eviction.quotas.MAX_GHOSTS", 64)
    books = quotas(1.0, "reuse")
    for number in range(1000):
        owner = f"owner-{number % (1 + number // 100)}"
        while len(books) >= CAPACITY:
            assert books.evict_for(owner, 1, anything) is not None
        books.insert(key(number), info(owner))
        policies = books._policies.values()
        assert all(isinstance(each, Reuse) for each in policies)
        assert sum(len(each._ghosts) for each in policies if isinstance(each, Reuse)) <= 64
    assert len(policies) == 10


def test_owners_that_come_and_go_leave_nothing_behind() -> None:
    books = quotas(1.0, "reuse")
    for number in range(5000):
        books.insert(key(number), info(f"owner-{number}"))
        if len(books) > 3:
            books.remove(key(number - 3))
    assert len(books._policies) == len(books.used) == 3
    assert len(books._largest) < 100


def test_what_is_remembered_is_shared_out_anew_as_owners_come_and_go(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tandem.kvstore.eviction.quotas.MAX_GHOSTS", 64)
    books = quotas(1.0, "reuse")
    each = []
    for number in range(6):
        books.insert(key(number), info(f"owner-{number}"))
        each.append(books._ghosts_each)
    for number in range(5):
        books.remove(key(number))
        each.append(books._ghosts_each)
    assert each == [64, 32, 16, 16, 8, 8, 8, 16, 16, 32, 64]


@pytest.mark.parametrize(("owner", "other"), [("a", "b"), ("b", "a")])
def test_the_next_largest_loses_where_the_largest_has_to_stay(owner: str, other: str) -> None:
    for size, loser in ((1, other), (2, owner), (3, owner)):
        books = quotas(1.0)
        books.insert(key(0), info("largest", 20))
        books.insert(key(1), info(owner, 8))
        books.insert(key(2), info(other, 9 if size > 1 else 10))
        assert books.evict_for(owner, size, lambda each: each != key(0)) == key(1 if loser == owner else 2)


def test_an_owner_without_anything_may_fill_its_quota_and_no_more() -> None:
    books = quotas(0.5)
    assert books.fits("a", CAPACITY // 2)
    assert not books.fits("a", CAPACITY // 2 + 1)


def test_a_write_under_way_is_charged() -> None:
    books = quotas(0.5)
    books.reserve("a", 15)
    assert books.fits("a", 5)
    assert not books.fits("a", 6)
    books.unreserve("a", 15)
    books.insert(key(1), info("a", 15))
    assert dict(books.used) == {"a": 15}
    books.remove(key(1))
    assert dict(books.used) == {}


def test_inserting_again_replaces() -> None:
    books = quotas(0.5)
    books.insert(key(1), info("a", 3))
    books.insert(key(1), info("b", 4))
    assert dict(books.used) == {"b": 4}
    assert len(books) == 1


def test_an_owner_can_have_a_share_of_its_own() -> None:
    books = Quotas(CAPACITY, Shares(0.5, {"big": 1.0, "small": 0.1}), new_policy=lambda size: make_policy("lru", size))
    assert [books.limit_bytes(owner) for owner in ("big", "small", "anybody")] == [
        CAPACITY,
        int(0.1 * CAPACITY),
        CAPACITY // 2,
    ]
    books.insert(key(1), info("anybody", 2))
    books.insert(key(2), info("small", 4))
    assert not books.fits("small", 1)
    assert books.evict_for("small", 1, anything) == key(2), "one over its quota evicted somebody else"
    books.insert(key(3), info("big", CAPACITY - 2))
    assert books.fits("big", 2)


def test_shares_of_one_owner_alone_are_kept_too() -> None:
    books = Quotas(CAPACITY, Shares(1.0, {"small": 0.1}), new_policy=lambda size: make_policy("lru", size))
    assert not books.fits("small", CAPACITY // 2)
    assert books.fits("anybody", CAPACITY)


def test_without_quotas_there_is_no_limit() -> None:
    assert Shares().of("anybody") == Shares.read({}).of("anybody") == 1.0


@pytest.mark.parametrize("share", [0.0, -0.5, 1.5, float("nan")])
def test_an_impossible_share_of_an_owner_names_the_setting(share: float) -> None:
    with pytest.raises(ConfigError, match="kv_quotas: acme"):
        Shares(1.0, {"acme": share})


@pytest.mark.parametrize("fraction", [0.0, -1.0, 1.5, float("nan")])
def test_an_impossible_fraction_names_the_setting(fraction: float) -> None:
    with pytest.raises(ConfigError, match=r"kv_quotas: \*"):
        quotas(fraction)
