"""What each directory promises: embedded, served over gRPC, and in a real Valkey."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from tandem.kvstore.directory import embedded as embedded_module
from tandem.kvstore.directory import publisher, redis_directory, watch_directory
from tandem.kvstore.interfaces import Directory, DirectoryEvent, Location, NodeInfo
from tests.kvstore.directory.harness import DISK, HOST, Holder, key, truth

Wait = Callable[[Callable[[], object]], None]
NUMBERS = range(20)


def shows(directory: Directory, *holders: Holder) -> bool:
    found = directory.lookup([key(number) for number in NUMBERS])
    assert len(found) == len(NUMBERS)
    return [set(places) for places in found] == [truth(holders, number) for number in NUMBERS]


def test_what_a_node_holds_and_how_it_changes_is_found(directory) -> None:  # type: ignore[no-untyped-def]
    node = Holder("a", epoch=2**63 - 5)
    for number in range(10):
        node.take(number, size=100 + number)
    node.join(directory)
    assert directory.flush(60)
    assert shows(directory, node)
    node.says(directory, node.take(3, size=0), node.take(4, DISK, size=2**40), node.take(12), node.take(12, size=7))
    assert directory.flush(60)
    assert shows(directory, node)
    assert directory.lookup([key(4)]) == [
        (Location("a", 2**63 - 5, HOST, 104), Location("a", 2**63 - 5, DISK, 2**40)),
    ]
    assert directory.lookup([]) == []


def test_more_than_one_batch_arrives_in_order(directory) -> None:  # type: ignore[no-untyped-def]
    node = Holder("a")
    for number in range(2_000):
        node.take(number)
    node.join(directory)
    for number in range(1_500):
        node.says(directory, node.take(number, size=0))
        node.says(directory, node.take(number + 2_000, DISK))
    assert directory.flush(60)
    found = directory.lookup([key(number) for number in range(3_500)])
    assert found == [()] * 1_500 + [(Location("a", 1, HOST, 100),)] * 500 + [(Location("a", 1, DISK, 100),)] * 1_500


def test_a_later_epoch_voids_the_earlier_one_at_once(directory) -> None:  # type: ignore[no-untyped-def]
    before, after = Holder("a", epoch=9), Holder("a", epoch=10)
    for number in NUMBERS:
        before.take(number)
    before.join(directory)
    assert directory.flush(60)
    after.take(3, DISK)
    after.join(directory)
    assert directory.flush(60)
    assert shows(directory, after)


def test_nodes_can_be_reached_by_what_they_said(directory, eventually: Wait) -> None:  # type: ignore[no-untyped-def]
    told = NodeInfo(
        node_id="näme/1",
        epoch=7,
        host_id="h",
        unix_path="/run/x.sock",
        host="10.0.0.1",
        port=7000,
        grpc_address="10.0.0.1:7001",
        capacity_bytes=1 << 40,
    )
    directory.register(told, list)
    eventually(lambda: directory.nodes() == {"näme/1": told})
    directory.register(Holder("b").info, list)
    eventually(lambda: set(directory.nodes()) == {"näme/1", "b"})


def test_too_many_queued_changes_are_said_again_as_a_whole(
    directory, monkeypatch: pytest.MonkeyPatch, eventually: Wait
) -> None:  # type: ignore[no-untyped-def]
    node = Holder("a")
    node.join(directory)
    assert directory.flush(60)
    monkeypatch.setattr(publisher, "MAX_QUEUED", 50)
    events = [node.take(number) for number in range(200)]
    directory.publish("a", events)
    assert directory.flush(60)
    assert node.snapshots == 2
    assert shows(directory, node)


def test_a_snapshot_that_raises_is_asked_for_again(directory, monkeypatch: pytest.MonkeyPatch) -> None:  # type: ignore[no-untyped-def]
    monkeypatch.setattr(publisher, "RETRY_S", 0.01)
    node, calls = Holder("a"), []
    node.take(1)

    def snapshot() -> list[DirectoryEvent]:
        calls.append(1)
        if len(calls) == 1:
            raise RuntimeError("not ready")
        return node.snapshot()

    directory.register(node.info, snapshot)
    assert directory.flush(60)
    assert shows(directory, node)


def test_a_closed_directory_finds_nothing_and_closes_twice(address: str, connect) -> None:  # type: ignore[no-untyped-def]
    directory, node = connect(address), Holder("a")
    node.take(1)
    node.join(directory)
    assert directory.flush(60)
    directory.close()
    directory.close()
    directory.publish("a", [node.take(2)])
    assert directory.lookup([key(1)]) == [()]


def test_changes_of_a_stranger_are_ignored(directory) -> None:  # type: ignore[no-untyped-def]
    directory.publish("nobody", [DirectoryEvent(key(1), HOST, 5)])
    assert directory.flush(60)
    assert shows(directory)


def test_a_closed_connection_takes_its_nodes_along(address: str, connect, eventually: Wait) -> None:  # type: ignore[no-untyped-def]
    first, second = connect(address), connect(address)
    a, b = Holder("a"), Holder("b")
    for number in range(5):
        a.take(number)
        b.take(number, DISK)
    a.join(first)
    b.join(second)
    assert first.flush(60)
    assert second.flush(60)
    assert shows(first, a, b)
    assert shows(second, a, b)
    second.close()
    assert shows(first, a)
    eventually(lambda: set(first.nodes()) == {"a"})


def test_a_silent_node_is_hidden_within_its_time_and_comes_back(
    address: str, connect, monkeypatch: pytest.MonkeyPatch, eventually: Wait
) -> None:  # type: ignore[no-untyped-def]
    monkeypatch.setattr(embedded_module, "NODE_TTL_S", 0.2)
    monkeypatch.setattr(redis_directory, "_TTL_MS", 200)
    monkeypatch.setattr(publisher, "BEAT_S", 0.05)
    first, second = connect(address), connect(address)
    a, b = Holder("a"), Holder("b")
    a.take(1)
    b.take(1)
    a.join(first)
    b.join(second)
    assert first.flush(60)
    assert second.flush(60)
    eventually(lambda: shows(first, a, b))
    announce, second.announce = second.announce, lambda node, seq: publisher.Reply(publisher.Verdict.OK, seq)
    eventually(lambda: shows(first, a))
    second.announce = announce
    eventually(lambda: shows(first, a, b))
    assert b.snapshots == 1, "what it had said was only hidden"


def test_a_watcher_sees_what_the_directory_sees(address: str, connect, eventually: Wait) -> None:  # type: ignore[no-untyped-def]
    first, second = connect(address), connect(address)
    a, b = Holder("a"), Holder("b")
    for number in range(10):
        a.take(number)
    a.join(first)
    assert first.flush(60)
    watcher = watch_directory(address)
    try:
        eventually(lambda: shows(watcher, a))
        b.take(3, DISK)
        b.join(second)
        a.says(first, a.take(2, size=0), a.take(15, size=3))
        eventually(lambda: shows(watcher, a, b))
        assert watcher.nodes() == {"a": a.info, "b": b.info}
        after = Holder("a", epoch=2)
        after.take(1)
        after.join(first)
        eventually(lambda: shows(watcher, after, b))
        second.close()
        eventually(lambda: shows(watcher, after))
        watcher.check_integrity()
    finally:
        watcher.close()
