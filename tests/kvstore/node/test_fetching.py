"""Objects come in layer by layer, once for all who want them, and a fault ends the run, never the node."""

from __future__ import annotations

import random
import threading
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace

import pytest

from tandem.kvstore.bundle import layer_ranges
from tandem.kvstore.interfaces import Located, Location, NodeInfo, ObjectInfo, ObjectKey, TierName
from tandem.kvstore.node import KvNode
from tandem.kvstore.node.finding import Avoided, choose_peer
from tandem.kvstore.node.settings import READ_LEASE_S
from tests.kvstore.node.fakes import (
    LAYERS,
    SIZE,
    Clock,
    DictDirectory,
    DictTier,
    DirectPeers,
    bundle_of,
    eventually,
    info_of,
    key_of,
    make_settings,
    put,
    spec_of,
)

BIG = 4096
"""Tokens of objects with layers of 1 MiB, so that the loader reads them one by one."""


def disk_with(*numbers: int, tokens: int = 16) -> DictTier:
    tier = DictTier()
    for number in numbers:
        spec = spec_of(number, tokens=tokens)
        tier.content[key_of(number)] = (info_of(spec), bundle_of(spec))
    return tier


def located(*numbers: int, tier: TierName = TierName.DISK, link: str = "disk", size: int = SIZE) -> list[Located]:
    return [Located(key_of(number), tier, link, size) for number in numbers]


@pytest.fixture
def gate() -> Iterator[threading.Event]:
    gate = threading.Event()
    yield gate
    gate.set()


def test_layers_arrive_in_order_over_all_objects() -> None:
    disk = disk_with(1, 2, tokens=BIG)
    node = KvNode(make_settings(host_bytes=64 << 20, loaders=1), tiers=[disk])
    node.start()
    assert node.wait_indexed(60)
    with node.fetch(node.locate([key_of(1), key_of(2)])) as fetch:
        assert fetch.wait(LAYERS, 60)
        for index, number in enumerate((1, 2)):
            assert bytes(fetch.buffer(index)) == bundle_of(spec_of(number, tokens=BIG))
            with pytest.raises(TypeError):
                fetch.buffer(index)[0] = 1
    reads = [entry for entry in disk.log if entry[1] == key_of(1)]
    assert [offset for _, _, offset, _ in reads] == sorted(offset for _, _, offset, _ in reads)
    assert len(reads) == LAYERS + 1
    assert all(offset % 4096 == 0 for _, _, offset, _ in reads)
    node.check_integrity()
    node.close()


def test_the_first_layers_can_be_read_while_the_others_are_on_their_way(gate: threading.Event) -> None:
    disk = disk_with(1, tokens=BIG)
    content = bundle_of(spec_of(1, tokens=BIG))
    layout = layer_ranges(memoryview(content)[:4096])
    assert layout is not None
    second_layer = layout.ranges[1][0]
    disk.fault = lambda operation, key: operation == "read" and len(disk.log) > 2 and not gate.wait(60)
    node = KvNode(make_settings(host_bytes=64 << 20), tiers=[disk])
    node.start()
    assert node.wait_indexed(60)
    with node.fetch(node.locate([key_of(1)])) as fetch:
        assert fetch.wait(1, 60)
        assert not fetch.wait(2, 0.01)
        assert fetch.intact() == 0
        assert bytes(fetch.buffer(0)[:second_layer]) == content[:second_layer]
        gate.set()
        assert fetch.wait(LAYERS, 60)
        assert fetch.wait(LAYERS + 5, 60), "it has no more layers to wait for"
        assert fetch.intact() == 1
    node.close()


def test_what_was_fetched_stays_in_host_memory_and_is_announced() -> None:
    directory = DictDirectory()
    node = KvNode(make_settings(), tiers=[disk_with(1)], directory=directory)
    node.start()
    assert node.wait_indexed(60)
    assert directory.held["a"] == {(key_of(1), TierName.DISK): SIZE}
    with node.fetch(node.locate([key_of(1)])) as fetch:
        assert [source.tier for source in fetch.sources] == [TierName.DISK]
        assert fetch.wait(LAYERS, 60)
        eventually(lambda: fetch.intact() == 1)
    assert node.lookups.contains(key_of(1)) == [TierName.HOST, TierName.DISK]
    assert directory.held["a"] == {(key_of(1), TierName.DISK): SIZE, (key_of(1), TierName.HOST): SIZE}
    with node.fetch(node.locate([key_of(1)])) as fetch:
        assert fetch.intact() == 1
    hits = {tier.tier: tier.hits for tier in node.stats().tiers}
    assert hits == {TierName.HOST: 1, TierName.DISK: 1}
    node.close()


def test_two_fetches_of_one_object_share_one_load(gate: threading.Event) -> None:
    disk = disk_with(1)
    disk.fault = lambda operation, key: operation == "read" and not gate.wait(60)
    node = KvNode(make_settings(), tiers=[disk])
    node.start()
    assert node.wait_indexed(60)
    first = node.fetch(node.locate([key_of(1)]))
    second = node.fetch(node.locate([key_of(1), key_of(1)]))
    assert [source.tier for source in second.sources] == [TierName.DISK, TierName.DISK]
    assert second.offset(0) == second.offset(1) == first.offset(0)
    node.check_integrity()
    gate.set()
    assert first.wait(LAYERS, 60)
    first.close()
    assert second.wait(LAYERS, 60)
    assert bytes(second.buffer(1)) == bundle_of(spec_of(1))
    second.close()
    assert sum(length for operation, _, _, length in disk.log if operation == "read") == SIZE
    node.check_integrity()
    node.close()


def test_a_load_that_nobody_waits_for_stops_and_gives_its_memory_back(gate: threading.Event) -> None:
    disk = disk_with(1, tokens=BIG)
    disk.fault = lambda operation, key: operation == "read" and not gate.wait(60)
    node = KvNode(make_settings(host_bytes=64 << 20), tiers=[disk])
    node.start()
    assert node.wait_indexed(60)
    fetch = node.fetch(node.locate([key_of(1)]))
    eventually(lambda: bool(disk.log))
    fetch.close()
    assert node.arena.used_bytes > 0, "a read still lands there"
    node.check_integrity()
    gate.set()
    eventually(lambda: node.arena.used_bytes == 0)
    assert sum(operation == "read" for operation, *_ in disk.log) == 1
    assert node.lookups.contains(key_of(1)) == [TierName.DISK]
    node.check_integrity()
    node.close()


def test_a_failed_object_ends_the_run_and_is_not_tried_again() -> None:
    disk = disk_with(1, 2, 3)
    disk.fault = lambda operation, key: operation == "read" and key == key_of(2)
    node = KvNode(make_settings(), tiers=[disk])
    node.start()
    assert node.wait_indexed(60)
    with node.fetch(node.locate([key_of(number) for number in (1, 2, 3)])) as fetch:
        assert not fetch.wait(LAYERS, 60)
        assert fetch.failed
        eventually(lambda: fetch.intact() == 1)
        assert bytes(fetch.buffer(0)) == bundle_of(spec_of(1))
    assert [place.key for place in node.locate([key_of(number) for number in (1, 2, 3)])] == [key_of(1)]
    assert node.stats().failed_loads == 1
    assert node.stats().tiers[1].faults == 1
    node.check_integrity()
    node.close()


@pytest.mark.parametrize("damage", ["header", "size", "empty header"])
def test_bytes_that_are_no_object_are_quarantined(damage: str) -> None:
    disk = disk_with(1)
    info, content = disk.content[key_of(1)]
    broken = {
        "header": bytes([content[0] ^ 1]) + content[1:],
        "size": content + bytes(64),
        "empty header": bytes(len(content)),
    }[damage]
    disk.content[key_of(1)] = (replace(info, size=len(broken)), broken)
    node = KvNode(make_settings(), tiers=[disk])
    node.start()
    assert node.wait_indexed(60)
    with node.fetch(node.locate([key_of(1)])) as fetch:
        assert not fetch.wait(0, 60)
    eventually(lambda: node.stats().quarantined == 1)
    assert node.lookups.contains(key_of(1)) == []
    assert disk.content == {}
    assert node.arena.used_bytes == 0
    node.close()


def test_a_tier_that_raises_is_a_fault_and_the_loaders_live_on() -> None:
    disk = disk_with(1, 2)

    def fault(operation: str, key: ObjectKey) -> bool:
        if key == key_of(1):
            raise OSError("broken")
        return False

    disk.fault = fault
    node = KvNode(make_settings(loaders=1), tiers=[disk])
    node.start()
    assert node.wait_indexed(60)
    with node.fetch(node.locate([key_of(1)])) as fetch:
        assert not fetch.wait(LAYERS, 60)
    with node.fetch(node.locate([key_of(2)])) as fetch:
        assert fetch.wait(LAYERS, 60)
    assert node.stats().tiers[1].faults >= 1
    node.close()


def test_room_for_a_load_never_costs_an_object_of_the_same_fetch() -> None:
    disk = disk_with(1, 2)
    node = KvNode(make_settings(3), tiers=[disk])
    node.start()
    assert node.wait_indexed(60)
    assert put(node, spec_of(3))  # the one used longest ago
    assert put(node, spec_of(4))
    with node.fetch([*located(1, 2), *node.locate([key_of(3)])]) as fetch:
        assert [source.tier for source in fetch.sources] == [TierName.DISK, TierName.DISK, TierName.HOST]
        assert fetch.wait(LAYERS, 60)
        assert bytes(fetch.buffer(2)) == bundle_of(spec_of(3))
    node.close()


def test_a_fetch_larger_than_host_memory_gets_the_leading_part() -> None:
    node = KvNode(make_settings(3), tiers=[disk_with(*range(6))])
    node.start()
    assert node.wait_indexed(60)
    with node.fetch(located(*range(6))) as fetch:
        assert [source.key for source in fetch.sources] == [key_of(number) for number in range(3)]
        assert fetch.wait(LAYERS, 60)
        node.check_integrity()
    node.close()


def test_a_stale_location_is_looked_up_again_on_this_node() -> None:
    node = KvNode(make_settings(), tiers=[disk_with(1)])
    node.start()
    assert node.wait_indexed(60)
    with node.fetch(located(1, tier=TierName.HOST, link="host")) as fetch:
        assert [source.link for source in fetch.sources] == ["disk"]
        assert fetch.wait(LAYERS, 60)
    with node.fetch(located(7, tier=TierName.HOST, link="host")) as fetch:
        assert list(fetch.sources) == []
    node.close()


def two_nodes(directory: DictDirectory, peers: DirectPeers, **settings: object) -> tuple[KvNode, KvNode]:
    nodes = tuple(
        KvNode(make_settings(node_id=name, **settings), directory=directory, peers=peers, tiers=[DictTier()])
        for name in ("a", "b")
    )
    for node in nodes:
        node.start()
        assert node.wait_indexed(60)
        peers.nodes[node.settings.node_id] = node
    return nodes[0], nodes[1]


def test_an_object_comes_from_another_node_with_what_its_header_says() -> None:
    directory, peers = DictDirectory(), DirectPeers()
    a, b = two_nodes(directory, peers)
    assert put(b, spec_of(1, owner="tenant"))
    places = a.locate([key_of(1), key_of(2)])
    assert [(place.tier, place.link) for place in places] == [(TierName.PEER, "peer:b")]
    with a.fetch(places) as fetch:
        assert fetch.wait(LAYERS, 60)
        assert bytes(fetch.buffer(0)) == bundle_of(spec_of(1, owner="tenant"))
    eventually(lambda: a.lookups.info(key_of(1)) == info_of(spec_of(1, owner="tenant")))
    assert (a.stats().peer_hits, a.stats().peer_hit_bytes) == (1, SIZE)
    for node in (a, b):
        node.flush(60)
        node.check_integrity()
        node.close()


def test_the_reads_of_a_peer_are_many_ranges_at_a_time() -> None:
    directory, peers = DictDirectory(), DirectPeers()
    a, b = two_nodes(directory, peers)
    for number in range(8):
        assert put(b, spec_of(number))
    with a.fetch(a.locate([key_of(number) for number in range(8)])) as fetch:
        assert fetch.wait(LAYERS, 60)
    assert peers.calls == [("b", 8), ("b", 8)], "headers, then everything: it is less than the least read"
    a.close()
    b.close()


def test_nodes_of_this_host_and_memory_are_preferred_and_dead_epochs_are_void() -> None:
    def node(name: str, host_id: str = "elsewhere", epoch: int = 1) -> NodeInfo:
        return NodeInfo(node_id=name, epoch=epoch, host_id=host_id)

    def choice(places: list[Location], *nodes: NodeInfo) -> str | None:
        found = choose_peer(
            key_of(1), places, {each.node_id: each for each in nodes}, node("own", "here"), Avoided(), 0.0
        )
        return None if found is None else found.link

    far, near = Location("far", 1, TierName.HOST, 5), Location("near", 1, TierName.DISK, 5)
    assert choice([far, near], node("far"), node("near", "here")) == "peer:near"
    assert choice([far, near], node("far"), node("near")) == "peer:far", "memory before disk"
    assert choice([far, near], node("far"), node("near", "here", epoch=2)) == "peer:far"
    assert choice([far, near], node("far", epoch=2)) is None
    assert choice([Location("own", 1, TierName.HOST, 5)], node("own", "here")) is None


def test_copies_on_equal_nodes_share_the_load() -> None:
    nodes = {name: NodeInfo(node_id=name, epoch=1, host_id="x") for name in ("a", "b", "c")}
    own = NodeInfo(node_id="own", epoch=1, host_id="here")
    chosen: Counter[str] = Counter()
    for number in range(300):
        key = ObjectKey(random.Random(number).randbytes(32))
        found = choose_peer(key, [Location(name, 1, TierName.HOST, 5) for name in nodes], nodes, own, Avoided(), 0.0)
        assert found is not None
        chosen[found.link] += 1
    assert len(chosen) == 3
    assert min(chosen.values()) > 50


def test_a_dead_peer_is_a_miss_and_is_left_alone_for_a_while() -> None:
    directory, peers, clock = DictDirectory(), DirectPeers(), Clock()
    a, b = two_nodes(directory, peers)
    assert put(b, spec_of(1))
    reader = KvNode(make_settings(node_id="c"), directory=directory, peers=peers, clock=clock)
    reader.start()
    del peers.nodes["b"]
    places = reader.locate([key_of(1)])
    assert len(places) == 1
    with reader.fetch(places) as fetch:
        assert not fetch.wait(0, 60)
        assert fetch.intact() == 0
    assert reader.locate([key_of(1)]) == []
    clock.now += 3
    assert len(reader.locate([key_of(1)])) == 1
    for node in (a, b, reader):
        node.close()


def test_damaged_bytes_of_a_peer_are_not_asked_for_again() -> None:
    directory, peers = DictDirectory(), DirectPeers()
    a, b = two_nodes(directory, peers)
    assert put(b, spec_of(1))
    with a.fetch(a.locate([key_of(1)])) as fetch:
        assert fetch.wait(LAYERS, 60)
    a.quarantine(key_of(1), "checksum")
    assert a.lookups.contains(key_of(1)) == []
    assert a.locate([key_of(1)]) == []
    a.close()
    b.close()


def test_objects_of_a_shared_remote_tier_are_found_and_fetched() -> None:
    remote = DictTier(TierName.REMOTE)
    writer = KvNode(make_settings(), tiers=[remote])
    writer.start()
    assert put(writer, spec_of(1))
    assert writer.flush(60)
    reader = KvNode(make_settings(node_id="b"), tiers=[DictTier(), DictTier(TierName.REMOTE, content=remote.content)])
    reader.start()
    places = reader.locate([key_of(1), key_of(2)])
    assert [(place.tier, place.link) for place in places] == [(TierName.REMOTE, "remote")]
    with reader.fetch(places) as fetch:
        assert fetch.wait(LAYERS, 60)
    assert TierName.HOST in reader.lookups.contains(key_of(1))
    writer.close()
    reader.close()


def test_a_fetch_that_nobody_looks_at_lapses_and_its_memory_rests_before_it_is_used() -> None:
    clock = Clock()
    node = KvNode(make_settings(1), clock=clock)
    assert put(node, spec_of(1))
    fetch = node.fetch(node.locate([key_of(1)]))
    for _ in range(3):
        clock.now += READ_LEASE_S - 1
        node.janitor.reap()
        assert fetch.intact() == 1, "looking at it renews it"
    kept = node.fetch(node.locate([key_of(1)]), lease_s=None)
    clock.now += READ_LEASE_S + 1
    node.janitor.reap()
    assert fetch.intact() == 0
    assert not fetch.wait(0, 0)
    with pytest.raises(ValueError, match="lapsed"):
        fetch.buffer(0)
    assert kept.intact() == 1
    kept.close()
    assert not put(node, spec_of(2)), "its reader may be in the middle of a copy"
    clock.now += 2 * READ_LEASE_S
    node.janitor.reap()
    assert node.stats().fetches_open == 0
    assert put(node, spec_of(2))
    assert node.stats().reaped == 1
    node.check_integrity()
    node.close()


def test_close_ends_waiting_fetches(gate: threading.Event) -> None:
    disk = disk_with(1)
    disk.fault = lambda operation, key: operation == "read" and not gate.wait(60)
    node = KvNode(make_settings(loaders=1), tiers=[disk])
    node.start()
    assert node.wait_indexed(60)
    fetch = node.fetch(node.locate([key_of(1)]))
    answers: list[bool] = []
    waiter = threading.Thread(target=lambda: answers.append(fetch.wait(LAYERS, 30)))
    waiter.start()
    closer = threading.Thread(target=node.close)
    closer.start()
    eventually(lambda: node.begin_put(key_of(5), ObjectInfo(size=1, num_tokens=1)) == "closed")
    gate.set()
    closer.join(60)
    waiter.join(60)
    assert answers in ([False], [True])
    assert not closer.is_alive()
    assert fetch.intact() == 0
