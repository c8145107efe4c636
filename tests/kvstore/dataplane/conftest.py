"""A served node that tests script, and clients that go away with the test."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tandem.kvstore.dataplane import channel, puts
from tandem.kvstore.dataplane.channel import Channel
from tandem.kvstore.dataplane.client import RemoteHomeNode
from tandem.kvstore.dataplane.peer_reader import SocketPeerReader
from tandem.kvstore.dataplane.protocol import DATA_PLANE, PATIENCE, Kind
from tandem.kvstore.dataplane.server import DataServer
from tandem.kvstore.interfaces import NodeInfo
from tandem.wire.handshake import greet
from tandem.wire.link import Link, connect_tcp, connect_unix
from tandem.wire.peers import PeerIdentity, local_host_id
from tandem.wire.protocol import Body
from tests.kvstore.homes import connects

from .scripted_node import ScriptedNode

SECRET = b"a secret of at least 16 bytes"
DEADLINE_S = 60.0


class Rig:
    """One server and as many clients as a test wants."""

    def __init__(self, folder: Path) -> None:
        self.path = str(folder / "node.sock")
        self.node = ScriptedNode()
        self.clients: list[RemoteHomeNode | SocketPeerReader] = []
        self.secret = b""
        self.server = self.start()

    def start(self, secret: bytes = b"", node_id: str = "n0", epoch: int = 1) -> DataServer:
        identity = PeerIdentity(node_id, epoch, key=DATA_PLANE.key(secret))
        server = DataServer(self.node, identity, unix_path=self.path, listen=("127.0.0.1", 0))
        server.start()
        self.server = server
        return server

    def home(self, secret: bytes = b"", *, connected: bool = True) -> RemoteHomeNode:
        home = RemoteHomeNode(self.path, "worker", secret=secret)
        self.clients.append(home)
        if connected:
            assert connects(home, DEADLINE_S)
        return home

    def connect(self, transport: str) -> Link:
        """A link on which nothing has been said."""
        if transport == "unix":
            return connect_unix(self.path, DATA_PLANE, PATIENCE)
        return connect_tcp("127.0.0.1", self.server.port, DATA_PLANE, PATIENCE)

    def greeted(self, transport: str) -> Link:
        link = self.connect(transport)
        greet(link, PeerIdentity("me")).drop_memory()
        return link

    def info(self, transport: str, epoch: int = 1) -> NodeInfo:
        if transport == "unix":
            return NodeInfo(node_id="n0", epoch=epoch, host_id=local_host_id(), unix_path=self.path)
        return NodeInfo(node_id="n0", epoch=epoch, host_id="elsewhere", host="127.0.0.1", port=self.server.port)

    def reader(self, transport: str, secret: bytes = b"") -> SocketPeerReader:
        reader = SocketPeerReader(lambda: {"n0": self.info(transport)}, "peer", secret=secret)
        self.clients.append(reader)
        return reader

    def close(self) -> None:
        self.node.look_up.set()
        for client in self.clients:
            client.close()
        self.server.stop()
        self.node.close()


@pytest.fixture(autouse=True)
def patient(monkeypatch: pytest.MonkeyPatch) -> None:
    """A busy machine is not taken for a dead node."""
    monkeypatch.setattr(channel, "CALL_S", DEADLINE_S)


@pytest.fixture
def rig(tmp_path: Path) -> Iterator[Rig]:
    rig = Rig(tmp_path)
    yield rig
    rig.close()


@pytest.fixture
def eventually() -> Callable[[Callable[[], object]], None]:
    def wait(predicate: Callable[[], object]) -> None:
        deadline = time.monotonic() + DEADLINE_S
        while not predicate():
            assert time.monotonic() < deadline, "did not become true in time"
            time.sleep(0.002)

    return wait


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> Counter[Kind]:
    """Requests of workers that wait for an answer, or may."""
    counts: Counter[Kind] = Counter()
    ask = Channel.ask

    def count(self: Channel, kind: Kind, body: Body, frame_id: int = 0) -> puts.Call:
        counts[kind] += 1
        return ask(self, kind, body, frame_id)

    monkeypatch.setattr(Channel, "ask", count)
    return counts
