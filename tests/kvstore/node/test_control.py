"""Pins, clear, move, scrub, replicas, statistics."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from typing import Any

import pytest

from tandem.kvstore.interfaces import Refusal, StoreIntegrityError, TierName
from tandem.kvstore.node import KvNode
from tests.kvstore.node.fakes import (
    SIZE,
    Clock,
    DictTier,
    bundle_of,
    info_of,
    key_of,
    make_settings,
    put,
    spec_of,
)


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def disk() -> DictTier:
    return DictTier()


@pytest.fixture
def node(clock: Clock, disk: DictTier) -> Iterator[KvNode]:
    node = KvNode(make_settings(4), tiers=[disk], clock=clock)
    node.start()
    assert node.wait_indexed(60)
    yield node
    node.check_integrity()
    node.close()


def fill(node: KvNode, first: int, count: int = 8) -> None:
    for number in range(first, first + count):
        put(node, spec_of(number))
        node.flush(60)


def in_host(node: KvNode, number: int) -> bool:
    return TierName.HOST in node.lookups.contains(key_of(number))


def test_a_soft_pin_leaves_last(node: KvNode) -> None:
    assert put(node, spec_of(1))
    assert node.commands.pin(key_of(1), "me", None, hard=False)
    fill(node, 10)
    assert in_host(node, 1)
    with node.fetch(node.locate([key_of(15), key_of(16), key_of(17)])) as fetch:
        assert fetch.intact() == 3
        assert put(node, spec_of(30)), "nothing but the pinned object could leave"
    assert not in_host(node, 1)
    assert node.stats().tiers[0].soft_pins == 0


def test_a_hard_pin_never_leaves_and_hard_pins_take_at_most_half(node: KvNode) -> None:
    for number in (1, 2, 3):
        assert put(node, spec_of(number))
    assert node.commands.pin(key_of(1), "me", None, hard=True)
    assert node.commands.pin(key_of(2), "me", None, hard=True)
    assert not node.commands.pin(key_of(3), "me", None, hard=True)
    assert node.commands.pin(key_of(3), "me", None, hard=False)
    fill(node, 10)
    assert in_host(node, 1)
    assert in_host(node, 2)
    pinned = (key_of(1), key_of(2))
    others = [each.key for each in node.lookups.objects() if TierName.HOST in each.tiers and each.key not in pinned]
    with node.fetch(node.locate(others)):
        assert node.begin_put(key_of(50), info_of(spec_of(50))) is Refusal.NO_SPACE
    stats = node.stats().tiers[0]
    assert (stats.hard_pins, stats.hard_pinned_bytes) == (2, 2 * SIZE)


def test_each_owner_has_a_pin_of_his_own(node: KvNode) -> None:
    assert put(node, spec_of(1))
    assert node.commands.pin(key_of(1), "a", None, hard=True)
    assert node.commands.pin(key_of(1), "b", None, hard=False)
    assert node.commands.unpin(key_of(1), "a")
    assert not node.commands.unpin(key_of(1), "a")
    assert node.stats().tiers[0].hard_pinned_bytes == 0
    fill(node, 10)
    assert in_host(node, 1)
    assert node.commands.unpin(key_of(1), "b")
    fill(node, 20)
    assert not in_host(node, 1)


def test_pins_end_with_their_time(node: KvNode, clock: Clock) -> None:
    assert put(node, spec_of(1))
    assert node.commands.pin(key_of(1), "me", 10.0, hard=True)
    clock.now += 9
    node.janitor.reap()
    fill(node, 10)
    assert in_host(node, 1)
    clock.now += 1
    node.janitor.reap()
    fill(node, 20)
    assert not in_host(node, 1)
    assert not node.commands.unpin(key_of(1), "me")


def test_an_object_on_disk_only_is_pinned_there(clock: Clock) -> None:
    disk = DictTier(capacity_bytes=6 * SIZE)
    node = KvNode(make_settings(4), tiers=[disk], clock=clock)
    node.start()
    assert node.wait_indexed(60)
    fill(node, 0, 5)
    assert node.lookups.contains(key_of(0)) == [TierName.DISK]
    assert node.commands.pin(key_of(0), "me", None, hard=True)
    fill(node, 10, 20)
    assert node.lookups.contains(key_of(0)) == [TierName.DISK]
    assert not node.commands.pin(key_of(99), "me", None, hard=False)
    node.check_integrity()
    node.close()


def test_clear_by_owner_and_model(node: KvNode, disk: DictTier) -> None:
    for number, owner in ((1, "a"), (2, "b"), (3, "b")):
        assert put(node, spec_of(number, owner=owner))
    node.flush(60)
    assert node.commands.pin(key_of(2), "me", None, hard=True)
    assert node.commands.clear(owner="b", model="other") == 0
    assert node.commands.clear(owner="b") == 2
    assert set(disk.content) == {key_of(1)}
    assert [stored.key for stored in node.lookups.objects()] == [key_of(1)]
    assert node.stats().tiers[0].hard_pinned_bytes == 0
    assert node.commands.clear(model="small") == 1
    assert node.arena.used_bytes == 0


def test_a_reader_finishes_with_an_object_that_was_cleared(node: KvNode) -> None:
    assert put(node, spec_of(1))
    fetch = node.fetch(node.locate([key_of(1)]))
    assert node.commands.clear() == 1
    fill(node, 10)
    assert bytes(fetch.buffer(0)) == bundle_of(spec_of(1))
    fetch.close()


def test_a_move_beside_the_end_of_a_write_back_loses_nothing(node: KvNode, monkeypatch: pytest.MonkeyPatch) -> None:
    lower = node._books.lower[TierName.DISK]
    write, written, moved = lower.write, threading.Event(), threading.Event()

    def slow_to_return(*arguments: Any) -> bool:
        done = write(*arguments)
        written.set()
        assert moved.wait(60)
        return done

    monkeypatch.setattr(lower, "write", slow_to_return)
    assert put(node, spec_of(1))
    assert written.wait(60)
    assert node.commands.move(key_of(1), TierName.DISK)
    moved.set()
    node.flush(60)
    assert node.lookups.contains(key_of(1)) == [TierName.DISK]


def test_move_down_and_up(node: KvNode, disk: DictTier) -> None:
    assert put(node, spec_of(1))
    assert node.commands.pin(key_of(1), "me", None, hard=False)
    assert not node.commands.move(key_of(1), TierName.DISK), "pinned where it is"
    assert node.commands.unpin(key_of(1), "me")
    assert node.commands.move(key_of(1), TierName.DISK)
    assert node.lookups.contains(key_of(1)) == [TierName.DISK]
    assert node.commands.move(key_of(1), TierName.HOST)
    assert node.lookups.contains(key_of(1)) == [TierName.HOST, TierName.DISK]
    assert not node.commands.move(key_of(1), TierName.REMOTE), "there is none"
    assert not node.commands.move(key_of(2), TierName.HOST)
    disk.fault = lambda operation, key: operation == "put"
    assert put(node, spec_of(3))
    assert not node.commands.move(key_of(3), TierName.DISK)
    assert in_host(node, 3)


def test_move_from_disk_to_the_remote_tier() -> None:
    disk, remote = DictTier(), DictTier(TierName.REMOTE)
    disk.content[key_of(1)] = (info_of(spec_of(1)), bundle_of(spec_of(1)))
    node = KvNode(make_settings(4), tiers=[disk, remote])
    node.start()
    assert node.wait_indexed(60)
    assert node.commands.move(key_of(1), TierName.REMOTE)
    assert node.lookups.contains(key_of(1)) == [TierName.REMOTE]
    assert disk.content == {}
    assert remote.content[key_of(1)][1] == bundle_of(spec_of(1))
    node.check_integrity()
    node.close()


def test_scrub_finds_flipped_bits_in_memory_and_on_disk(node: KvNode, disk: DictTier) -> None:
    fill(node, 0, 4)
    report = node.scrub.run(100)
    assert (report.checked, report.bad, report.unread) == (8, (), 0)
    assert report.checked_bytes == 8 * SIZE
    offset = node.fetch(node.locate([key_of(1)])).offset(0)
    node.arena.view(offset, SIZE)[SIZE - 1] ^= 1
    info, content = disk.content[key_of(2)]
    disk.content[key_of(2)] = (info, content[:5000] + bytes([content[5000] ^ 4]) + content[5001:])
    disk.fault = lambda operation, key: operation == "read" and key == key_of(3)
    report = node.scrub.run(100)
    assert set(report.bad) == {key_of(1), key_of(2)}
    assert report.unread >= 1
    assert node.lookups.contains(key_of(1)) == node.lookups.contains(key_of(2)) == []
    assert node.lookups.contains(key_of(3)) == [TierName.HOST]
    assert node.stats().quarantined == 2


def test_scrub_goes_on_where_it_stopped_and_comes_around(node: KvNode) -> None:
    fill(node, 0, 3)
    assert [node.scrub.run(4).checked for _ in range(3)] == [4, 4, 4]
    assert node.scrub.run(100).checked == 6
    node.arena.view(node.fetch(node.locate([key_of(0)])).offset(0), SIZE)[SIZE - 1] ^= 1
    assert [key for _ in range(2) for key in node.scrub.run(4).bad] == [key_of(0)]


def test_quarantine_drops_the_object_everywhere_and_counts(node: KvNode, disk: DictTier) -> None:
    assert put(node, spec_of(1))
    node.flush(60)
    node.quarantine(key_of(1), "checksum of layer 2")
    assert disk.content == {}
    assert node.locate([key_of(1)]) == []
    assert node.stats().quarantined == 1
    assert put(node, spec_of(1)), "it can be computed and stored again"


def test_hot_objects_are_those_that_are_read(node: KvNode) -> None:
    for number in range(3):
        assert put(node, spec_of(number))
    for _ in range(5):
        node.fetch(node.locate([key_of(1)])).close()
    with node.view(key_of(2)) as view:
        assert view is not None
    assert node.lookups.hot(1) == {key_of(1): 5, key_of(2): 1}
    assert list(node.lookups.hot(2)) == [key_of(1)]


def test_statistics(node: KvNode) -> None:
    assert put(node, spec_of(1))
    ticket = node.begin_put(key_of(2), info_of(spec_of(2)))
    node.flush(60)
    assert len(node.locate([key_of(1), key_of(7), key_of(8)])) == 1
    with node.fetch(node.locate([key_of(1)])):
        stats = node.stats()
    assert not isinstance(ticket, Refusal)
    ticket.abort()
    host, disk = stats.tiers
    assert (host.objects, host.bytes, host.hits, host.hit_bytes) == (1, SIZE, 1, SIZE)
    assert (disk.objects, disk.used_bytes, disk.writes, disk.written_bytes) == (1, SIZE, 1, SIZE)
    assert (stats.misses, stats.leases, stats.puts_in_flight, stats.fetches_open) == (2, 2, 1, 1)
    assert stats.tier(TierName.DISK) is disk
    assert stats.tier(TierName.REMOTE) is None
    assert node.lookups.info(key_of(1)) == info_of(spec_of(1))
    assert node.lookups.info(key_of(9)) is None


def test_check_integrity_finds_a_lease_that_leaked() -> None:
    node = KvNode(make_settings(4))
    assert put(node, spec_of(1))
    node.check_integrity()
    item = node._books.host.get(key_of(1))
    assert item is not None
    item.leases += 1
    with pytest.raises(StoreIntegrityError, match="counts 1 leases, 0 are held"):
        node.check_integrity()
    item.leases -= 1
    node.close()
