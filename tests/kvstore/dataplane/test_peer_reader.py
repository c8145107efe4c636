"""`SocketPeerReader` over shared memory and TCP: ranges, misses, disk, replicas, nodes gone or impersonated."""

from __future__ import annotations

import os
import socket
import threading
import time
from collections.abc import Callable, Iterator

import pytest

from tandem.kvstore.dataplane.peer_reader import FIRST_PAUSE_S, LONGEST_PAUSE_S, PeerConnection, SocketPeerReader
from tandem.kvstore.interfaces import NodeInfo, ObjectInfo, ObjectKey
from tandem.wire.link import Patience

from .conftest import DEADLINE_S, Rig
from .scripted_node import key

Eventually = Callable[[Callable[[], object]], None]


@pytest.fixture(params=["unix", "tcp"])
def transport(request: pytest.FixtureRequest) -> str:
    return str(request.param)


def ranges(*wanted: tuple[int, int, int]) -> list[tuple[ObjectKey, int, memoryview]]:
    return [(key(number), offset, memoryview(bytearray(length))) for number, offset, length in wanted]


def test_ranges_arrive_in_the_buffers_and_misses_are_told(rig: Rig, transport: str, eventually: Eventually) -> None:
    contents = {number: os.urandom(200_000 + number) for number in range(3)}
    for number, content in contents.items():
        rig.node.store(key(number), content)
    wanted = ranges((0, 0, 200_000), (9, 0, 10), (1, 5, 4096), (2, 100_000, 100_002), (2, 100_000, 100_003))
    assert rig.reader(transport).read_many("n0", wanted) == [True, False, True, True, False]
    assert bytes(wanted[0][2]) == contents[0][:200_000]
    assert bytes(wanted[2][2]) == contents[1][5:4101]
    assert bytes(wanted[3][2]) == contents[2][100_000:]
    eventually(lambda: rig.node.views == 0)


def test_the_same_host_reads_from_the_arena(rig: Rig) -> None:
    rig.node.store(key(0), b"a" * 100)
    assert rig.reader("unix").read_many("n0", ranges((0, 0, 100))) == [True]
    stats = rig.server.stats()
    assert (stats.leased_ranges, stats.sent_bytes) == (1, 0)


def test_what_is_only_on_disk_is_sent(rig: Rig, transport: str) -> None:
    rig.node.on_disk[key(7)] = os.urandom(9000)
    rig.node.store(key(1), b"b" * 100)
    wanted = ranges((7, 1000, 8000), (1, 0, 100), (7, 1000, 8001))
    assert rig.reader(transport).read_many("n0", wanted) == [True, True, False]
    assert bytes(wanted[0][2]) == rig.node.on_disk[key(7)][1000:]
    assert bytes(wanted[1][2]) == b"b" * 100


def test_many_ranges_are_pipelined(rig: Rig, transport: str) -> None:
    rig.node.store(key(0), bytes(range(256)) * 64)
    wanted = ranges(*[(0, offset % 16_000, 64) for offset in range(5000)])
    assert all(rig.reader(transport).read_many("n0", wanted))
    assert bytes(wanted[1][2]) == bytes(range(1, 65))


def test_a_replica_is_stored_once(rig: Rig, transport: str) -> None:
    reader = rig.reader(transport)
    content = os.urandom(1_000_003)
    info = ObjectInfo(size=len(content), num_tokens=256, owner="tenant")
    assert reader.push("n0", key(1), info, memoryview(content))
    assert rig.node.content(key(1)) == content
    assert rig.node.objects[key(1)][0] == info
    assert reader.push("n0", key(1), info, memoryview(bytes(len(content))))
    assert rig.node.content(key(1)) == content
    assert reader.read_many("n0", ranges((1, 0, 3))) == [True]


def test_an_unknown_node_has_nothing(rig: Rig, transport: str) -> None:
    assert rig.reader(transport).read_many("n1", ranges((0, 0, 1))) == [False]


def test_a_dead_node_fails_fast_and_is_read_again_after_its_return(
    rig: Rig, transport: str, eventually: Eventually, monkeypatch: pytest.MonkeyPatch
) -> None:
    rig.node.store(key(0), b"a" * 100)
    reader = rig.reader(transport)
    assert reader.read_many("n0", ranges((0, 0, 100))) == [True]
    rig.server.stop()
    attempts: list[NodeInfo] = []

    def refused(node: NodeInfo, *_: object) -> PeerConnection:
        attempts.append(node)
        raise ConnectionRefusedError

    started = time.monotonic()
    with monkeypatch.context() as patch:
        patch.setattr(PeerConnection, "open", refused)
        assert [reader.read_many("n0", ranges((0, 0, 100))) for _ in range(50)] == [[False]] * 50
    pauses = [min(FIRST_PAUSE_S * 2**index, LONGEST_PAUSE_S) for index in range(len(attempts) - 1)]
    assert attempts
    assert sum(pauses) <= time.monotonic() - started
    rig.start()
    eventually(lambda: reader.read_many("n0", ranges((0, 0, 100))) == [True])


def test_connections_that_a_restart_made_stale_are_replaced(rig: Rig) -> None:
    rig.node.store(key(0), b"a" * 100)
    reader = rig.reader("unix")
    assert reader.read_many("n0", ranges((0, 0, 100))) == [True]
    rig.server.stop()
    rig.start()
    assert reader.read_many("n0", ranges((0, 0, 100))) == [True]


def test_another_node_at_the_address_is_not_read(rig: Rig, transport: str) -> None:
    rig.server.stop()
    rig.start(node_id="impostor")
    rig.node.store(key(0), b"a" * 100)
    assert rig.reader(transport).read_many("n0", ranges((0, 0, 100))) == [False]


def test_a_silent_node_costs_a_bounded_time(rig: Rig, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tandem.kvstore.dataplane.peer_reader.PATIENCE", Patience(connect_s=0.2))
    with socket.create_server(("127.0.0.1", 0)) as silent:
        node = NodeInfo(node_id="n0", epoch=1, host_id="x", host="127.0.0.1", port=silent.getsockname()[1])
        reader = SocketPeerReader(lambda: {"n0": node}, "peer")
        rig.clients.append(reader)
        assert reader.read_many("n0", ranges((0, 0, 1))) == [False]


def test_readers_on_many_threads_take_turns(rig: Rig, transport: str) -> None:
    contents = {number: os.urandom(50_000) for number in range(8)}
    for number, content in contents.items():
        rig.node.store(key(number), content)
    reader = rig.reader(transport)
    wrong: list[int] = []

    def work(number: int) -> None:
        for _ in range(20):
            wanted = ranges((number, 0, 50_000))
            if reader.read_many("n0", wanted) != [True] or bytes(wanted[0][2]) != contents[number]:
                wrong.append(number)

    threads = [threading.Thread(target=work, args=(number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []
    assert rig.server.stats().connections <= 4


@pytest.fixture(autouse=True)
def no_thread_stays() -> Iterator[None]:
    before = set(threading.enumerate())
    yield
    deadline = time.monotonic() + DEADLINE_S
    while time.monotonic() < deadline and set(threading.enumerate()) - before:
        time.sleep(0.002)
    assert not {thread.name for thread in set(threading.enumerate()) - before if thread.name.startswith("kv-")}
