"""Whatever is lost, doubled, delayed or reordered, and whoever restarts: in the end everybody sees the truth."""

from __future__ import annotations

import random

from hypothesis import given, settings
from hypothesis import strategies as st

from tandem.kvstore.directory import DirectoryWatcher, EmbeddedDirectory, publisher
from tandem.kvstore.directory.messages import FORGET_S, NODE_TTL_S
from tandem.kvstore.directory.publisher import Publisher
from tests.kvstore.directory.harness import DISK, HOST, FaultyFeed, FaultyUplink, Holder, key, truth

NUMBERS = range(12)


class World:
    """One directory, up to three nodes and a watcher; time passes only when told to."""

    def __init__(self, rng: random.Random) -> None:
        self.rng = rng
        self.now = 0.0
        self.directory = EmbeddedDirectory(clock=self.clock)
        self.feed = FaultyFeed(self.directory, rng)
        self.watcher = DirectoryWatcher(self.feed, start=False)
        self.holders: dict[str, Holder] = {}
        self.publishers: dict[str, Publisher] = {}
        self.uplinks: dict[str, FaultyUplink] = {}
        self.gone: list[FaultyUplink] = []
        self.epoch = 0

    def clock(self) -> float:
        return self.now

    def start_node(self, name: str) -> None:
        self.epoch += 1
        self.holders[name] = Holder(name, self.epoch)
        self.uplinks[name] = FaultyUplink(self.directory, self.rng)
        self.publishers[name] = Publisher(self.uplinks[name], "never started", self.clock)
        self.publishers[name].register(self.holders[name].info, self.holders[name].snapshot)

    def kill_node(self, name: str) -> None:
        """Without a word; what it sent before may still arrive."""
        self.gone.append(self.uplinks.pop(name))
        del self.holders[name], self.publishers[name]

    def restart_directory(self) -> None:
        self.directory.close()
        self.directory = self.feed.source = EmbeddedDirectory(clock=self.clock)
        for uplink in (*self.uplinks.values(), *self.gone):
            uplink.to = self.directory

    def step(self) -> None:
        rng, name = self.rng, self.rng.choice("abc")
        rare = ("poll", "poll", "time", "late", "node", "kill", "directory")
        match rng.choice(("change",) * 8 + ("pump",) * 4 + rare):
            case "change" if name in self.holders:
                event = self.holders[name].take(rng.choice(NUMBERS), rng.choice((HOST, DISK)), rng.choice((0, 3, 4)))
                self.publishers[name].publish(name, [event])
            case "pump" if name in self.publishers:
                self.publishers[name].pump()
            case "poll":
                self.watcher.poll(states=rng.random() < 0.3)
            case "time":
                self.now += rng.choice((0.3, 1.1, 4.0))
            case "late" if name in self.uplinks:
                self.uplinks[name].deliver_late()
            case "node":
                if name in self.holders:
                    self.kill_node(name)
                self.start_node(name)
            case "kill" if name in self.holders and rng.random() < 0.3:
                self.kill_node(name)
            case "directory" if rng.random() < 0.2:
                self.restart_directory()

    def heal(self) -> None:
        self.feed.faults = 0.0
        for uplink in self.uplinks.values():
            uplink.faults = 0.0
        for _ in range(8):  # the dead are found out, the living are heard again
            self.now += NODE_TTL_S / 4
            for one in self.publishers.values():
                one.pump()
            for uplink in (*self.uplinks.values(), *self.gone):
                uplink.deliver_late()
            self.directory._table.expire(self.now)
        for _ in range(3):
            self.watcher.poll()

    def check(self) -> None:
        for number in NUMBERS:
            expected = truth(self.holders.values(), number)
            assert set(self.directory.lookup([key(number)])[0]) == expected
            assert set(self.watcher.lookup([key(number)])[0]) == expected
        assert self.watcher.nodes() == {name: holder.info for name, holder in self.holders.items()}
        self.directory.check_integrity()
        self.watcher.check_integrity()


@settings(max_examples=60, deadline=None)
@given(seed=st.integers(0, 2**32), faults=st.sampled_from((0.0, 0.1, 0.4)))
def test_after_any_faults_and_restarts_everybody_sees_the_truth(seed: int, faults: float) -> None:
    world = World(random.Random(seed))
    try:
        world.start_node("a")
        for _ in range(3):
            for _ in range(60):
                world.feed.faults = faults
                for uplink in world.uplinks.values():
                    uplink.faults = faults
                world.step()
            world.heal()
            world.check()
    finally:
        world.directory.close()


def test_a_queue_that_overflows_while_the_directory_is_away_ends_in_the_truth(monkeypatch) -> None:  # type: ignore[no-untyped-def]
    monkeypatch.setattr(publisher, "MAX_QUEUED", 4)
    world = World(random.Random(1))
    try:
        world.start_node("a")
        world.heal()
        world.uplinks["a"].faults = 1.0
        for number in (*NUMBERS, *NUMBERS):
            world.publishers["a"].publish("a", [world.holders["a"].take(number, size=number)])
            world.publishers["a"].pump()
        world.heal()
        world.check()
    finally:
        world.directory.close()


def test_a_watcher_keeps_what_it_knows_while_the_directory_is_away() -> None:
    world = World(random.Random(1))
    try:
        world.start_node("a")
        world.holders["a"].take(1)
        world.heal()
        world.check()
        world.feed.faults = 1.0
        world.feed._rng = _First()
        world.now += 2 * FORGET_S
        assert not world.watcher.poll()
        assert set(world.watcher.lookup([key(1)])[0]) == truth(world.holders.values(), 1)
    finally:
        world.directory.close()


class _First(random.Random):
    """Every fault, and always the first kind: out of reach."""

    def random(self) -> float:
        return 0.0

    def choice(self, options):  # type: ignore[no-untyped-def]
        return options[0]


def test_a_process_that_was_replaced_does_not_disturb_its_successor() -> None:
    world = World(random.Random(1))
    try:
        world.start_node("a")
        world.heal()
        old, old_publisher = world.holders["a"], world.publishers["a"]
        world.start_node("a")
        world.holders["a"].take(2)
        world.heal()
        old_publisher.publish("a", [old.take(1)])
        world.now += 1.5
        old_publisher.pump()
        world.heal()
        world.check()
    finally:
        world.directory.close()


def test_the_watcher_asks_for_a_whole_node_only_when_something_is_missing() -> None:
    world = World(random.Random(1))
    try:
        world.start_node("a")
        world.heal()
        assert world.watcher.resyncs == 1
        for number in NUMBERS:
            world.publishers["a"].publish("a", [world.holders["a"].take(number)])
            world.publishers["a"].pump()
            world.watcher.poll()
        world.check()
        assert world.watcher.resyncs == 1
    finally:
        world.directory.close()
