"""The life of a put: invisible until commit, reaped when it lapses, its memory never used while a writer may write."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator

import pytest

from tandem.kvstore.eviction import Shares
from tandem.kvstore.interfaces import ObjectInfo, Refusal, TierName
from tandem.kvstore.node import KvNode, Ticket
from tandem.kvstore.node.settings import PUT_LEASE_S, ZOMBIE_GRACE_S
from tests.kvstore.node.fakes import SIZE, Clock, DictTier, bundle_of, info_of, key_of, make_settings, put, spec_of


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def node(clock: Clock) -> Iterator[KvNode]:
    node = KvNode(make_settings(4), clock=clock)
    yield node
    node.check_integrity()
    node.close()


def begin(node: KvNode, number: int) -> Ticket:
    ticket = node.begin_put(key_of(number), info_of(spec_of(number)))
    assert isinstance(ticket, Ticket)
    return ticket


def test_an_object_is_found_after_commit_and_not_before(node: KvNode) -> None:
    ticket = begin(node, 1)
    ticket.buffer[:] = bundle_of(spec_of(1))
    assert node.locate([key_of(1)]) == []
    with node.view(key_of(1)) as view:
        assert view is None
    assert ticket.commit()
    assert [place.tier for place in node.locate([key_of(1)])] == [TierName.HOST]
    with node.view(key_of(1)) as view:
        assert view is not None
        assert view.readonly
        assert bytes(view) == bundle_of(spec_of(1))


def test_a_key_is_taken_while_somebody_writes_it_and_after(node: KvNode) -> None:
    ticket = begin(node, 1)
    assert node.begin_put(key_of(1), info_of(spec_of(1))) is Refusal.EXISTS
    assert ticket.commit()
    assert node.begin_put(key_of(1), info_of(spec_of(1))) is Refusal.EXISTS
    assert node.stats().refused == {"exists": 2}


def test_what_is_offered_again_counts_as_used(node: KvNode) -> None:
    for number in range(1, 5):
        put(node, spec_of(number))
    assert node.begin_put(key_of(1), info_of(spec_of(1))) is Refusal.EXISTS
    put(node, spec_of(5))
    assert [place.key for place in node.locate([key_of(1)])] == [key_of(1)]
    assert node.locate([key_of(2)]) == []


def test_memory_is_filled_with_another_object_than_it_was_begun_for(node: KvNode) -> None:
    ticket = begin(node, 1)
    ticket.buffer[:] = bundle_of(spec_of(2))
    assert ticket.commit_as(key_of(2), info_of(spec_of(2)))
    assert node.lookups.contains(key_of(1)) == []
    with node.view(key_of(2)) as view:
        assert view is not None
        assert bytes(view) == bundle_of(spec_of(2))
    assert [(place.key, place.size) for place in node.locate([key_of(2)])] == [(key_of(2), SIZE)]
    assert put(node, spec_of(1))
    assert not ticket.commit_as(key_of(3), info_of(spec_of(3)))
    assert node.lookups.contains(key_of(3)) == []


@pytest.mark.parametrize("committed", [True, False])
def test_the_first_to_put_a_key_has_it_and_the_other_gives_its_memory_back(node: KvNode, committed: bool) -> None:
    held = begin(node, 1)
    first = begin(node, 2)
    first.buffer[:] = bundle_of(spec_of(2))
    if committed:
        assert first.commit()
    held.buffer[:] = bundle_of(spec_of(3))
    assert held.commit_as(key_of(2), info_of(spec_of(2)))
    assert node.arena.used_bytes == SIZE
    assert node.stats().refused == {"exists": 1}
    assert committed or first.commit()
    with node.view(key_of(2)) as view:
        assert view is not None
        assert bytes(view) == bundle_of(spec_of(2))


def test_held_memory_that_lapsed_becomes_nothing(node: KvNode, clock: Clock) -> None:
    ticket = begin(node, 1)
    clock.now += PUT_LEASE_S
    node.janitor.reap()
    assert not ticket.commit_as(key_of(2), info_of(spec_of(2)))
    assert node.lookups.contains(key_of(2)) == []
    assert node.arena.used_bytes == 0


def test_abort_gives_key_and_memory_back_and_may_be_repeated(node: KvNode) -> None:
    ticket = begin(node, 1)
    ticket.abort()
    ticket.abort()
    assert not ticket.commit()
    assert node.arena.used_bytes == 0
    assert put(node, spec_of(1))
    ticket.abort()
    assert node.lookups.contains(key_of(1)) == [TierName.HOST]


def test_abort_after_commit_does_nothing(node: KvNode) -> None:
    ticket = begin(node, 1)
    assert ticket.commit()
    ticket.abort()
    assert not ticket.commit()
    assert node.lookups.contains(key_of(1)) == [TierName.HOST]


def test_a_late_write_through_the_buffer_of_a_finished_put_fails(node: KvNode) -> None:
    ticket = begin(node, 1)
    buffer = ticket.buffer
    assert ticket.commit()
    with pytest.raises(ValueError, match="released"):
        buffer[0] = 1


def test_a_lapsed_put_frees_the_key_at_once_and_the_memory_when_its_writer_is_gone(node: KvNode, clock: Clock) -> None:
    ticket = begin(node, 1)
    clock.now += PUT_LEASE_S
    node.janitor.reap()
    assert node.stats().zombies == 1
    again = begin(node, 1)
    assert again.offset != ticket.offset
    again.buffer[:] = bundle_of(spec_of(1))
    ticket.buffer[:] = bytes(SIZE)  # the zombie still writes
    assert again.commit()
    with node.view(key_of(1)) as view:
        assert view is not None
        assert bytes(view) == bundle_of(spec_of(1))
    assert not ticket.commit()
    assert node.stats().zombies == 0
    assert node.stats().reaped == 1
    assert node.stats().leases == 0


def test_a_zombie_that_is_never_heard_of_again_keeps_its_memory_for_the_grace_time(node: KvNode, clock: Clock) -> None:
    tickets = [begin(node, number) for number in range(4)]
    clock.now += PUT_LEASE_S
    node.janitor.reap()
    assert node.begin_put(key_of(9), info_of(spec_of(9))) is Refusal.NO_SPACE
    clock.now += ZOMBIE_GRACE_S - 1
    node.janitor.reap()
    assert node.begin_put(key_of(9), info_of(spec_of(9))) is Refusal.NO_SPACE
    clock.now += 1
    node.janitor.reap()
    assert put(node, spec_of(9))
    assert not any(ticket.commit() for ticket in tickets)
    assert node.stats().detached == 0


def test_a_full_host_makes_room_and_refuses_what_cannot_fit(node: KvNode) -> None:
    for number in range(6):
        assert put(node, spec_of(number))
    assert [len(node.lookups.contains(key_of(number))) for number in range(6)] == [0, 0, 1, 1, 1, 1]
    assert node.begin_put(key_of(9), ObjectInfo(size=1 << 30, num_tokens=1)) is Refusal.NO_SPACE
    assert node.stats().tiers[0].objects == 4, "nothing left for an object that can never fit"
    held = node.fetch(node.locate([key_of(number) for number in range(2, 6)]))
    assert node.begin_put(key_of(9), info_of(spec_of(9))) is Refusal.NO_SPACE
    held.close()
    assert put(node, spec_of(9))


def test_an_owner_over_its_quota_evicts_only_itself() -> None:
    node = KvNode(make_settings(10, quotas=Shares(0.5)))
    for number in range(3):
        assert put(node, spec_of(number, owner="quiet"))
    for number in range(10, 30):
        assert put(node, spec_of(number, owner="loud"))
    assert all(node.lookups.contains(key_of(number)) for number in range(3))
    loud = [stored for stored in node.lookups.objects() if stored.info.owner == "loud"]
    assert sum(stored.info.size for stored in loud) <= node.arena.capacity_bytes // 2
    fetch = node.fetch(node.locate([stored.key for stored in loud]))
    assert node.begin_put(key_of(99), info_of(spec_of(99, owner="loud"))) is Refusal.QUOTA
    assert put(node, spec_of(98, owner="quiet"))
    fetch.close()
    node.check_integrity()
    node.close()


def test_without_quotas_whoever_has_most_makes_room() -> None:
    node = KvNode(make_settings(10))
    for number in range(3):
        assert put(node, spec_of(number, owner="quiet"))
    for number in range(10, 60):
        assert put(node, spec_of(number, owner="loud" if number % 5 else "other"))
        node.check_integrity()
    assert all(node.lookups.contains(key_of(number)) for number in range(3)), "less than a third of the tier"
    owners = Counter(stored.info.owner for stored in node.lookups.objects())
    assert max(owners.values()) - min(owners.values()) <= 1
    node.close()


def test_alone_an_owner_has_all_of_a_tier(node: KvNode) -> None:
    for number in range(20):
        assert put(node, spec_of(number, owner="only"))
    assert node.stats().tiers[0].objects == 4


def test_a_size_that_is_not_positive_names_the_field(node: KvNode) -> None:
    with pytest.raises(ValueError, match=r"ObjectInfo\.size"):
        node.begin_put(key_of(1), ObjectInfo(size=0, num_tokens=1))


def test_after_close_puts_are_refused_and_nothing_is_found() -> None:
    node = KvNode(make_settings(4))
    ticket = begin(node, 1)
    assert put(node, spec_of(2))
    node.close()
    assert node.begin_put(key_of(3), info_of(spec_of(3))) is Refusal.CLOSED
    assert not ticket.commit()
    assert node.locate([key_of(2)]) == []
    fetch = node.fetch([])
    assert fetch.intact() == 0
    fetch.close()
    node.close()


def test_tiers_that_are_not_below_host_memory_are_refused() -> None:
    with pytest.raises(ValueError, match="at most one each"):
        KvNode(make_settings(4), tiers=[DictTier(), DictTier()])
    with pytest.raises(ValueError, match="disk, remote"):
        KvNode(make_settings(4), tiers=[DictTier(TierName.PEER)])
