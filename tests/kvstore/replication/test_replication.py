"""Copies of hot objects: who makes them, where they go, and what happens when a node is lost."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tandem.kvstore.directory import EmbeddedDirectory
from tandem.kvstore.interfaces import Location, NodeInfo, ObjectInfo, ObjectKey, TierName
from tandem.kvstore.node import KvNode
from tandem.kvstore.node.settings import NodeSettings
from tandem.kvstore.replication import replication
from tandem.kvstore.replication.replication import (
    HOT_HITS,
    REST_S,
    SETTLE_S,
    Copy,
    Replicator,
    plan_copies,
)
from tandem.kvstore.replication.ring import Ring
from tests.kvstore.node.fakes import eventually, put_content

SIZE = 1_000


def key(number: int) -> ObjectKey:
    return ObjectKey(number.to_bytes(32, "big"))


def nodes(*names: str, hosts: dict[str, str] | None = None) -> dict[str, NodeInfo]:
    return {name: NodeInfo(node_id=name, epoch=1, host_id=(hosts or {}).get(name, name)) for name in names}


# The decision


@settings(max_examples=40, deadline=None)
@given(data=st.data(), names=st.sets(st.sampled_from("abcdefg"), min_size=1), replicas=st.integers(1, 5))
def test_in_few_rounds_every_object_has_its_copies_and_none_is_made_twice(data, names: set[str], replicas: int) -> None:  # type: ignore[no-untyped-def]
    alive = nodes(*sorted(names))
    holding = st.sets(st.sampled_from(sorted(names)), min_size=1)
    holders = {key(number): data.draw(holding) for number in range(6)}
    willing = {name: data.draw(st.booleans(), label=f"{name} finds them hot") for name in names}
    before = {it: set(at) for it, at in holders.items()}
    waited: dict[str, dict[ObjectKey, int]] = {name: {} for name in names}
    for _ in range(len(names) + 1):
        seen = {it: set(at) for it, at in holders.items()}
        for name in names:
            if willing[name]:
                plan = plan_copies(seen, alive, name, replicas, waited[name])
                waited[name] = plan.waiting
                for copy in plan.copies:
                    assert copy.target not in holders[copy.key], "copied twice"
                    holders[copy.key].add(copy.target)
    for it, at in holders.items():
        expected = min(replicas, len(names)) if any(willing[name] for name in before[it]) else len(before[it])
        assert len(at) == max(expected, len(before[it]))


def test_targets_are_the_next_on_the_ring_on_hosts_without_a_copy() -> None:
    alive = nodes("a", "b", "c", "d", hosts={"a": "one", "b": "one", "c": "two", "d": "two"})
    for number in range(50):
        plan = plan_copies({key(number): {"a"}}, alive, "a", 2, {})
        order = [name for name in Ring(alive).owners(key(number), 4) if name in "cd"]
        assert plan.copies == (Copy(key(number), order[0]),)
    assert {copy.target for copy in plan_copies({key(1): {"a"}}, alive, "a", 9, {}).copies} == {"b", "c", "d"}


def test_what_the_directory_does_not_show_here_yet_is_left_alone() -> None:
    assert plan_copies({key(1): {"b"}, key(2): set()}, nodes("a", "b", "c"), "a", 3, {}).copies == ()


# The thread, round by round


class Clock:
    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


class Store:
    """A node with nothing but contents and hits."""

    def __init__(self, name: str, world: World) -> None:
        self.name, self.world = name, world
        self.content: dict[ObjectKey, bytes] = {}
        self.hits: dict[ObjectKey, int] = {}
        self.only_on_disk: set[ObjectKey] = set()
        self.refuses = False
        self.directory_sees = True
        self.replicator = Replicator(self, world, world, 2, node_id=name, clock=world.clock)

    def hot(self, threshold: int) -> list[tuple[ObjectKey, int]]:
        return [(it, hits) for it, hits in self.hits.items() if hits >= threshold]

    def objects(self) -> Iterator[tuple[ObjectKey, ObjectInfo]]:
        return ((it, ObjectInfo(size=SIZE, num_tokens=1)) for it in list(self.content))

    def info(self, wanted: ObjectKey) -> ObjectInfo | None:
        content = self.content.get(wanted)
        return None if content is None else ObjectInfo(size=len(content), num_tokens=1)

    @contextlib.contextmanager
    def view(self, wanted: ObjectKey, *, counts: bool = True) -> Iterator[memoryview | None]:
        assert not counts, "a copy is not a use"
        there = wanted in self.content and wanted not in self.only_on_disk
        yield memoryview(self.content[wanted]) if there else None

    def read_range(self, wanted: ObjectKey, offset: int, out: memoryview) -> bool:
        out[:] = self.content[wanted][offset : offset + len(out)]
        return True


class World:
    """Directory and network of a few stores."""

    def __init__(self) -> None:
        self.clock = Clock()
        self.stores: dict[str, Store] = {}
        self.pushed: list[tuple[str, ObjectKey]] = []

    def start(self, *names: str) -> None:
        for name in names:
            self.stores[name] = Store(name, self)

    def nodes(self) -> dict[str, NodeInfo]:
        return nodes(*self.stores)

    def lookup(self, keys: Sequence[ObjectKey]) -> list[tuple[Location, ...]]:
        seen = [store for store in self.stores.values() if store.directory_sees]
        return [
            tuple(Location(it.name, 1, TierName.HOST, SIZE) for it in seen if wanted in it.content) for wanted in keys
        ]

    def read_many(self, node_id: str, ranges: Sequence[tuple[ObjectKey, int, memoryview]]) -> list[bool]:
        raise NotImplementedError

    def push(self, node_id: str, wanted: ObjectKey, info: ObjectInfo, content: memoryview) -> bool:
        self.pushed.append((node_id, wanted))
        store = self.stores.get(node_id)
        if store is None or store.refuses:
            return False
        store.content[wanted] = bytes(content)
        return True

    def rounds(self, seconds: float) -> None:
        for _ in range(round(seconds)):
            self.clock.now += 1.0
            for store in list(self.stores.values()):
                store.replicator.round()

    def holders(self, number: int) -> set[str]:
        return {name for name, store in self.stores.items() if key(number) in store.content}


@pytest.fixture
def world() -> World:
    world = World()
    world.start("a", "b", "c")
    return world


def test_only_what_is_hot_is_copied_and_only_once(world: World) -> None:
    a = world.stores["a"]
    a.content = {key(1): b"1" * SIZE, key(2): b"2" * SIZE}
    a.hits = {key(1): HOT_HITS, key(2): HOT_HITS - 1}
    world.rounds(SETTLE_S)
    assert not world.pushed, "the nodes have not been the same for long enough"
    world.rounds(30)
    assert len(world.holders(1)) == 2
    assert len(world.holders(2)) == 1
    assert len(world.pushed) == 1
    assert a.replicator.copied == 1
    assert a.replicator.copied_bytes == SIZE


def test_an_object_on_disk_is_copied_too(world: World) -> None:
    a = world.stores["a"]
    a.content, a.hits, a.only_on_disk = {key(1): b"1" * SIZE}, {key(1): 99}, {key(1)}
    world.rounds(SETTLE_S + 3)
    (other,) = world.holders(1) - {"a"}
    assert world.stores[other].content[key(1)] == b"1" * SIZE


def test_a_lost_node_has_its_copies_made_again_by_the_survivor_although_nobody_reads_there(world: World) -> None:
    a = world.stores["a"]
    for number in range(40):
        a.content[key(number)] = b"x" * SIZE
        a.hits[key(number)] = HOT_HITS
    world.rounds(SETTLE_S + 10)
    assert all(len(world.holders(number)) == 2 for number in range(40))
    del world.stores["a"]
    world.rounds(SETTLE_S - 1)
    assert all(len(world.holders(number)) == 1 for number in range(40))
    world.rounds(10)
    assert all(world.holders(number) == {"b", "c"} for number in range(40))


def test_what_a_node_lets_go_by_itself_is_not_forced_on_it_again(world: World) -> None:
    a = world.stores["a"]
    a.content, a.hits = {key(1): b"1" * SIZE}, {key(1): 99}
    world.rounds(SETTLE_S + 3)
    (other,) = world.holders(1) - {"a"}
    del world.stores[other].content[key(1)]
    world.rounds(REST_S / 2)
    assert world.holders(1) == {"a"}
    world.rounds(REST_S)
    assert len(world.holders(1)) == 2, "it is still hot after a rest"


def test_a_refusal_is_counted_and_not_repeated_at_once(world: World) -> None:
    a = world.stores["a"]
    for name in "bc":
        world.stores[name].refuses = True
    a.content, a.hits = {key(1): b"1" * SIZE}, {key(1): 99}
    world.rounds(SETTLE_S + 20)
    assert a.replicator.refused == len(world.pushed) == 1


def test_nothing_is_copied_while_the_directory_does_not_know_what_is_here(world: World) -> None:
    a = world.stores["a"]
    a.content, a.hits, a.directory_sees = {key(1): b"1" * SIZE}, {key(1): 99}, False
    world.rounds(SETTLE_S + 20)
    assert not world.pushed


def test_the_rate_is_bounded(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(replication, "BYTES_PER_S", 2 * SIZE)
    a = world.stores["a"]
    for number in range(30):
        a.content[key(number)] = b"x" * SIZE
        a.hits[key(number)] = HOT_HITS
    world.rounds(SETTLE_S + 1)
    before = len(world.pushed)
    world.rounds(5)
    assert len(world.pushed) - before == 10
    world.rounds(20)
    assert all(len(world.holders(number)) == 2 for number in range(30))


def test_what_is_remembered_is_bounded(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(replication, "MAX_REMEMBERED", 10)
    for number in range(50):
        for name in "ab":
            world.stores[name].content[key(number)] = b"x" * SIZE
    world.rounds(SETTLE_S + 10)
    del world.stores["a"]
    world.rounds(SETTLE_S + 10)
    replicator = world.stores["b"].replicator
    assert len(replicator._elsewhere) <= 10
    assert len(replicator._resting) <= 10
    assert sum(len(world.holders(number)) == 2 for number in range(50)) == 10


# With real nodes


class Source:
    """A real node as the replicator wants it."""

    def __init__(self, node: KvNode) -> None:
        self.node = node
        self.info, self.view, self.read_range = node.lookups.info, node.view, node.read_range

    def hot(self, threshold: int) -> list[tuple[ObjectKey, int]]:
        return list(self.node.lookups.hot(threshold).items())

    def objects(self) -> Iterator[tuple[ObjectKey, ObjectInfo]]:
        return ((stored.key, stored.info) for stored in self.node.lookups.objects())


class DirectPeers:
    def __init__(self, stores: dict[str, KvNode]) -> None:
        self.stores = stores

    def read_many(self, node_id: str, ranges: Sequence[tuple[ObjectKey, int, memoryview]]) -> list[bool]:
        return [self.stores[node_id].read_range(*it) for it in ranges]

    def push(self, node_id: str, wanted: ObjectKey, info: ObjectInfo, content: memoryview) -> bool:
        return put_content(self.stores[node_id], wanted, info, content)


def test_real_nodes_copy_a_hot_object_and_find_it_after_a_loss(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(replication, "ROUND_S", 0.02)
    monkeypatch.setattr(replication, "SETTLE_S", 0.1)
    directory, stores = EmbeddedDirectory(), {}
    peers = DirectPeers(stores)
    replicators = []
    for name in "abc":
        own = NodeSettings(node_id=name, epoch=1, host_id=name, host_bytes=1 << 20)
        stores[name] = KvNode(own, directory=directory, peers=peers)
        stores[name].start()
        replicators.append(Replicator(Source(stores[name]), directory, peers, 2, node_id=name))
        replicators[-1].start()
    try:
        assert put_content(stores["a"], key(1), ObjectInfo(size=SIZE, num_tokens=1), memoryview(b"1" * SIZE))
        for _ in range(HOT_HITS):
            assert stores["a"].read_range(key(1), 0, memoryview(bytearray(10)))
        eventually(lambda: len(directory.lookup([key(1)])[0]) == 2)
        other = next(name for name in "bc" if stores[name].lookups.contains(key(1)))
        content = bytearray(SIZE)
        assert stores[other].read_range(key(1), 0, memoryview(content))
        assert content == b"1" * SIZE
        assert stores["a"].lookups.info(key(1)) == stores[other].lookups.info(key(1))
    finally:
        for replicator in replicators:
            replicator.close()
        for store in stores.values():
            store.close()
        directory.close()
