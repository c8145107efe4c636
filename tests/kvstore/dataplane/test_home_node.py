"""`RemoteHomeNode` against a served node: puts, look-ups and fetches in place, and what happens when the node goes."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable

import pytest

from tandem.kvstore.dataplane import channel as connection
from tandem.kvstore.dataplane import puts
from tandem.kvstore.dataplane.client import RemoteHomeNode
from tandem.kvstore.interfaces import Located, ObjectInfo, Refusal, TierName
from tests.kvstore.homes import connects

from .conftest import DEADLINE_S, Rig
from .scripted_node import ScriptedTicket, key

Eventually = Callable[[Callable[[], object]], None]
NEVER_S = 3600.0
"""Nothing may wait so long: the test would be ended."""
INFO = ObjectInfo(size=5000, num_tokens=256, owner="tenant", model="m", recompute_s=0.25)


def test_a_put_is_written_in_the_memory_of_the_node(rig: Rig) -> None:
    home = rig.home()
    content = os.urandom(INFO.size)
    ticket = home.begin_put(key(1), INFO)
    assert not isinstance(ticket, Refusal)
    assert ticket.key == key(1)
    ticket.buffer[:] = content
    assert key(1) not in rig.node.objects
    assert ticket.commit()
    assert home.begin_put(key(1), INFO) is Refusal.EXISTS
    assert rig.node.content(key(1)) == content
    assert rig.node.objects[key(1)][0] == INFO
    assert not ticket.commit()


def test_an_aborted_put_is_aborted_on_the_node(rig: Rig, eventually: Eventually) -> None:
    home = rig.home()
    ticket = home.begin_put(key(1), INFO)
    assert not isinstance(ticket, Refusal)
    ticket.abort()
    ticket.abort()
    eventually(lambda: rig.node.tickets[0].ending == "aborted")
    assert not ticket.commit()


def test_a_put_that_took_too_long_is_not_committed(rig: Rig, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(puts, "SURE_S", 0.0)
    ticket = rig.home().begin_put(key(1), INFO)
    assert not isinstance(ticket, Refusal)
    rig.node.lapsed = True
    assert not ticket.commit()


def test_a_slow_put_that_has_not_lapsed_is_committed(rig: Rig, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(puts, "SURE_S", 0.0)
    ticket = rig.home().begin_put(key(1), INFO)
    assert not isinstance(ticket, Refusal)
    assert ticket.commit()
    assert key(1) in rig.node.objects


def test_a_put_without_room_is_refused(rig: Rig) -> None:
    assert rig.home().begin_put(key(1), ObjectInfo(size=1 << 29, num_tokens=1)) is Refusal.NO_SPACE


def test_located_objects_come_back_as_the_node_says(rig: Rig) -> None:
    home = rig.home()
    for number in (0, 1, 3):
        rig.node.store(key(number), b"x" * 100)
    located = home.locate([key(number) for number in range(4)])
    assert located == [Located(key(number), TierName.HOST, "host", 100) for number in (0, 1)]
    assert home.locate([]) == []


def test_a_slow_look_up_does_not_hold_up_a_put(rig: Rig) -> None:
    home = rig.home()
    rig.node.store(key(0), b"x")
    rig.node.look_up.clear()
    found: list[list[Located]] = []
    thread = threading.Thread(target=lambda: found.append(home.locate([key(0)])))
    thread.start()
    assert not isinstance(home.begin_put(key(1), INFO), Refusal)
    assert thread.is_alive()
    rig.node.look_up.set()
    thread.join(DEADLINE_S)
    assert len(found[0]) == 1


def test_a_fetch_of_resident_objects_is_complete_at_once(rig: Rig, eventually: Eventually) -> None:
    home = rig.home()
    contents = [os.urandom(3000 + number) for number in range(3)]
    for number, content in enumerate(contents):
        rig.node.store(key(number), content)
    fetch = home.fetch(home.locate([key(number) for number in range(3)]))
    assert len(fetch.sources) == 3
    assert fetch.wait(1000, 0)
    assert fetch.intact() == 3
    assert [bytes(fetch.buffer(i)) for i in range(3)] == contents
    assert fetch.buffer(0).readonly
    fetch.close()
    fetch.close()
    eventually(lambda: rig.node.fetches[0].closed)


def test_layers_are_told_as_they_arrive(rig: Rig, eventually: Eventually) -> None:
    home = rig.home()
    rig.node.instant = False
    rig.node.store(key(0), b"a" * 100)
    fetch = home.fetch(home.locate([key(0)]))
    script = rig.node.fetches[0]
    assert not fetch.wait(1, 0)
    script.set(layers=1)
    assert fetch.wait(1, DEADLINE_S)
    assert not fetch.wait(2, 0)
    assert fetch.intact() == 0
    script.set(layers=4)
    assert fetch.wait(4, DEADLINE_S)
    script.finish()
    assert fetch.wait(5, DEADLINE_S)
    assert fetch.intact() == 1


def test_a_failed_fetch_says_so_without_waiting_and_tells_what_is_intact(rig: Rig) -> None:
    home = rig.home()
    rig.node.instant = False
    for number in range(3):
        rig.node.store(key(number), b"a" * 100)
    fetch = home.fetch(home.locate([key(number) for number in range(3)]))
    script = rig.node.fetches[0]
    script.set(layers=2)
    assert fetch.wait(2, DEADLINE_S)
    script.set(layers=2, complete=1, failed=True)
    assert not fetch.wait(3, NEVER_S)
    assert fetch.intact() == 1


def test_what_is_gone_meanwhile_ends_the_sources(rig: Rig) -> None:
    home = rig.home()
    rig.node.store(key(0), b"a" * 100)
    located = home.locate([key(0)])
    fetch = home.fetch([*located, Located(key(1), TierName.HOST, "host", 100)])
    assert fetch.sources == tuple(located)


def test_quarantine_reaches_the_node(rig: Rig, eventually: Eventually) -> None:
    rig.home().quarantine(key(1), "checksum of layer 2")
    eventually(lambda: rig.node.quarantined == [(key(1), "checksum of layer 2")])


def test_everything_is_a_miss_while_the_node_is_away_and_works_when_it_is_back(
    rig: Rig, eventually: Eventually
) -> None:
    rig.server.stop()
    home = rig.home(connected=False)
    assert home.begin_put(key(1), INFO) is Refusal.CLOSED
    assert home.locate([key(1)]) == []
    fetch = home.fetch([Located(key(1), TierName.HOST, "host", 100)])
    assert list(fetch.sources) == []
    assert not fetch.wait(1, 0)
    assert fetch.intact() == 0
    fetch.close()
    home.quarantine(key(1), "")
    rig.start()
    assert connects(home, DEADLINE_S)
    ticket = home.begin_put(key(1), INFO)
    assert not isinstance(ticket, Refusal)
    ticket.buffer[:] = bytes(INFO.size)
    assert ticket.commit()


def test_running_fetches_and_puts_fail_at_once_when_the_node_dies(rig: Rig, eventually: Eventually) -> None:
    home = rig.home()
    rig.node.instant = False
    rig.node.store(key(0), b"a" * 100)
    fetch = home.fetch(home.locate([key(0)]))
    ticket = home.begin_put(key(1), INFO)
    assert not isinstance(ticket, Refusal)
    results: list[bool] = []
    waiter = threading.Thread(target=lambda: results.append(fetch.wait(1, NEVER_S)))
    waiter.start()
    rig.server.stop()
    waiter.join(DEADLINE_S)
    assert results == [False]
    assert fetch.intact() == 0
    eventually(lambda: not home.connected)
    assert not ticket.commit()
    ticket.buffer[:] = bytes(INFO.size)  # still mapped: a late writer does not crash
    rig.start()
    assert connects(home, DEADLINE_S)
    assert home.locate([key(0)])
    assert not ticket.commit()


def test_closing_the_client_ends_its_fetches_and_puts(rig: Rig, eventually: Eventually) -> None:
    home = rig.home()
    rig.node.instant = False
    rig.node.store(key(0), b"a" * 100)
    fetch = home.fetch(home.locate([key(0)]))
    assert not isinstance(home.begin_put(key(1), INFO), Refusal)
    home.close()
    assert not fetch.wait(1, 0)
    eventually(lambda: rig.node.fetches[0].closed and rig.node.tickets[-1].ending == "aborted")
    eventually(lambda: rig.server.stats().connections == 0)


def test_a_broken_connection_of_a_living_client_leaves_its_puts_to_lapse(rig: Rig, eventually: Eventually) -> None:
    """Its threads may still be writing, so the memory must not be given to another object now."""
    home = rig.home()
    ticket = home.begin_put(key(1), INFO)
    assert isinstance(ticket, puts.RemoteTicket)
    channel = home._channel
    assert channel is not None
    channel.fail("a test")
    assert connects(home, DEADLINE_S)
    assert home._channel is not channel
    eventually(lambda: rig.server.stats().connections == 1)
    assert rig.node.tickets[0].ending == ""


def test_the_puts_of_a_killed_worker_are_aborted(rig: Rig, eventually: Eventually) -> None:
    child = os.fork()
    if child == 0:
        home = RemoteHomeNode(rig.path, "victim")
        connects(home, DEADLINE_S)
        home.begin_put(key(1), INFO)
        time.sleep(60)
    try:
        eventually(lambda: rig.node.tickets)
        assert isinstance(rig.node.tickets[0], ScriptedTicket)
    finally:
        os.kill(child, 9)
        os.waitpid(child, 0)
    eventually(lambda: rig.node.tickets[0].ending == "aborted")


def test_a_node_that_does_not_answer_is_taken_for_dead(rig: Rig) -> None:
    home = rig.home()
    rig.node.store(key(0), b"x")
    rig.node.look_up.clear()
    call_s, connection.CALL_S = connection.CALL_S, 0.2
    try:
        assert home.locate([key(0)]) == []
    finally:
        connection.CALL_S = call_s
    rig.node.look_up.set()
    assert connects(home, DEADLINE_S)


def test_many_threads_share_one_connection(rig: Rig) -> None:
    home = rig.home()
    failures: list[str] = []

    def work(base: int) -> None:
        for number in range(base, base + 40):
            content = number.to_bytes(4, "little") * 1000
            ticket = home.begin_put(key(number), ObjectInfo(size=4000, num_tokens=1))
            if isinstance(ticket, Refusal):
                failures.append(ticket)
                continue
            ticket.buffer[:] = content
            fetched = b""
            if ticket.commit() and (located := home.locate([key(number)])):
                fetch = home.fetch(located)
                fetched = bytes(fetch.buffer(0)) if fetch.wait(1, DEADLINE_S) else b""
                fetch.close()
            if fetched != content:
                failures.append(f"object {number}")

    threads = [threading.Thread(target=work, args=(1000 * number,)) for number in range(1, 7)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failures == []
