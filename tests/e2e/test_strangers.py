"""Who does not know the secret, at every port of a deployment: each method, each kind of frame, rubbish, a flood.

Nothing is answered, nothing changes, nobody else notices, and the log stays short.
"""

from __future__ import annotations

import socket
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import grpc
import httpx
import pytest
from google.protobuf.descriptor import MethodDescriptor, ServiceDescriptor
from grpc_health.v1 import health_pb2
from grpc_reflection.v1alpha import reflection_pb2

from tandem.common.credentials import open_channel
from tandem.handover.frames import HAND_OVER
from tandem.handover.frames import Kind as HandOverKind
from tandem.kvstore.dataplane.protocol import DATA_PLANE
from tandem.kvstore.dataplane.protocol import Kind as DataPlaneKind
from tandem.proto import kvdirectory_pb2, kvnode_pb2, kvnode_pb2_grpc, worker_pb2, worker_pb2_grpc
from tandem.wire.header import Header
from tandem.wire.protocol import Hello
from tests.e2e.cluster import Process
from tests.e2e.serving import eventually, tandem_command
from tests.ports import free_port

SECRET = "a secret of more than sixteen bytes"
STRANGERS = {"without a secret": b"", "with another": b"another secret of enough bytes"}
SERVICES: list[ServiceDescriptor] = [
    module.DESCRIPTOR.services_by_name[name]
    for module, name in (
        (worker_pb2, "Worker"),
        (kvnode_pb2, "KvNode"),
        (kvdirectory_pb2, "KvDirectory"),
        (health_pb2, "Health"),
        (reflection_pb2, "ServerReflection"),
    )
]
WAIT_S = 120.0
FLOOD = 1000
"""Connections to each socket."""
IDLE = 600
"""Connections to each of two ports, on which nothing is said."""
MAX_LINES = 40
"""Lines of a process's log while it is attacked."""


class Deployment:
    """A store node, a prefill worker, a decode worker and a router, everything on TCP as between machines."""

    def __init__(self, model: Path, folder: Path, stack: ExitStack) -> None:
        (folder / "secret").write_text(SECRET)
        self.processes: dict[str, Process] = {}
        self._folder, self._stack = folder, stack
        self.ports = {name: free_port() for name in ("node", "data", "prefill", "decode", "hand-over", "router")}
        at = {name: f"127.0.0.1:{port}" for name, port in self.ports.items()}
        self.grpc = [at["node"], at["prefill"], at["decode"]]
        unix = folder / "kv.sock"
        shared = {
            "secret_file": str(folder / "secret"),
            "kv_chunk_tokens": 64,
            "kv_store_socket": str(unix),
            "metrics_port": 0,
        }
        store = {"kv_host_bytes": 64 << 20, "kv_peer_listen": at["data"], "listen": at["node"]}
        self._add("kvstore", shared | store)
        for role in ("prefill", "decode"):
            own = {"model": str(model), "served_model_name": "tiny", "dtype": "float32", "kv_cache_bytes": 16 << 20}
            delivery = {"handover_listen": at["hand-over"]} if role == "decode" else {}
            self._add(role, shared | own | delivery | {"listen": at[role], "worker_id": role})
        self._add(
            "router",
            {
                "model": str(model),
                "served_model_name": "tiny",
                "host": "127.0.0.1",
                "port": self.ports["router"],
                "prefill_workers": [at["prefill"]],
                "decode_workers": [at["decode"]],
                "kv_store_address": at["node"],
                "secret_file": str(folder / "secret"),
                "disaggregate": "always",
            },
        )
        self.sockets: dict[str, Callable[[], socket.socket]] = {
            "hand-over": lambda: connect(self.ports["hand-over"]),
            "data plane": lambda: connect(self.ports["data"]),
            "data plane, unix": lambda: connect_unix(unix),
        }
        self.http = stack.enter_context(httpx.Client(base_url=f"http://{at['router']}", timeout=60, trust_env=False))
        for process in self.processes.values():
            process.start()
        for process in self.processes.values():
            process.wait_ready()
        eventually(lambda: self.completion("r", "g") is not None, what="an answer")

    def _add(self, command: str, settings: dict[str, object]) -> None:
        process = Process(command, command, self._folder, tandem_command(), settings)
        self._stack.callback(process.kill)
        self.processes[command] = process

    def completion(self, *words: str) -> Any:
        body = {"model": "tiny", "prompt": " ".join(words) * 40, "max_tokens": 4, "temperature": 0}
        answer = self.http.post("/v1/completions", json=body)
        return answer.json()["choices"][0]["text"] if answer.status_code == 200 else None

    def lines(self) -> dict[str, int]:
        return {name: len(process.log) for name, process in self.processes.items()}

    def state(self) -> dict[str, object]:
        """What a stranger might change."""
        with ExitStack() as stack:
            node, prefill, decode = [
                stack.enter_context(open_channel(address, SECRET.encode())) for address in self.grpc
            ]
            stats = kvnode_pb2_grpc.KvNodeStub(node).Stats(kvnode_pb2.StatsRequest(), timeout=WAIT_S)
            workers = [
                worker_pb2_grpc.WorkerStub(channel).GetInfo(worker_pb2.GetInfoRequest(), timeout=WAIT_S)
                for channel in (prefill, decode)
            ]
            contexts = kvnode_pb2_grpc.KvNodeStub(node).ListContexts(kvnode_pb2.ListContextsRequest(), timeout=WAIT_S)
        return {
            "pids": [process.pid for process in self.processes.values() if process.running],
            "objects": [tier.objects for tier in stats.tiers],
            "nodes": list(stats.known_nodes),
            "workers": [(info.worker_id, info.worker_epoch) for info in workers],
            "contexts": len(contexts.contexts),
        }


@pytest.fixture(scope="module")
def deployment(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Deployment]:
    with ExitStack() as stack:
        yield Deployment(tiny, tmp_path_factory.mktemp("strangers"), stack)


@pytest.fixture(autouse=True)
def _nothing_changes(deployment: Deployment) -> Iterator[None]:
    expected, before, lines = deployment.completion("a", "river"), deployment.state(), deployment.lines()
    yield
    assert deployment.state() == before
    assert deployment.completion("a", "river") == expected
    written = {name: count - lines[name] for name, count in deployment.lines().items()}
    assert all(count <= MAX_LINES for count in written.values()), written


def connect(port: int) -> socket.socket:
    sock = socket.create_connection(("127.0.0.1", port), WAIT_S)
    sock.settimeout(WAIT_S)
    return sock


def connect_unix(path: Path) -> socket.socket:
    sock = socket.socket(socket.AF_UNIX)
    sock.settimeout(WAIT_S)
    sock.connect(str(path))
    return sock


def heard(sock: socket.socket, sent: bytes) -> bytes:
    """All that comes until the other side hangs up."""
    said = b""
    try:
        sock.sendall(sent)
        while piece := sock.recv(4096):
            said += piece
    except (ConnectionResetError, BrokenPipeError):
        pass
    sock.close()
    return said


@pytest.mark.parametrize("stranger", STRANGERS)
@pytest.mark.parametrize("service", SERVICES, ids=lambda service: service.name)
def test_no_method_is_reached(deployment: Deployment, service: ServiceDescriptor, stranger: str) -> None:
    for address in deployment.grpc:
        with open_channel(address, STRANGERS[stranger]) as channel:
            for method in service.methods:
                path = f"/{service.full_name}/{method.name}"
                with pytest.raises(grpc.RpcError) as refused:
                    call(channel, method, path)
                assert refused.value.code() is grpc.StatusCode.UNAVAILABLE, path


def call(channel: grpc.Channel, method: MethodDescriptor, path: str) -> None:
    if method.client_streaming:
        list(channel.stream_stream(path)(iter([b""]), timeout=WAIT_S))
    elif method.server_streaming:
        list(channel.unary_stream(path)(b"", timeout=WAIT_S))
    else:
        channel.unary_unary(path)(b"", timeout=WAIT_S)


FRAMES = [HAND_OVER.pack(Header(kind, 1)) for kind in HandOverKind]
DATA_FRAMES = [DATA_PLANE.pack(Header(kind, 1)) for kind in DataPlaneKind]
HELLOS = [protocol.frame(protocol.hello, 0, Hello("stranger")) for protocol in (HAND_OVER, DATA_PLANE)]
RUBBISH = [b"", b"GET / HTTP/1.1\r\n\r\n", bytes(100), b"\xff" * 5000, b"TDMSEC1", b"TDMSEC2\n" + bytes(80)]


@pytest.mark.parametrize("door", ["hand-over", "data plane", "data plane, unix"])
def test_no_frame_is_answered(deployment: Deployment, door: str) -> None:
    for sent in (*FRAMES, *DATA_FRAMES, *HELLOS, *RUBBISH):
        sock = deployment.sockets[door]()
        if len(sent) < 8:
            sock.sendall(sent)
            sock.shutdown(socket.SHUT_WR)
            sent = b""
        assert heard(sock, sent) == b"", sent


@pytest.mark.parametrize("door", ["hand-over", "data plane", "data plane, unix"])
def test_a_wrong_proof_ends_the_connection(deployment: Deployment, door: str) -> None:
    sock = deployment.sockets[door]()
    sock.sendall(b"TDMSEC1\n" + bytes(64))
    nonce = sock.recv(64, socket.MSG_WAITALL)
    assert len(nonce) == 64
    assert heard(sock, bytes(32)) == b""


def test_a_flood_leaves_a_few_lines_and_keeps_nobody_out(deployment: Deployment) -> None:
    for address in deployment.grpc:
        port = int(address.rpartition(":")[2])
        for number in range(FLOOD):
            assert len(heard(connect(port), b"GET / HTTP/1.1\r\n\r\n" if number % 2 else bytes(100))) <= 7  # an alert
    for connecting in deployment.sockets.values():
        for number in range(FLOOD):
            assert heard(connecting(), b"GET / HTTP/1.1\r\n\r\n" if number % 2 else bytes(100)) == b""


def test_those_who_only_connect_are_hung_up_on(deployment: Deployment) -> None:
    idle = [connect(deployment.ports[name]) for name in ("decode", "hand-over") for _ in range(IDLE)]
    assert deployment.completion("a", "river") is not None
    for sock in idle:
        assert heard(sock, b"") == b""


def test_a_router_with_another_secret_says_so_and_gets_no_worker(deployment: Deployment, tmp_path: Path) -> None:
    wrong = tmp_path / "secret"
    wrong.write_bytes(STRANGERS["with another"])
    settings = deployment.processes["router"].settings | {"secret_file": str(wrong), "port": free_port()}
    router = Process("router-2", "router", tmp_path, tandem_command(), settings)
    router.start()
    try:
        for name in ("prefill", "decode"):
            told = f"worker 127.0.0.1:{deployment.ports[name]} cannot be reached"
            eventually(lambda told=told: router.logged(told), what=told)
        assert router.logged("give both the same secret_file")
    finally:
        router.kill()


def test_nobody_listens_to_other_machines_without_a_secret(tiny: Path, tmp_path: Path) -> None:
    everywhere = f"0.0.0.0:{free_port()}"
    for command, settings in (
        ("kvstore", {"kv_host_bytes": 64 << 20, "listen": everywhere}),
        ("prefill", {"model": str(tiny), "listen": everywhere}),
        ("decode", {"model": str(tiny), "listen": everywhere}),
    ):
        process = Process(command, command, tmp_path, tandem_command(), settings)
        process.start()
        eventually(lambda process=process: not process.running, what=f"{command} ended")
        eventually(lambda process=process: process.logged("TANDEM_SECRET"), what=f"{command} says why")
        assert process.logged(f"--listen {everywhere}")
