"""The table of locations against a slow, obvious model; and its rules one by one."""

from __future__ import annotations

import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tandem.kvstore.directory.log import UpdateLog
from tandem.kvstore.directory.messages import FORGET_S, NodeState, Update, Verdict
from tandem.kvstore.directory.table import LocationTable
from tandem.kvstore.interfaces import DirectoryEvent, EventBatch, Location, ObjectKey, StoreIntegrityError, TierName
from tests.kvstore.directory.harness import DISK, HOST, info, key

NEVER = 1e9


def update(name: str, epoch: int, seq: int, *events: tuple[int, TierName, int], reset: bool = False) -> Update:
    batch = EventBatch(name, epoch, seq, tuple(DirectoryEvent(key(it[0]), *it[1:]) for it in events))
    return Update(batch, reset)


class ObviousModel:
    """One dictionary; everything is worked out by looking at all of it."""

    def __init__(self) -> None:
        self.nodes: dict[str, tuple[int, int, float]] = {}
        """Epoch, number, expiry."""
        self.hidden: set[str] = set()
        self.held: dict[tuple[str, ObjectKey, TierName], int] = {}

    def clear(self, name: str) -> None:
        self.held = {place: size for place, size in self.held.items() if place[0] != name}

    def forget(self, name: str) -> None:
        self.clear(name)
        self.nodes.pop(name, None)
        self.hidden.discard(name)

    def announce(self, name: str, epoch: int, seq: int, expires_at: float) -> Verdict:
        known_epoch, known_seq, _ = self.nodes.get(name, (0, 0, 0.0))
        if known_epoch > epoch and name not in self.hidden:
            return Verdict.SUPERSEDED
        if known_epoch != epoch:
            self.forget(name)
            known_seq = 0
        self.nodes[name] = (epoch, known_seq, expires_at)
        self.hidden.discard(name)
        return Verdict.OK if known_seq == seq else Verdict.RESYNC

    def apply(self, said: Update, expires_at: float) -> Verdict:
        name, epoch, seq = said.batch.node_id, said.batch.epoch, said.batch.seq
        if name not in self.nodes:
            return Verdict.RESYNC
        known_epoch, known_seq, _ = self.nodes[name]
        if epoch < known_epoch:
            return Verdict.SUPERSEDED
        if epoch > known_epoch:
            self.hidden.add(name)
            return Verdict.RESYNC
        self.hidden.discard(name)
        self.nodes[name] = (epoch, known_seq, expires_at)
        if seq <= known_seq:
            return Verdict.OK
        if said.reset:
            self.clear(name)
        elif seq != known_seq + 1:
            return Verdict.RESYNC
        for event in said.batch.events:
            self.held.pop((name, event.key, event.tier), None)
            if event.size:
                self.held[name, event.key, event.tier] = event.size
        self.nodes[name] = (epoch, seq, expires_at)
        return Verdict.OK

    def expire(self, now: float) -> None:
        for name, (_, _, expires_at) in list(self.nodes.items()):
            if expires_at <= now:
                self.hidden.add(name)
            if expires_at + FORGET_S <= now:
                self.forget(name)

    def lookup(self, wanted: ObjectKey) -> set[Location]:
        return {
            Location(name, self.nodes[name][0], tier, size)
            for (name, held, tier), size in self.held.items()
            if held == wanted and name not in self.hidden
        }


@settings(max_examples=60, deadline=None)
@given(seed=st.integers(0, 2**32))
def test_random_messages_agree_with_the_obvious_model(seed: int) -> None:
    rng = random.Random(seed)
    table, model, now = LocationTable(), ObviousModel(), 0.0
    keys = [key(number) for number in range(6)]
    for _ in range(150):
        name, epoch, seq = rng.choice("abc"), rng.randint(1, 3), rng.randint(0, 6)
        if rng.random() < 0.7 and name in model.nodes:
            epoch, seq = model.nodes[name][0], model.nodes[name][1] + 1
        expires_at = now + rng.choice((1.0, 3.0))
        match rng.choice(("announce", "apply", "apply", "apply", "withdraw", "time", "sweep")):
            case "announce":
                verdict = table.announce(info(name, epoch), seq, expires_at).verdict
                assert verdict is model.announce(name, epoch, seq, expires_at)
            case "apply":
                events = [(rng.randrange(6), rng.choice((HOST, DISK)), rng.choice((0, 5, 6))) for _ in range(3)]
                said = update(name, epoch, seq, *events, reset=rng.random() < 0.2)
                assert table.apply(said, expires_at).verdict is model.apply(said, expires_at)
            case "withdraw":
                table.withdraw(name, epoch)
                if name in model.nodes and model.nodes[name][0] == epoch:
                    model.forget(name)
            case "time":
                now += rng.choice((0.5, 2.0, 70.0))
                table.expire(now)
                model.expire(now)
            case "sweep":
                table.sweep(rng.randint(1, 4))
        assert [set(found) for found in table.lookup(keys)] == [model.lookup(it) for it in keys]
        assert set(table.states()) == set(model.nodes) - model.hidden
        table.check_integrity()
    while table.sweep(100):
        pass
    assert len(table) == len({held for _, held, _ in model.held})


def test_a_dump_and_the_updates_after_it_make_an_equal_table() -> None:
    source, log = LocationTable(log=(log := UpdateLog())), log
    source.announce(info("a"), 0, NEVER)
    source.apply(update("a", 1, 1, (1, HOST, 5), (2, DISK, 6), reset=True), NEVER)
    cursor = log.read("").cursor
    dump = source.dump("a")
    assert dump is not None
    source.apply(update("a", 1, 2, (1, HOST, 0), (3, HOST, 7)), NEVER)
    copy = LocationTable()
    copy.adopt({"a": NodeState(info("a"), dump.seq)})
    copy.apply(Update(EventBatch("a", dump.epoch, dump.seq, tuple(dump.events)), reset=True), NEVER)
    for said in log.read(cursor).updates:
        copy.apply(said, NEVER)
    numbers = [key(number) for number in range(5)]
    assert copy.lookup(numbers) == source.lookup(numbers)
    assert source.dump("b") is None


def test_a_full_table_records_no_more_keys_until_some_leave() -> None:
    table = LocationTable(max_keys=2)
    table.announce(info("a"), 0, NEVER)
    table.apply(update("a", 1, 1, (1, HOST, 5), (2, HOST, 5), (3, HOST, 5), (1, DISK, 5), reset=True), NEVER)
    assert [len(found) for found in table.lookup([key(1), key(2), key(3)])] == [2, 1, 0]
    assert table.not_recorded == 1
    table.apply(update("a", 1, 2, (2, HOST, 0), (4, HOST, 5)), NEVER)
    assert [len(found) for found in table.lookup([key(2), key(4)])] == [0, 1]
    table.check_integrity()


def test_void_entries_are_taken_back_step_by_step() -> None:
    table = LocationTable()
    table.announce(info("a"), 0, NEVER)
    table.apply(update("a", 1, 1, *[(number, HOST, 5) for number in range(100)], reset=True), NEVER)
    table.withdraw("a", 1)
    assert table.lookup([key(1)]) == [()]
    assert len(table) == 100
    assert table.sweep(60)
    assert len(table) == 40
    assert not table.sweep(60)
    assert len(table) == 0
    table.check_integrity()


@pytest.mark.parametrize(
    ("damage", "finding"),
    [
        (lambda t: t._by_key.__setitem__(key(9), ()), "empty entry"),
        (lambda t: t._by_key.__setitem__(key(1), t._by_key[key(1)] * 2), "twice"),
        (lambda t: t._nodes["a"].keys.add(key(8)), "disagree on 1 keys"),
        (lambda t: t._by_key.pop(key(1)), "disagree on 1 keys"),
        (lambda t: t._nodes.pop("a"), "forgotten incarnation"),
    ],
)
def test_damage_is_found(damage, finding: str) -> None:  # type: ignore[no-untyped-def]
    table = LocationTable()
    table.announce(info("a"), 0, NEVER)
    table.apply(update("a", 1, 1, (1, HOST, 5), reset=True), NEVER)
    table.check_integrity()
    damage(table)
    with pytest.raises(StoreIntegrityError, match=finding):
        table.check_integrity()


def test_the_log_is_bounded_and_reads_on_from_any_cursor() -> None:
    log = UpdateLog(max_events=10)
    assert log.read("").updates == ()
    start = log.read("").cursor
    said = [update("a", 1, seq, (seq, HOST, 1), (seq, DISK, 1)) for seq in range(1, 9)]
    for it in said[:3]:
        log.append(it)
    page = log.read(start)
    assert page.updates == tuple(said[:3])
    assert log.read(page.cursor).updates == ()
    for it in said[3:]:
        log.append(it)
    assert log.read(page.cursor).updates == tuple(said[3:]), "five updates of two events are kept"
    assert log.read(start).updates == tuple(said[3:]), "the first ones are gone"
    assert log.read("another:2").updates == tuple(said[3:])
    assert log.read("nonsense").updates == tuple(said[3:])
    assert log.read(log.read(start).cursor).updates == ()


def test_a_node_whose_clock_was_set_back_is_heard_once_its_earlier_start_is_silent() -> None:
    table, tomorrow, today = LocationTable(), 86_400 * 10**9, 1
    table.announce(info("a", tomorrow), 0, 3.0)
    table.apply(update("a", tomorrow, 1, (1, HOST, 5), reset=True), 3.0)
    assert table.announce(info("a", today), 0, 4.0).verdict is Verdict.SUPERSEDED
    assert table.expire(3.5) == ["a"]
    assert table.announce(info("a", today), 0, 6.5).verdict is Verdict.OK
    assert table.apply(update("a", today, 1, (2, HOST, 6), reset=True), 6.5).verdict is Verdict.OK
    assert table.lookup([key(1), key(2)]) == [(), (Location("a", today, HOST, 6),)]
