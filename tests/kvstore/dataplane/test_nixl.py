"""Peer reads over NIXL: with a stand-in that fails as a test wants, and with the library itself where it is there."""

from __future__ import annotations

import importlib.util
import os
import random
import sys
import threading
import time
from collections.abc import Callable, Iterator
from types import ModuleType
from typing import Any

import pytest

from tandem.common.errors import ConfigError
from tandem.kvstore.dataplane import nixl as nixl_module
from tandem.kvstore.dataplane.nixl import PACKAGES, NixlAgent, NixlWindow
from tandem.kvstore.dataplane.peer_reader import SocketPeerReader
from tandem.kvstore.dataplane.protocol import DATA_PLANE, PATIENCE, AgentInfo, Kind, Lease, Leased, Range
from tandem.kvstore.dataplane.server import DataServer
from tandem.kvstore.dataplane.windows import Outcome
from tandem.kvstore.interfaces import NodeInfo, ObjectKey
from tandem.wire.handshake import greet
from tandem.wire.link import Link, connect_tcp
from tandem.wire.peers import PeerIdentity
from tandem.wire.protocol import expect

from .conftest import DEADLINE_S
from .fake_nixl import FakeNixl, arena_of
from .scripted_node import ScriptedNode, key

SIZE = 4 << 20
INSTALLED = any(importlib.util.find_spec(package) for package in PACKAGES)
REAL = pytest.param("nixl", marks=pytest.mark.skipif(not INSTALLED, reason="NIXL is not installed"))


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch) -> FakeNixl:
    library = FakeNixl()
    monkeypatch.setattr(nixl_module, "load_library", lambda: library)
    monkeypatch.setattr(nixl_module, "STALL_S", 0.05)  # of transfers that hang for as long as the test lets them
    monkeypatch.setattr(nixl_module, "RETRY_S", 0.0)
    return library


@pytest.fixture(params=["fake", REAL])
def library(request: pytest.FixtureRequest) -> FakeNixl | None:
    """None: the real one."""
    return request.getfixturevalue("fake") if request.param == "fake" else None


class Kept:
    """`nixl.Keep` that remembers."""

    def __init__(self) -> None:
        self.ranges: set[tuple[int, int]] = set()

    def __call__(self, start: int, stop: int) -> Callable[[], None]:
        self.ranges.add((start, stop))
        return lambda: self.ranges.remove((start, stop))


class Pair:
    """A node that is read and one that reads, by their arenas."""

    def __init__(self) -> None:
        self.theirs, self.ours = arena_of(SIZE, 0), arena_of(SIZE, 255)
        self.theirs[:] = random.Random(7).randbytes(SIZE)
        self.kept = Kept()
        self.their_agent, self.agent = NixlAgent("theirs"), NixlAgent("ours")
        self.their_agent.register(self.theirs, Kept())
        self.agent.register(self.ours, self.kept)

    def open(self) -> NixlWindow:
        assert self.their_agent.info is not None
        window = self.agent.open(self.their_agent.info)
        assert window is not None
        return window

    def close(self) -> None:
        self.agent.close()
        self.their_agent.close()


@pytest.fixture
def pair(library: FakeNixl | None) -> Iterator[Pair]:
    pair = Pair()
    yield pair
    pair.close()


@pytest.fixture
def fake_pair(fake: FakeNixl) -> Iterator[Pair]:
    pair = Pair()
    yield pair
    pair.close()


def test_places_of_any_size_arrive_in_their_buffers(pair: Pair, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(nixl_module, "PIECE_BYTES", 100_000)
    window = pair.open()
    sizes = [1, 4096, 99_999, 65_536, 1_000_000, 3, 100_000]
    chance = random.Random(1)
    places, expected, end = [], bytearray(pair.ours), 10
    for size in sizes:
        offset = chance.randrange(SIZE - size)
        places.append((offset, pair.ours[end : end + size]))
        expected[end : end + size] = pair.theirs[offset : offset + size]
        end += size + 5
    assert window.read(places) == [Outcome.DONE] * len(sizes)
    assert pair.ours == expected


def test_buffers_outside_of_the_arena_are_left_to_others(pair: Pair) -> None:
    inside, outside = pair.ours[:100], memoryview(bytearray(100))
    assert pair.open().read([(0, outside), (50, inside)]) == [Outcome.NOT_BEGUN, Outcome.DONE]
    assert inside == pair.theirs[50:150]
    assert bytes(outside) == bytes(100)


def test_threads_read_at_the_same_time(pair: Pair) -> None:
    window = pair.open()
    wrong: list[int] = []

    def read(number: int) -> None:
        size = SIZE // 8
        out = pair.ours[number * size : (number + 1) * size]
        for turn in range(10):
            offset = (turn * 7919 + number) % (SIZE - size)
            if window.read([(offset, out)]) != [Outcome.DONE] or out != pair.theirs[offset : offset + size]:
                wrong.append(number)

    threads = [threading.Thread(target=read, args=(number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []


def test_connections_share_a_window_until_the_last_leaves(pair: Pair) -> None:
    first, second = pair.open(), pair.open()
    assert first is second
    first.close()
    assert second.read([(0, pair.ours[:10])]) == [Outcome.DONE]
    second.close()
    again = pair.open()
    assert again is not first
    assert again.read([(0, pair.ours[:10])]) == [Outcome.DONE]


def test_metadata_that_is_none_opens_nothing(pair: Pair) -> None:
    info = pair.their_agent.info
    assert info is not None
    for metadata in (b"", b"garbage", os.urandom(500)):
        assert pair.agent.open(AgentInfo("someone", metadata, info.address, info.arena_bytes)) is None
    assert pair.agent.open(AgentInfo("another", info.metadata, info.address, info.arena_bytes)) is None
    assert pair.agent.info is not None
    assert pair.agent.open(pair.agent.info) is None, "it would read itself"


def test_a_wrong_address_is_refused(pair: Pair) -> None:
    info = pair.their_agent.info
    assert info is not None
    window = pair.agent.open(AgentInfo(info.name, info.metadata, info.address + SIZE, info.arena_bytes))
    assert window is not None
    assert window.read([(0, pair.ours[:10])]) == [Outcome.NOT_BEGUN]


def test_nothing_is_read_after_the_end(pair: Pair) -> None:
    window = pair.open()
    pair.agent.close()
    assert window.read([(0, pair.ours[:10])]) == [Outcome.NOT_BEGUN]
    assert pair.their_agent.info is not None
    assert pair.agent.open(pair.their_agent.info) is None
    window.close()
    pair.agent.close()


def test_a_slow_transfer_is_waited_for(fake: FakeNixl, fake_pair: Pair) -> None:
    fake.script = ["slow", "slow"]
    window = fake_pair.open()
    assert window.read([(5, fake_pair.ours[:10])]) == [Outcome.DONE]
    assert fake_pair.ours[:10] == fake_pair.theirs[5:15]
    assert fake.requests == {}


def test_what_cannot_be_begun_is_left_to_others_and_tried_again_later(
    fake: FakeNixl, fake_pair: Pair, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(nixl_module, "RETRY_S", 1000.0)
    fake.script = ["refused"]
    window = fake_pair.open()
    assert window.read([(0, fake_pair.ours[:10])]) == [Outcome.NOT_BEGUN]
    assert window.read([(0, fake_pair.ours[:10])]) == [Outcome.NOT_BEGUN]
    assert fake.transfers == 0
    assert fake_pair.kept.ranges == set()
    window.retry_at = 0.0
    assert window.read([(0, fake_pair.ours[:10])]) == [Outcome.DONE]


@pytest.mark.parametrize("failure", ["unposted", "fails"])
def test_the_buffers_of_a_failed_transfer_are_lost_and_rest(
    fake: FakeNixl, fake_pair: Pair, monkeypatch: pytest.MonkeyPatch, failure: str
) -> None:
    monkeypatch.setattr(nixl_module, "PIECE_BYTES", 20)
    fake.script = ["slow", failure]
    window = fake_pair.open()
    places = [(number, fake_pair.ours[100 * number : 100 * number + 20]) for number in range(3)]
    assert window.read(places) == [Outcome.DONE, Outcome.LOST, Outcome.NOT_BEGUN]
    assert fake_pair.kept.ranges == {(100, 120)}
    assert window.read([(0, fake_pair.ours[500:510])]) == [Outcome.NOT_BEGUN], "no transfer beside one that may write"
    assert fake_pair.kept.ranges == {(100, 120)}
    for abandoned in fake_pair.agent._abandoned:
        assert abandoned.over_at is not None
        abandoned.over_at = 0.0  # as if it had rested long enough
    assert window.read([(0, fake_pair.ours[500:510])]) == [Outcome.DONE]
    assert fake_pair.kept.ranges == set()
    assert fake.requests == {}


def test_memory_rests_until_a_transfer_that_hung_has_ended(fake: FakeNixl, fake_pair: Pair) -> None:
    fake.script = ["hangs"]
    window = fake_pair.open()
    assert window.read([(7, fake_pair.ours[:10])]) == [Outcome.LOST]
    for _ in range(3):
        assert window.read([(0, fake_pair.ours[50:60])]) == [Outcome.NOT_BEGUN]
    assert fake_pair.kept.ranges == {(0, 10)}
    assert fake_pair.ours[:10] == b"\xff" * 10
    fake.finish()
    assert fake_pair.ours[:10] == fake_pair.theirs[7:17], "it wrote late"
    assert window.read([(0, fake_pair.ours[50:60])]) == [Outcome.DONE]
    assert fake_pair.kept.ranges == set()
    assert fake.requests == {}


def test_a_connection_that_leaves_does_not_end_what_hangs(fake: FakeNixl, fake_pair: Pair) -> None:
    fake.script = ["hangs"]
    window = fake_pair.open()
    assert window.read([(0, fake_pair.ours[:10])]) == [Outcome.LOST]
    window.close()  # the stand-in raises if the connection is taken down now
    fake.finish()
    fake_pair.agent.sweep()
    assert fake_pair.kept.ranges == set()
    assert fake.agents[fake_pair.agent._name].remotes == set()


def test_what_hangs_at_the_end_keeps_its_memory_registered(
    fake: FakeNixl, fake_pair: Pair, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(nixl_module, "CLOSE_S", 0.0)
    fake.script = ["hangs"]
    assert fake_pair.open().read([(3, fake_pair.ours[:10])]) == [Outcome.LOST]
    fake_pair.agent.close()
    assert len(fake.agents[fake_pair.agent._name].memory) == 1
    fake.finish()
    assert fake_pair.ours[:10] == fake_pair.theirs[3:13]


def test_a_node_that_is_gone_is_not_read(fake: FakeNixl, fake_pair: Pair) -> None:
    window = fake_pair.open()
    fake.kill(fake_pair.their_agent._name)
    assert window.read([(0, fake_pair.ours[:10])]) == [Outcome.LOST]
    assert window.read([(0, fake_pair.ours[20:30])]) == [Outcome.NOT_BEGUN]


def test_without_the_library_the_setting_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(nixl_module, "PACKAGES", ("no_such_nixl",))
    with pytest.raises(ConfigError, match=r"kv_nixl.*no_such_nixl.*pip install"):
        NixlAgent("n")


def test_memory_that_cannot_be_registered_is_named(fake: FakeNixl, monkeypatch: pytest.MonkeyPatch) -> None:
    agent = NixlAgent("n")
    monkeypatch.setattr(nixl_module, "MAX_METADATA_BYTES", 3)
    with pytest.raises(ConfigError, match="metadata"):
        agent.register(arena_of(SIZE, 0), Kept())
    monkeypatch.setattr(FakeNixl, "nixlRegDList", None)
    with pytest.raises(ConfigError, match=r"kv_nixl.*ulimit -l"):
        agent.register(arena_of(SIZE, 0), Kept())


def test_the_first_package_that_can_be_imported_is_used(monkeypatch: pytest.MonkeyPatch) -> None:
    module = ModuleType("second._bindings")
    monkeypatch.setattr(nixl_module, "PACKAGES", ("first", "second"))
    monkeypatch.setitem(sys.modules, "second._bindings", module)
    assert nixl_module.load_library() is module


# Over connections


class Peers:
    """A served node with an agent, and a reader whose buffers lie in an arena of its own."""

    def __init__(self) -> None:
        self.node = ScriptedNode(SIZE)
        self.arena = arena_of(SIZE, 0)
        self.kept = Kept()
        self.server_agent: NixlAgent | None = NixlAgent("n0")
        self.server_agent.register(self.node.arena.view(0, SIZE), Kept())
        self.agent = NixlAgent("reader")
        self.agent.register(self.arena, self.kept)
        self.epoch = 1
        self.server = self.start()
        self.reader = SocketPeerReader(lambda: {"n0": self.info}, "peer", agent=self.agent)

    def start(self) -> DataServer:
        identity = PeerIdentity("n0", self.epoch)
        server = DataServer(self.node, identity, listen=("127.0.0.1", 0), agent=self.server_agent)
        server.start()
        self.info = NodeInfo(node_id="n0", epoch=self.epoch, host_id="there", host="127.0.0.1", port=server.port)
        self.server = server
        return server

    def restart(self, *, with_agent: bool = True) -> None:
        self.server.stop()
        assert self.server_agent is not None
        self.server_agent.close()
        self.server_agent = NixlAgent("n0") if with_agent else None
        if self.server_agent is not None:
            self.server_agent.register(self.node.arena.view(0, SIZE), Kept())
        self.epoch += 1
        self.start()

    def ranges(self, *wanted: tuple[int, int, int]) -> list[tuple[ObjectKey, int, memoryview]]:
        out, end = [], 0
        for number, offset, length in wanted:
            out.append((key(number), offset, self.arena[end : end + length]))
            end += length
        return out

    def wait_sent(self, num_bytes: int) -> None:
        """Until it is counted that so much came over the connection."""
        deadline = time.monotonic() + DEADLINE_S
        while self.server.stats().sent_bytes < num_bytes and time.monotonic() < deadline:
            time.sleep(0.002)
        assert self.server.stats().sent_bytes == num_bytes

    def close(self) -> None:
        self.reader.close()
        self.server.stop()
        self.agent.close()
        if self.server_agent is not None:
            self.server_agent.close()
        self.node.close()


@pytest.fixture
def peers(library: FakeNixl | None) -> Iterator[Peers]:
    peers = Peers()
    yield peers
    peers.close()


@pytest.fixture
def fake_peers(fake: FakeNixl) -> Iterator[Peers]:
    peers = Peers()
    yield peers
    peers.close()


def test_what_is_in_host_memory_comes_over_nixl_and_the_rest_over_the_connection(
    peers: Peers, eventually: Callable[[Callable[[], object]], None]
) -> None:
    contents = {number: os.urandom(200_000 + number) for number in range(2)}
    for number, content in contents.items():
        peers.node.store(key(number), content)
    peers.node.on_disk[key(7)] = os.urandom(9000)
    wanted = peers.ranges((0, 0, 200_000), (9, 0, 10), (7, 1000, 8000), (1, 5, 4096), (1, 100_000, 100_002))
    assert peers.reader.read_many("n0", wanted) == [True, False, True, True, False]
    assert wanted[0][2] == contents[0][:200_000]
    assert wanted[2][2] == peers.node.on_disk[key(7)][1000:]
    assert wanted[3][2] == contents[1][5:4101]
    peers.wait_sent(8000)
    assert peers.server.stats().leased_ranges == 2
    eventually(lambda: peers.node.views == 0)


def test_buffers_outside_of_the_arena_come_over_the_connection(peers: Peers) -> None:
    content = os.urandom(5000)
    peers.node.store(key(0), content)
    out = memoryview(bytearray(5000))
    assert peers.reader.read_many("n0", [(key(0), 0, out)]) == [True]
    assert bytes(out) == content
    peers.wait_sent(5000)


def test_a_restarted_node_is_read_over_its_new_agent(peers: Peers) -> None:
    peers.node.store(key(0), b"a" * 100)
    assert peers.reader.read_many("n0", peers.ranges((0, 0, 100))) == [True]
    peers.restart()
    assert peers.reader.read_many("n0", peers.ranges((0, 0, 100))) == [True]
    assert peers.server.stats().leased_ranges == 1
    assert len(peers.agent._windows) == 1


def test_a_node_without_nixl_is_read_over_the_connection(peers: Peers) -> None:
    peers.node.store(key(0), b"a" * 100)
    peers.restart(with_agent=False)
    wanted = peers.ranges((0, 0, 100))
    assert peers.reader.read_many("n0", wanted) == [True]
    assert wanted[0][2] == b"a" * 100
    peers.wait_sent(100)


def test_a_reader_without_nixl_reads_over_the_connection(peers: Peers) -> None:
    peers.node.store(key(0), b"a" * 100)
    reader = SocketPeerReader(lambda: {"n0": peers.info}, "peer")
    assert reader.read_many("n0", peers.ranges((0, 0, 100))) == [True]
    peers.wait_sent(100)
    reader.close()


def test_what_nixl_does_not_begin_comes_over_the_connection(fake: FakeNixl, fake_peers: Peers) -> None:
    content = os.urandom(3000)
    fake_peers.node.store(key(0), content)
    fake.script = ["refused"]
    wanted = fake_peers.ranges((0, 0, 3000))
    assert fake_peers.reader.read_many("n0", wanted) == [True]
    assert wanted[0][2] == content
    fake_peers.wait_sent(3000)


@pytest.mark.parametrize("failure", ["unposted", "fails", "hangs"])
def test_what_nixl_loses_is_a_miss_and_the_lease_ends(
    fake: FakeNixl, fake_peers: Peers, failure: str, eventually: Callable[[Callable[[], object]], None]
) -> None:
    fake_peers.node.store(key(0), b"a" * 100)
    fake.script = [failure]
    assert fake_peers.reader.read_many("n0", fake_peers.ranges((0, 0, 100), (0, 50, 50))) == [False, False]
    assert fake_peers.kept.ranges == {(0, 100), (100, 150)}
    eventually(lambda: fake_peers.node.views == 0)
    wanted = [(key(0), 0, fake_peers.arena[1000:1100])]
    assert fake_peers.reader.read_many("n0", wanted) == [True], "other buffers are filled over the connection"
    assert wanted[0][2] == b"a" * 100
    fake_peers.wait_sent(100)
    fake.finish()


def test_a_connection_that_breaks_while_a_transfer_hangs_is_not_tried_again_with_its_buffers(
    fake: FakeNixl, fake_peers: Peers, monkeypatch: pytest.MonkeyPatch
) -> None:
    fake_peers.node.store(key(0), b"a" * 100)
    assert fake_peers.reader.read_many("n0", fake_peers.ranges((0, 0, 100))) == [True]
    fake_peers.arena[:100] = bytes(100)
    fake.script = ["hangs"]
    send = Link.send

    def cut_once(self: Link, kind: Kind, *args: Any) -> None:
        if kind is Kind.RELEASE:
            monkeypatch.setattr(Link, "send", send)
            raise ConnectionResetError
        send(self, kind, *args)

    monkeypatch.setattr(Link, "send", cut_once)
    assert fake_peers.reader.read_many("n0", fake_peers.ranges((0, 0, 100))) == [False]
    assert fake_peers.arena[:100] == bytes(100)
    fake.finish()


def test_a_connection_that_breaks_after_a_transfer_is_replaced(
    fake: FakeNixl, fake_peers: Peers, monkeypatch: pytest.MonkeyPatch
) -> None:
    fake_peers.node.store(key(0), b"a" * 100)
    assert fake_peers.reader.read_many("n0", fake_peers.ranges((0, 0, 100))) == [True]
    read, cuts = NixlWindow.read, [True]

    def read_and_cut(self: NixlWindow, places: list[tuple[int, memoryview]]) -> list[Outcome]:
        outcomes = read(self, places)
        if cuts:
            cuts.pop()
            fake_peers.restart()
        return outcomes

    monkeypatch.setattr(NixlWindow, "read", read_and_cut)
    for _ in range(2):
        wanted = fake_peers.ranges((0, 0, 100))
        assert fake_peers.reader.read_many("n0", wanted) == [True]
        assert wanted[0][2] == b"a" * 100


def test_a_place_outside_of_the_announced_arena_breaks_the_protocol(
    fake: FakeNixl, fake_peers: Peers, monkeypatch: pytest.MonkeyPatch
) -> None:
    fake_peers.node.store(key(0), b"a" * 100)
    assert fake_peers.server_agent is not None
    info = fake_peers.server_agent.info
    assert info is not None
    fake_peers.server_agent.info = AgentInfo(info.name, info.metadata, info.address, 50)
    assert fake_peers.reader.read_many("n0", fake_peers.ranges((0, 0, 100))) == [False]
    assert fake.transfers == 0
    fake_peers.server_agent.info = info


def test_threads_that_read_while_transfers_fail_at_random_get_right_bytes_and_leave_nothing(
    fake: FakeNixl,
    fake_peers: Peers,
    monkeypatch: pytest.MonkeyPatch,
    eventually: Callable[[Callable[[], object]], None],
) -> None:
    monkeypatch.setattr(nixl_module, "STALL_S", 0.002)
    monkeypatch.setattr(nixl_module, "REST_S", 0.0)
    contents = {number: os.urandom(1000) for number in range(4)}
    for number, content in contents.items():
        fake_peers.node.store(key(number), content)
    chance = random.Random(5)
    fake.script = chance.choices(["done", "slow", "refused", "unposted", "fails", "hangs"], [6, 6, 1, 1, 1, 1], k=300)
    results: list[bool] = []
    wrong: list[int] = []

    def read(number: int) -> None:
        place = number * SIZE // 4
        for turn in range(100):
            out = fake_peers.arena[place : place + 500]
            (there,) = fake_peers.reader.read_many("n0", [(key(number), turn, out)])
            results.append(there)
            if there and out != contents[number][turn : turn + 500]:
                wrong.append(number)
            if not there:
                place += 500  # this one may still be written
            if turn % 10 == 0:
                fake.finish()

    threads = [threading.Thread(target=read, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []
    assert 4 < results.count(False) < len(results)
    fake.script = []
    fake.finish()
    eventually(lambda: not (fake_peers.agent.sweep() or fake_peers.kept.ranges))
    assert fake.requests == {}
    eventually(lambda: fake_peers.node.views == 0)


def test_over_tcp_nothing_is_leased_without_an_agent(fake: FakeNixl, fake_peers: Peers) -> None:
    fake_peers.node.store(key(0), b"a" * 100)
    leased = []
    for with_agent in (True, False):
        fake_peers.restart(with_agent=with_agent)
        link = connect_tcp(fake_peers.info.host, fake_peers.info.port, DATA_PLANE, PATIENCE)
        greet(link, PeerIdentity("peer"))
        link.send(Kind.LEASE, 1, Lease([Range(key(0), 10, 20)]))
        leased.append(expect(link.receive(DEADLINE_S)[1], Leased).offsets[0] >= 0)
        link.close()
    assert leased == [True, False]
