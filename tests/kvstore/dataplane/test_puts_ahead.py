"""Puts that follow each other copy into memory that is held for them: nothing wrong is stored, nothing stays held."""

from __future__ import annotations

import os
import threading
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import replace

import pytest

from tandem.kvstore.dataplane import protocol, puts
from tandem.kvstore.dataplane.client import RemoteHomeNode
from tandem.kvstore.dataplane.connection import MIN_HELD_OBJECTS
from tandem.kvstore.dataplane.protocol import Kind
from tandem.kvstore.interfaces import ObjectInfo, PutTicket, Refusal
from tandem.wire.link import LinkClosed
from tests.kvstore.homes import connects

from .conftest import DEADLINE_S, Rig
from .scripted_node import key

Eventually = Callable[[Callable[[], object]], None]
INFO = ObjectInfo(size=5000, num_tokens=256, owner="tenant", model="m", recompute_s=0.25)


@pytest.fixture(autouse=True)
def unhurried(monkeypatch: pytest.MonkeyPatch) -> None:
    """Puts follow each other however slow the machine is."""
    monkeypatch.setattr(puts, "NEXT_S", DEADLINE_S)


def begin(home: RemoteHomeNode, number: int, info: ObjectInfo = INFO) -> PutTicket:
    ticket = home.begin_put(key(number), info)
    assert not isinstance(ticket, Refusal)
    return ticket


def content_of(number: int, size: int = INFO.size) -> bytes:
    return (number.to_bytes(4, "little") * size)[:size]


def put(home: RemoteHomeNode, number: int, info: ObjectInfo = INFO) -> bool:
    ticket = begin(home, number, info)
    ticket.buffer[:] = content_of(number, info.size)
    return ticket.commit()


def open_tickets(rig: Rig) -> int:
    return sum(not ticket.ending for ticket in rig.node.tickets)


def test_from_the_third_on_no_put_waits_for_leave(rig: Rig, asked: Counter[Kind], eventually: Eventually) -> None:
    home = rig.home()
    infos = [replace(INFO, recompute_s=float(number), model=f"m{number}") for number in range(20)]
    for number, info in enumerate(infos):
        assert put(home, number, info)
    assert len(home.locate([key(number) for number in range(20)])) == 20
    assert asked[Kind.BEGIN_PUT] == 2
    for number, info in enumerate(infos):
        assert rig.node.content(key(number)) == content_of(number)
        assert rig.node.objects[key(number)][0] == info
    assert open_tickets(rig) == puts.NUM_AHEAD


def test_puts_far_apart_hold_nothing(rig: Rig, asked: Counter[Kind], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(puts, "NEXT_S", 0.0)
    home = rig.home()
    for number in range(5):
        assert put(home, number)
    assert len(home.locate([key(number) for number in range(5)])) == 5
    assert asked[Kind.BEGIN_PUT] == 5
    assert open_tickets(rig) == 0


def test_what_no_put_comes_for_is_given_back(rig: Rig, eventually: Eventually, monkeypatch: pytest.MonkeyPatch) -> None:
    home = rig.home()
    for number in range(4):
        assert put(home, number)
    monkeypatch.setattr(puts, "NEXT_S", 0.05)
    eventually(lambda: len(rig.node.objects) == 4 and open_tickets(rig) == 0)
    assert put(home, 4)


def test_what_is_held_is_kept_while_a_put_is_being_copied(rig: Rig, monkeypatch: pytest.MonkeyPatch) -> None:
    home = rig.home()
    for number in range(3):
        assert put(home, number)
    slow = begin(home, 3)
    monkeypatch.setattr(puts, "NEXT_S", 0.0)
    channel = home._channel
    assert channel is not None
    channel.puts.tidy()
    assert len(channel.puts._held) == puts.NUM_AHEAD - 1
    assert slow.commit()


@pytest.mark.parametrize("other", [replace(INFO, size=6000), replace(INFO, owner="another")])
def test_another_size_or_owner_gets_memory_of_its_own(rig: Rig, other: ObjectInfo, eventually: Eventually) -> None:
    home = rig.home()
    for number in range(8):
        assert put(home, number, other if number in (3, 5, 6, 7) else INFO)
    assert len(home.locate([key(number) for number in range(8)])) == 8
    for number in range(8):
        info = other if number in (3, 5, 6, 7) else INFO
        assert rig.node.content(key(number)) == content_of(number, info.size)
        assert rig.node.objects[key(number)][0] == info
    eventually(lambda: open_tickets(rig) <= puts.NUM_AHEAD)


def test_whoever_is_first_has_put_it(rig: Rig, eventually: Eventually) -> None:
    home, other = rig.home(), rig.home()
    for number in range(3):
        assert put(home, number)
    ticket = begin(home, 3)  # nobody knows of it so far
    first = begin(other, 3)
    first.buffer[:] = b"1" * INFO.size
    assert first.commit()
    assert other.locate([key(3)])
    ticket.buffer[:] = b"2" * INFO.size
    assert ticket.commit()
    assert put(home, 4)
    assert home.locate([key(4)])
    assert rig.node.content(key(3)) == b"1" * INFO.size


def test_an_aborted_put_into_held_memory_is_aborted_on_the_node(rig: Rig, eventually: Eventually) -> None:
    home = rig.home()
    for number in range(3):
        assert put(home, number)
    ticket = begin(home, 3)
    ticket.abort()
    ticket.abort()
    assert not ticket.commit()
    eventually(lambda: sum(ticket.ending == "aborted" for ticket in rig.node.tickets) == 1)
    assert key(3) not in rig.node.objects


def test_a_slow_put_into_held_memory_hears_whether_it_has_lapsed(rig: Rig, monkeypatch: pytest.MonkeyPatch) -> None:
    home = rig.home()
    for number in range(3):
        assert put(home, number)
    first, second = begin(home, 3), begin(home, 4)
    monkeypatch.setattr(puts, "SURE_S", 0.0)
    assert first.commit()
    assert key(3) in rig.node.objects
    rig.node.lapsed = True
    assert not second.commit()
    assert key(4) not in rig.node.objects


def test_what_has_been_held_for_long_is_not_used(
    rig: Rig, asked: Counter[Kind], monkeypatch: pytest.MonkeyPatch
) -> None:
    home = rig.home()
    for number in range(3):
        assert put(home, number)
    monkeypatch.setattr(puts, "SURE_S", 0.0)
    assert put(home, 3)
    assert asked[Kind.BEGIN_PUT] == 3


def test_large_objects_are_not_held(rig: Rig, asked: Counter[Kind]) -> None:
    home = rig.home()
    large = ObjectInfo(size=rig.node.arena.capacity_bytes // MIN_HELD_OBJECTS + 1, num_tokens=1)
    for number in range(4):
        assert put(home, number, large)
    assert home.locate([key(3)])
    assert asked[Kind.BEGIN_PUT] == 4
    assert open_tickets(rig) == 0


def test_a_full_node_refuses_in_a_run_as_ever(rig: Rig) -> None:
    home = rig.home()
    info = ObjectInfo(size=rig.node.arena.capacity_bytes // MIN_HELD_OBJECTS, num_tokens=1)
    outcomes = [home.begin_put(key(number), info) for number in range(MIN_HELD_OBJECTS + 2)]
    assert all(isinstance(outcome, puts.RemoteTicket) for outcome in outcomes[:MIN_HELD_OBJECTS])
    assert outcomes[MIN_HELD_OBJECTS:] == [Refusal.NO_SPACE] * 2


def test_closing_gives_back_what_is_held(rig: Rig, eventually: Eventually) -> None:
    home = rig.home()
    for number in range(4):
        assert put(home, number)
    begin(home, 4)
    home.close()
    eventually(lambda: rig.server.stats().connections == 0)
    assert open_tickets(rig) == 0


def test_a_worker_killed_in_the_middle_of_a_run_leaves_nothing(rig: Rig, eventually: Eventually) -> None:
    child = os.fork()
    if child == 0:
        home = RemoteHomeNode(rig.path, "victim")
        connects(home, DEADLINE_S)
        for number in range(4):
            put(home, number)
        begin(home, 4).buffer[:100] = b"x" * 100
        time.sleep(60)
    try:
        eventually(lambda: len(rig.node.objects) == 4 and open_tickets(rig) == puts.NUM_AHEAD)
    finally:
        os.kill(child, 9)
        os.waitpid(child, 0)
    eventually(lambda: open_tickets(rig) == 0)
    assert key(4) not in rig.node.objects


def test_a_run_goes_on_after_a_restart_of_the_node(rig: Rig, eventually: Eventually) -> None:
    home = rig.home()
    for number in range(3):
        assert put(home, number)
    ticket = begin(home, 3)
    rig.server.stop()
    eventually(lambda: not home.connected)
    ticket.buffer[:] = content_of(3)  # still mapped: a late writer does not crash
    assert not ticket.commit()
    assert home.begin_put(key(4), INFO) is Refusal.CLOSED
    rig.start(epoch=2)
    assert connects(home, DEADLINE_S)
    for number in range(5, 10):
        assert put(home, number)
    assert len(home.locate([key(number) for number in range(5, 10)])) == 5
    assert key(3) not in rig.node.objects
    assert all(rig.node.content(key(number)) == content_of(number) for number in range(5, 10))


def test_threads_of_one_worker_put_at_once(rig: Rig) -> None:
    home = rig.home()
    failures: list[int] = []

    def work(base: int) -> None:
        failures.extend(number for number in range(base, base + 60) if not put(home, number))

    threads = [threading.Thread(target=work, args=(1000 * number,)) for number in range(1, 5)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    numbers = [1000 * thread + number for thread in range(1, 5) for number in range(60)]
    assert len(home.locate([key(number) for number in numbers])) == len(numbers)
    assert failures == [number for number in numbers if rig.node.content(key(number)) != content_of(number)] == []
    assert open_tickets(rig) <= puts.NUM_AHEAD


@pytest.mark.parametrize(
    "commit",
    [
        protocol.Commit(1, False, key(2), replace(INFO, size=INFO.size + 1)),
        protocol.Commit(1, False, key(2), replace(INFO, owner="another")),
        protocol.Commit(1, False, None, INFO, [2, 2]),
        protocol.Commit(1, False, None, INFO, list(range(2, 3 + protocol.MAX_HELD))),
        protocol.Commit(1, False, None, replace(INFO, size=-5), [2]),
    ],
)
def test_a_commit_that_breaks_the_rules_ends_the_connection_or_holds_nothing(
    rig: Rig, commit: protocol.Commit, eventually: Eventually
) -> None:
    link = rig.greeted("unix")
    link.send(Kind.BEGIN_PUT, 1, protocol.BeginPut(key(1), INFO))
    assert isinstance(link.receive(DEADLINE_S)[1], protocol.Ticket)
    link.send(Kind.COMMIT, 9, commit)
    try:
        assert link.receive(DEADLINE_S)[1] == protocol.Held([-1])
    except LinkClosed:
        eventually(lambda: rig.server.stats().malformed_frames == 1)
    link.close()
    assert key(2) not in rig.node.objects
