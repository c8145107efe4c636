"""How a node's changes reach the directory: what is sent, what is sent again, and what is not."""

from __future__ import annotations

import logging

import pytest

from tandem.kvstore.directory import publisher
from tandem.kvstore.directory.messages import BEAT_S, MAX_BATCH, UNREACHABLE, Reply, Update, Verdict
from tandem.kvstore.directory.publisher import Publisher
from tandem.kvstore.interfaces import DirectoryEvent, NodeInfo
from tests.kvstore.directory.harness import Holder


class Recorder:
    """A directory that remembers what it was told; `answers` are given first."""

    def __init__(self) -> None:
        self.seqs: dict[str, int] = {}
        self.announced = 0
        self.updates: list[Update] = []
        self.answers: list[Reply] = []
        self.withdrawn: list[tuple[str, int]] = []

    def announce(self, node: NodeInfo, seq: int) -> Reply:
        self.announced += 1
        if self.answers:
            return self.answers.pop(0)
        known = self.seqs.get(node.node_id, 0)
        return Reply(Verdict.OK if seq == known else Verdict.RESYNC, known)

    def apply(self, update: Update) -> Reply:
        self.updates.append(update)
        if self.answers:
            return self.answers.pop(0)
        self.seqs[update.batch.node_id] = update.batch.seq
        return Reply(Verdict.OK, update.batch.seq)

    def withdraw(self, node_id: str, epoch: int) -> None:
        self.withdrawn.append((node_id, epoch))


class Bench:
    def __init__(self) -> None:
        self.now = 100.0
        self.directory = Recorder()
        self.publisher = Publisher(self.directory, "never started", lambda: self.now)
        self.node = Holder("a")
        self.node.take(1)
        self.node.join(self.publisher)  # type: ignore[arg-type]  # it registers like a directory

    def change(self, number: int) -> DirectoryEvent:
        event = self.node.take(number)
        self.publisher.publish("a", [event])
        return event

    def pump_all(self) -> float:
        """All that can be sent now."""
        while (wait_s := self.publisher.pump()) == 0.0:
            pass
        return wait_s

    def sent(self) -> list[tuple[int, bool, int]]:
        """Number, reset, events of what was sent since the last call."""
        found = [(it.batch.seq, it.reset, len(it.batch.events)) for it in self.directory.updates]
        self.directory.updates.clear()
        return found


@pytest.fixture
def bench() -> Bench:
    return Bench()


def test_first_everything_then_only_changes(bench: Bench) -> None:
    assert bench.publisher.pump() == BEAT_S
    assert bench.sent() == [(1, True, 1)]
    bench.change(2)
    bench.change(3)
    bench.publisher.pump()
    assert bench.sent() == [(2, False, 2)]
    assert bench.directory.announced == 1, "updates show that it lives"
    bench.now += BEAT_S
    bench.publisher.pump()
    assert (bench.directory.announced, bench.sent()) == (2, [])


def test_updates_are_of_bounded_size(bench: Bench) -> None:
    for number in range(MAX_BATCH + 1):
        bench.node.take(number)
    bench.pump_all()
    assert bench.sent() == [(1, True, MAX_BATCH), (2, False, 1)]
    for number in range(MAX_BATCH + 1):
        bench.change(number)
    bench.pump_all()
    assert bench.sent() == [(3, False, MAX_BATCH), (4, False, 1)]


def test_a_lost_update_is_followed_by_everything(bench: Bench) -> None:
    bench.publisher.pump()
    bench.sent()
    bench.change(2)
    bench.directory.answers = [UNREACHABLE]
    assert bench.publisher.pump() == pytest.approx(publisher.RETRY_S)
    bench.sent()
    bench.change(3)
    bench.publisher.pump()
    assert bench.sent() == [], "not before its time"
    bench.now += publisher.RETRY_S
    bench.publisher.pump()
    assert bench.sent() == [(3, True, 3)]


def test_an_update_that_arrived_without_an_answer_is_not_repeated(bench: Bench) -> None:
    bench.publisher.pump()
    bench.sent()
    bench.change(2)
    bench.directory.answers = [UNREACHABLE]
    bench.publisher.pump()
    bench.directory.seqs["a"] = 2
    bench.change(3)
    bench.now += publisher.RETRY_S
    bench.sent()
    bench.publisher.pump()
    assert bench.sent() == [(3, False, 1)]
    assert bench.node.snapshots == 1


def test_a_snapshot_that_breaks_off_is_sent_again_as_a_whole(bench: Bench) -> None:
    for number in range(MAX_BATCH + 1):
        bench.node.take(number)
    bench.directory.answers = [Reply(Verdict.OK), Reply(Verdict.OK, 1), UNREACHABLE]
    bench.pump_all()
    assert bench.sent() == [(1, True, MAX_BATCH), (2, False, 1)]
    bench.directory.seqs["a"] = 2  # it had arrived
    bench.now += publisher.RETRY_S
    bench.pump_all()
    assert bench.sent() == [(3, True, MAX_BATCH), (4, False, 1)]


def test_numbers_go_on_from_what_the_directory_knows(bench: Bench) -> None:
    bench.directory.seqs["a"] = 40
    bench.publisher.pump()
    assert bench.sent() == [(41, True, 1)]


def test_a_node_that_was_replaced_says_so_once(bench: Bench, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.WARNING)
    for _ in range(3):
        bench.directory.answers = [Reply(Verdict.SUPERSEDED, 5)]
        bench.publisher.pump()
        bench.now += publisher.RETRY_S
    assert bench.sent() == []
    assert [record.message for record in caplog.records] == ["a: the directory says: superseded"]


def test_closing_withdraws_once_what_could_be_reached(bench: Bench) -> None:
    bench.publisher.pump()
    bench.publisher.close()
    bench.publisher.close()
    assert bench.directory.withdrawn == [("a", 1)]
    bench.change(2)
    assert not bench.publisher._nodes["a"].queue
    away = Bench()
    away.directory.answers = [UNREACHABLE]
    away.publisher.pump()
    away.publisher.close()
    assert away.directory.withdrawn == []


def test_a_node_with_much_to_say_does_not_silence_another(bench: Bench) -> None:
    bench.pump_all()
    other = Holder("b")
    for number in range(5 * MAX_BATCH):
        other.take(number)
    other.join(bench.publisher)  # type: ignore[arg-type]
    bench.publisher.pump()
    bench.sent()
    bench.change(2)
    bench.now += BEAT_S
    before = bench.directory.announced
    bench.publisher.pump()
    assert bench.directory.announced == before + 2
    assert [len(update.batch.events) for update in bench.directory.updates] == [1, MAX_BATCH]


def test_a_node_that_overflows_while_its_snapshot_is_sent_begins_again(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(publisher, "MAX_QUEUED", 3)
    for number in range(3 * MAX_BATCH):
        bench.node.take(number)
    bench.publisher.pump()
    assert bench.sent() == [(1, True, MAX_BATCH)]
    bench.publisher.publish("a", [bench.node.take(number, size=7) for number in range(4)])
    bench.pump_all()
    assert bench.sent() == [(2, True, MAX_BATCH), (3, False, MAX_BATCH), (4, False, MAX_BATCH)]
