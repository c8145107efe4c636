"""Write-back, eviction below host memory, restarts, and tiers that fail."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator, Sequence

import pytest

from tandem.kvstore.bundle import parse
from tandem.kvstore.interfaces import ObjectInfo, ObjectKey, TierName
from tandem.kvstore.node import KvNode
from tests.kvstore.node.fakes import (
    LAYERS,
    SIZE,
    DictDirectory,
    DictTier,
    bundle_of,
    eventually,
    info_of,
    key_of,
    make_settings,
    put,
    spec_of,
)


@pytest.fixture
def gate() -> Iterator[threading.Event]:
    gate = threading.Event()
    yield gate
    gate.set()


def test_what_is_committed_goes_to_disk_and_then_to_the_remote_tier() -> None:
    disk, remote, directory = DictTier(), DictTier(TierName.REMOTE), DictDirectory()
    order: list[str] = []
    for tier in (disk, remote):
        tier.fault = lambda operation, key, name=tier.name: operation == "put" and order.append(name) is not None
    node = KvNode(make_settings(), tiers=[remote, disk], directory=directory)
    node.start()
    assert node.wait_indexed(60)
    assert put(node, spec_of(1))
    assert node.flush(60)
    assert order == ["disk", "remote"]
    assert disk.content[key_of(1)] == remote.content[key_of(1)] == (info_of(spec_of(1)), bundle_of(spec_of(1)))
    assert node.lookups.contains(key_of(1)) == [TierName.HOST, TierName.DISK, TierName.REMOTE]
    assert set(directory.held["a"]) == {(key_of(1), TierName.HOST), (key_of(1), TierName.DISK)}
    assert node.stats().leases == 0
    node.check_integrity()
    node.close()


def test_an_object_that_left_host_memory_is_read_from_disk() -> None:
    node = KvNode(make_settings(8), tiers=[DictTier()])
    node.start()
    assert node.wait_indexed(60)
    for number in range(12):
        assert put(node, spec_of(number))
        assert node.flush(60)
    assert node.lookups.contains(key_of(0)) == [TierName.DISK]
    with node.fetch(node.locate([key_of(number) for number in range(4)])) as fetch:
        assert fetch.wait(LAYERS, 60)
        assert [bytes(fetch.buffer(i)) for i in range(4)] == [bundle_of(spec_of(i)) for i in range(4)]
    assert node.stats().lost == 0
    node.check_integrity()
    node.close()


def test_a_full_queue_drops_writes_and_never_holds_up_a_put(gate: threading.Event) -> None:
    disk = DictTier()
    disk.fault = lambda operation, key: operation == "put" and not gate.wait(60)
    node = KvNode(make_settings(8), tiers=[disk])
    node.start()
    assert node.wait_indexed(60)
    for number in range(20):
        assert put(node, spec_of(number))
    stats = node.stats()
    assert stats.write_back_queued == 2, "a quarter of host memory"
    assert stats.write_back_queued_bytes == 2 * SIZE
    assert stats.tiers[1].writes_dropped == 18
    assert stats.lost > 0
    gate.set()
    assert node.flush(60)
    assert len(disk.content) == 2
    assert node.stats().leases == 0
    node.close()


def test_the_disk_stays_within_its_capacity_and_evicts() -> None:
    disk = DictTier(capacity_bytes=5 * SIZE + SIZE // 2)
    directory = DictDirectory()
    node = KvNode(make_settings(), tiers=[disk], directory=directory)
    node.start()
    assert node.wait_indexed(60)
    for number in range(12):
        assert put(node, spec_of(number))
        assert node.flush(60)
        assert disk.used_bytes <= disk.capacity_bytes
    assert sorted(disk.content) == sorted(key_of(number) for number in range(7, 12))
    assert {key for key, tier in directory.held["a"] if tier is TierName.DISK} == set(disk.content)
    assert node.stats().tiers[1].evictions == 7
    node.check_integrity()
    node.close()


def test_a_tier_with_more_overhead_than_the_books_know_still_finds_room() -> None:
    class Coarse(DictTier):
        @property
        def used_bytes(self) -> int:
            return 3 * super().used_bytes

    disk = Coarse(capacity_bytes=9 * SIZE)
    disk_put = disk.put
    disk.put = lambda key, info, content: (
        disk.used_bytes + 3 * info.size <= 9 * SIZE
        and disk_put(  # type: ignore[method-assign]
            key, info, content
        )
    )
    node = KvNode(make_settings(), tiers=[disk])
    node.start()
    assert node.wait_indexed(60)
    for number in range(8):
        assert put(node, spec_of(number))
        assert node.flush(60)
    assert key_of(7) in disk.content
    assert node.stats().tiers[1].writes_dropped == 0
    node.check_integrity()
    node.close()


def test_a_disk_that_fails_loses_nothing_else() -> None:
    disk = DictTier()
    disk.fault = lambda operation, key: operation == "put" and key == key_of(1)
    node = KvNode(make_settings(), tiers=[disk, DictTier(TierName.REMOTE)])
    node.start()
    assert node.wait_indexed(60)
    assert put(node, spec_of(0))
    assert put(node, spec_of(1))
    assert node.flush(60)
    assert node.lookups.contains(key_of(0)) == [TierName.HOST, TierName.DISK, TierName.REMOTE]
    assert node.lookups.contains(key_of(1)) == [TierName.HOST, TierName.REMOTE], "a fault does not make others leave"
    stats = node.stats().tiers[1]
    assert (stats.writes_dropped, stats.faults, stats.evictions) == (1, 1, 0)
    node.close()


def test_every_operation_of_a_tier_may_raise() -> None:
    def fault(operation: str, key: ObjectKey) -> bool:
        raise OSError("gone")

    disk, remote = DictTier(fault=fault), DictTier(TierName.REMOTE, fault=fault)
    node = KvNode(make_settings(4), tiers=[disk, remote])
    node.start()
    assert node.wait_indexed(60)
    for number in range(8):
        assert put(node, spec_of(number))
    assert node.flush(60)
    assert node.locate([key_of(99)]) == []
    node.quarantine(key_of(7), "test")
    assert node.commands.clear() > 0
    assert node.stats().tiers[1].faults > 0
    node.check_integrity()
    node.close()


def test_after_a_restart_the_disk_is_announced_and_read() -> None:
    disk = DictTier()
    first = KvNode(make_settings(), tiers=[disk])
    first.start()
    assert first.wait_indexed(60)
    assert put(first, spec_of(1))
    first.close()
    directory = DictDirectory()
    second = KvNode(make_settings(epoch=2), tiers=[disk], directory=directory)
    second.start(unix_path="/run/store", port=7)
    assert second.wait_indexed(60)
    assert directory.held["a"] == {(key_of(1), TierName.DISK): SIZE}
    assert (directory.infos["a"].unix_path, directory.infos["a"].port) == ("/run/store", 7)
    with second.fetch(second.locate([key_of(1)])) as fetch:
        assert fetch.wait(LAYERS, 60)
        assert bytes(fetch.buffer(0)) == bundle_of(spec_of(1))
    second.check_integrity()
    second.close()


def test_close_writes_what_is_queued() -> None:
    disk = DictTier()
    node = KvNode(make_settings(), tiers=[disk])
    node.start()
    assert node.wait_indexed(60)
    for number in range(10):
        assert put(node, spec_of(number))
    node.close()
    assert len(disk.content) == 10


def test_a_smaller_disk_after_a_restart_is_trimmed() -> None:
    disk = DictTier(content={key_of(i): (info_of(spec_of(i)), bundle_of(spec_of(i))) for i in range(6)})
    disk.capacity_bytes = 3 * SIZE
    node = KvNode(make_settings(), tiers=[disk])
    node.start()
    assert node.wait_indexed(60)
    assert sorted(disk.content) == [key_of(3), key_of(4), key_of(5)]
    node.check_integrity()
    node.close()


def test_the_disk_may_hold_another_codec() -> None:
    disk = DictTier()
    node = KvNode(make_settings(4, disk_codec="kivi-int8"), tiers=[disk])
    node.start()
    assert node.wait_indexed(60)
    assert put(node, spec_of(1, tokens=64))
    assert node.flush(60)
    info, content = disk.content[key_of(1)]
    assert info.size == len(content) < info_of(spec_of(1, tokens=64)).size
    node.commands.move(key_of(1), TierName.DISK)
    with node.fetch(node.locate([key_of(1)])) as fetch:
        assert fetch.wait(LAYERS, 60)
        found = parse(fetch.buffer(0))
        assert found is not None
        assert found.header.segments[0].codec == "kivi-int8"
        assert found.layer(LAYERS - 1) is not None
    node.check_integrity()
    node.close()


def test_an_object_that_is_dropped_while_it_is_written_does_not_come_back(gate: threading.Event) -> None:
    disk = DictTier()
    disk.fault = lambda operation, key: operation == "put" and not gate.wait(60)
    node = KvNode(make_settings(), tiers=[disk])
    node.start()
    assert node.wait_indexed(60)
    assert put(node, spec_of(1))
    eventually(lambda: bool(disk.log))
    quarantine = threading.Thread(target=node.quarantine, args=(key_of(1), "test"))
    quarantine.start()
    eventually(lambda: node.locate([key_of(1)]) == [])
    gate.set()
    quarantine.join(60)
    assert node.flush(60)
    eventually(lambda: disk.content == {})
    assert node.lookups.contains(key_of(1)) == []
    node.check_integrity()
    node.close()


def test_peers_read_what_is_on_disk_only() -> None:
    disk = DictTier(content={key_of(1): (info_of(spec_of(1)), bundle_of(spec_of(1)))})
    node = KvNode(make_settings(), tiers=[disk])
    node.start()
    assert node.wait_indexed(60)
    out = memoryview(bytearray(100))
    assert node.read_range(key_of(1), 50, out)
    assert bytes(out) == bundle_of(spec_of(1))[50:150]
    for key, offset in ((key_of(2), 0), (key_of(1), SIZE - 99), (key_of(1), -1)):
        assert not node.read_range(key, offset, out)
    with node.fetch(node.locate([key_of(1)])) as fetch:
        assert fetch.wait(LAYERS, 60)
    assert node.read_range(key_of(1), 50, out)
    assert not node.read_range(key_of(1), SIZE - 99, out)
    node.check_integrity()
    node.close()


class Batched(DictTier):
    """A tier that answers for many keys at a time."""

    def infos(self, keys: Sequence[ObjectKey]) -> list[ObjectInfo | None]:
        self.log.append(("infos", keys[0], 0, len(keys)))
        return [self.info(key) for key in keys]

    def read_many(self, ranges: Sequence[tuple[ObjectKey, int, memoryview]]) -> list[bool]:
        self.log.append(("read_many", ranges[0][0], 0, len(ranges)))
        return [self.read(key, offset, out) for key, offset, out in ranges]


def test_a_remote_tier_that_takes_batches_is_asked_once() -> None:
    remote = Batched(TierName.REMOTE, content={})
    node = KvNode(make_settings(loaders=1), tiers=[remote])
    node.start()
    assert node.wait_indexed(60)
    keys = [key_of(number) for number in range(10)]
    eventually(lambda: node.locate(keys) == [])
    remote.content.update({key_of(i): (info_of(spec_of(i)), bundle_of(spec_of(i))) for i in (*range(6), 8)})
    remote.log.clear()
    located = node.locate(keys)
    assert [place.key for place in located] == keys[:6]
    assert [entry[0] for entry in remote.log] == ["infos"]
    with node.fetch(located) as fetch:
        assert fetch.wait(LAYERS, 60)
    sizes = [length for operation, _, _, length in remote.log if operation == "read_many"]
    assert sum(sizes) <= 2 * 6
    assert len(node.locate(keys)) == 6
    node.check_integrity()
    node.close()


def test_a_slow_remote_tier_is_not_asked_for_long() -> None:
    remote = DictTier(TierName.REMOTE)
    node = KvNode(make_settings(), tiers=[remote])
    node.start()
    assert node.wait_indexed(60)
    eventually(lambda: node.locate([key_of(0)]) == [])
    remote.content.update({key_of(i): (info_of(spec_of(i)), bundle_of(spec_of(i))) for i in range(64)})
    remote.fault = lambda operation, key: operation == "info" and time.sleep(0.02) is not None
    keys = [key_of(number) for number in range(64)]
    first = len(node.locate(keys))
    assert 0 < first < 20
    assert len(node.locate(keys)) > first, "what it answered is remembered"
    node.close()


def test_a_deletion_that_failed_is_tried_again_and_never_hits_a_newer_object() -> None:
    disk = DictTier(fault=lambda operation, key: operation == "delete")
    node = KvNode(make_settings(), tiers=[disk])
    node.start()
    assert node.wait_indexed(60)
    for number in (1, 2):
        assert put(node, spec_of(number))
        assert node.flush(60)
        node.quarantine(key_of(number), "test")
    assert set(disk.content) == {key_of(1), key_of(2)}, "its bytes are still there, and nobody finds them"
    assert node.locate([key_of(1)]) == []
    node.check_integrity()
    assert put(node, spec_of(1))
    assert node.flush(60)
    disk.fault = lambda operation, key: False
    assert put(node, spec_of(3))
    assert node.flush(60)
    assert set(disk.content) == {key_of(1), key_of(3)}
    node.check_integrity()
    node.close()


class SlowToList(DictTier):
    """A disk that tells of its second half only once `gate` is open."""

    gate: threading.Event

    def objects(self) -> Iterator[tuple[ObjectKey, ObjectInfo]]:
        known = list(super().objects())
        yield from known[: len(known) // 2]
        assert self.gate.wait(60)
        yield from known[len(known) // 2 :]


def slow_disk(gate: threading.Event, owners: Sequence[str]) -> SlowToList:
    specs = [spec_of(number, owner=owner) for number, owner in enumerate(owners)]
    disk = SlowToList(content={ObjectKey(spec.key): (info_of(spec), bundle_of(spec)) for spec in specs})
    disk.gate = gate
    return disk


def test_a_node_answers_while_its_disk_is_being_indexed(gate: threading.Event) -> None:
    disk, directory = slow_disk(gate, ["default"] * 10), DictDirectory()
    node = KvNode(make_settings(), tiers=[disk], directory=directory)
    node.start()
    eventually(lambda: len(node.locate([key_of(number) for number in range(5)])) == 5)
    assert not node.wait_indexed(0.0)
    assert node.locate([key_of(7)]) == []
    with node.fetch(node.locate([key_of(3)])) as fetch:
        assert fetch.wait(LAYERS, 60)
        assert bytes(fetch.buffer(0)) == bundle_of(spec_of(3))
    assert put(node, spec_of(50))
    assert not node.commands.move(key_of(50), TierName.DISK), "nothing is written before the quotas are known"
    node.check_integrity()
    assert key_of(50) not in disk.content
    gate.set()
    assert node.wait_indexed(60)
    assert node.flush(60)
    assert key_of(50) in disk.content
    assert {key for key, tier in directory.held["a"] if tier is TierName.DISK} == set(disk.content)
    node.check_integrity()
    node.close()


def test_what_is_cleared_while_the_disk_is_being_indexed_does_not_come_back(gate: threading.Event) -> None:
    disk = slow_disk(gate, ["a", "b"] * 5)
    node = KvNode(make_settings(), tiers=[disk])
    node.start()
    eventually(lambda: len(node.lookups.objects()) == 5)
    assert node.commands.clear(owner="a") == 3
    gate.set()
    assert node.wait_indexed(60)
    assert {info.owner for info, _ in disk.content.values()} == {"b"}
    assert len(node.lookups.objects()) == 5
    node.check_integrity()
    node.close()


def test_a_node_closes_while_its_disk_is_being_indexed(gate: threading.Event) -> None:
    disk = slow_disk(gate, ["default"] * 10)
    node = KvNode(make_settings(), tiers=[disk])
    node.start()
    eventually(lambda: len(node.lookups.objects()) == 5)
    assert put(node, spec_of(50))
    closing = threading.Thread(target=node.close, args=(0.0,))
    closing.start()
    gate.set()
    closing.join(60)
    assert not closing.is_alive()
    assert node.locate([key_of(1)]) == []
