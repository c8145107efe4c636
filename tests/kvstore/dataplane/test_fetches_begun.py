"""A look-up of what lies in host memory begins the fetch: it is used by the fetch that follows, or ends."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pytest

from tandem.kvstore.dataplane import channel as connection
from tandem.kvstore.dataplane import protocol
from tandem.kvstore.dataplane.client import RemoteHomeNode
from tandem.kvstore.dataplane.protocol import Kind
from tandem.kvstore.interfaces import TierName
from tandem.kvstore.process.open import open_node
from tandem.kvstore.settings import StoreSettings
from tandem.wire.link import LinkClosed
from tests.kvstore import chunks
from tests.kvstore.homes import connects

from .conftest import DEADLINE_S, Rig
from .scripted_node import key

Eventually = Callable[[Callable[[], object]], None]
KEYS = [key(number) for number in range(3)]


@pytest.fixture(autouse=True)
def unhurried(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(connection, "BEGUN_S", DEADLINE_S)


@pytest.fixture
def home(rig: Rig) -> RemoteHomeNode:
    rig.node.answers_here = True
    for each in KEYS:
        rig.node.store(each, os.urandom(3000))
    return rig.home()


def test_one_question_brings_the_objects(
    rig: Rig, home: RemoteHomeNode, asked: Counter[Kind], eventually: Eventually
) -> None:
    fetch = home.fetch(home.locate(KEYS))
    assert [source.key for source in fetch.sources] == KEYS
    assert fetch.wait(1000, 0)
    assert fetch.intact() == 3
    assert [bytes(fetch.buffer(index)) for index in range(3)] == [rig.node.content(each) for each in KEYS]
    assert asked == {Kind.LOCATE: 1}
    assert not rig.node.fetches[0].closed
    fetch.close()
    eventually(lambda: rig.node.fetches[0].closed)
    assert len(rig.node.fetches) == 1
    with pytest.raises(ValueError, match="closed"):
        fetch.buffer(0)


def test_one_that_nobody_asks_for_ends(
    rig: Rig, home: RemoteHomeNode, eventually: Eventually, monkeypatch: pytest.MonkeyPatch
) -> None:
    located = home.locate(KEYS)
    assert not rig.node.fetches[0].closed
    monkeypatch.setattr(connection, "BEGUN_S", 0.0)
    eventually(lambda: rig.node.fetches[0].closed)
    assert home.fetch(located).intact() == 3


def test_another_look_up_ends_it(rig: Rig, home: RemoteHomeNode, eventually: Eventually) -> None:
    first, second = home.locate(KEYS), home.locate(KEYS[:2])
    eventually(lambda: rig.node.fetches[0].closed)
    assert home.fetch(second).intact() == 2
    assert home.fetch(first).intact() == 3
    assert not rig.node.fetches[1].closed


def test_a_fetch_of_less_is_one_of_its_own(rig: Rig, home: RemoteHomeNode, eventually: Eventually) -> None:
    fetch = home.fetch(home.locate(KEYS)[:2])
    assert [source.key for source in fetch.sources] == KEYS[:2]
    eventually(lambda: rig.node.fetches[0].closed)
    assert not rig.node.fetches[1].closed


def test_each_fetch_has_leases_of_its_own(rig: Rig, home: RemoteHomeNode, eventually: Eventually) -> None:
    located = home.locate(KEYS)
    first, second = home.fetch(located), home.fetch(located)
    first.close()
    eventually(lambda: rig.node.fetches[0].closed)
    assert second.intact() == 3
    assert not rig.node.fetches[1].closed


def test_it_is_lost_with_the_connection(rig: Rig, home: RemoteHomeNode, eventually: Eventually) -> None:
    located = home.locate(KEYS)
    rig.server.stop()
    eventually(lambda: not home.connected)
    eventually(lambda: rig.node.fetches[0].closed)
    assert home.fetch(located).intact() == 0
    rig.start(epoch=2)
    assert connects(home, DEADLINE_S)
    assert home.fetch(located).intact() == 3


def test_two_fetches_have_two_numbers(rig: Rig, home: RemoteHomeNode) -> None:
    link = rig.greeted("unix")
    link.send(Kind.LOCATE, 1, protocol.Locate(KEYS, 7))
    _, body = link.receive(DEADLINE_S)
    assert isinstance(body, protocol.LocatedRun)
    assert len(body.offsets) == 3
    link.send(Kind.LOCATE, 2, protocol.Locate(KEYS, 7))
    with pytest.raises(LinkClosed):
        link.receive(DEADLINE_S)
    link.close()


def test_a_real_node_keeps_what_a_look_up_found_and_counts_it_once(tmp_path: Path, eventually: Eventually) -> None:
    size = chunks.info(0).size
    opened = open_node(StoreSettings(kv_host_bytes=4 * (size + 4096)), "n", 1, unix_path=str(tmp_path / "kv.sock"))
    worker = RemoteHomeNode(str(tmp_path / "kv.sock"), "w")
    assert connects(worker, DEADLINE_S)
    assert chunks.put(worker, 0)
    assert chunks.put(worker, 1)
    located = worker.locate([chunks.key(0), chunks.key(1)])
    assert len(located) == 2
    for number in range(2, 8):  # more than fits beside them
        chunks.put(worker, number)
    fetch = worker.fetch(located)
    assert fetch.intact() == 2
    assert [chunks.is_sound(fetch, index, index) for index in range(2)] == [True, True]
    fetch.close()
    eventually(lambda: opened.node.stats().fetches_open == 0)
    host = opened.node.stats().tier(TierName.HOST)
    assert host is not None
    assert host.hits == 2
    opened.node.check_integrity()
    worker.close()
    opened.close()
