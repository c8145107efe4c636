"""With a secret, a store node's gRPC services talk to those who know it only; probes excepted."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_health.v1.health import HealthServicer

from tandem.kvstore import grpc_auth
from tandem.kvstore.directory import (
    EmbeddedDirectory,
    add_directory_service,
    open_directory,
    watch_directory,
)
from tandem.kvstore.interfaces import NodeInfo, ObjectKey
from tandem.proto import kvdirectory_pb2, kvdirectory_pb2_grpc

SECRET = b"a secret of enough bytes"
KEY = ObjectKey(b"k" * 32)


@pytest.fixture
def address(tmp_path: Path) -> Iterator[str]:
    server = grpc.server(ThreadPoolExecutor(4), interceptors=[grpc_auth.RequireSecret(SECRET)])
    directory = EmbeddedDirectory()
    add_directory_service(server, directory)
    health_pb2_grpc.add_HealthServicer_to_server(HealthServicer(), server)
    path = f"unix:{tmp_path}/node.sock"
    server.add_insecure_port(path)
    server.start()
    yield path
    server.stop(None).wait()
    directory.close()


@pytest.mark.parametrize("secret", [b"", b"another secret, as long"])
def test_strangers_are_refused(address: str, secret: bytes) -> None:
    with grpc_auth.channel(address, secret) as channel:
        stub = kvdirectory_pb2_grpc.KvDirectoryStub(channel)
        with pytest.raises(grpc.RpcError) as refused:
            stub.States(kvdirectory_pb2.StatesRequest(), timeout=30)
    assert refused.value.code() is grpc.StatusCode.UNAUTHENTICATED
    assert "kv_secret_file" in refused.value.details()


def test_probes_need_no_secret(address: str) -> None:
    with grpc.insecure_channel(address) as channel:
        answer = health_pb2_grpc.HealthStub(channel).Check(health_pb2.HealthCheckRequest(), timeout=30)
    assert answer.status == health_pb2.HealthCheckResponse.SERVING


def test_a_directory_behind_a_secret_works_for_those_who_know_it(address: str) -> None:
    member, stranger = open_directory(address, SECRET), open_directory(address)
    watcher, blind = watch_directory(address, SECRET), watch_directory(address)
    try:
        member.register(NodeInfo(node_id="node-0", epoch=1, host_id="host"), list)
        until(lambda: "node-0" in watcher.nodes())
        assert member.lookup([KEY]) == [()]
        assert not stranger.nodes()
        assert not blind.nodes()
    finally:
        for each in (member, stranger, watcher, blind):
            each.close()


async def test_an_event_loop_sends_the_proof_too(address: str) -> None:
    async with grpc_auth.aio_channel(address, SECRET, []) as channel:
        stub = kvdirectory_pb2_grpc.KvDirectoryStub(channel)
        assert not (await stub.States(kvdirectory_pb2.StatesRequest(), timeout=30)).states
    async with grpc_auth.aio_channel(address, b"", []) as channel:
        stub = kvdirectory_pb2_grpc.KvDirectoryStub(channel)
        with pytest.raises(grpc.aio.AioRpcError) as refused:
            await stub.States(kvdirectory_pb2.StatesRequest(), timeout=30)
    assert refused.value.code() is grpc.StatusCode.UNAUTHENTICATED


def until(condition: Callable[[], object]) -> None:
    deadline = time.monotonic() + 10
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)
