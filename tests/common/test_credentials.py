"""gRPC channels with a secret: those who know it talk, strangers get nowhere."""

from __future__ import annotations

import contextlib
import socket
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import grpc
import grpc.aio
import pytest

from tandem.common import credentials
from tandem.common.credentials import SERVER_OPTIONS, Options, add_port, open_aio_channel, open_channel, remedy

SECRET = b"a secret of enough bytes"
PATIENCE_S = 30.0


class Desk:
    """A server whose one method answers what it was sent."""

    def __init__(self, listen: str, secret: bytes, options: Options = SERVER_OPTIONS) -> None:
        self.asked: list[bytes] = []
        self._server = grpc.server(ThreadPoolExecutor(4), options=list(options))
        method = grpc.unary_unary_rpc_method_handler(self._answer)
        self._server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler("desk", {"Ask": method}),))
        self.port = add_port(self._server, listen, secret)
        self.address = listen if listen.startswith("unix:") else f"127.0.0.1:{self.port}"
        self._server.start()

    def _answer(self, request: bytes, context: grpc.ServicerContext) -> bytes:
        self.asked.append(request)
        return request

    def stop(self) -> None:
        self._server.stop(None).wait()


@pytest.fixture(params=["unix", "tcp"])
def desk(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Desk]:
    desk = Desk(f"unix:{tmp_path}/desk.sock" if request.param == "unix" else "127.0.0.1:0", SECRET)
    yield desk
    desk.stop()


def ask(channel: grpc.Channel) -> bytes:
    answer: bytes = channel.unary_unary("/desk/Ask")(b"hello", timeout=PATIENCE_S)
    return answer


def test_those_who_know_the_secret_talk(desk: Desk) -> None:
    with open_channel(desk.address, SECRET) as channel:
        assert ask(channel) == b"hello"


async def test_those_on_an_event_loop_do_so_too(desk: Desk) -> None:
    async with open_aio_channel(desk.address, SECRET) as channel:
        assert await channel.unary_unary("/desk/Ask")(b"hello", timeout=PATIENCE_S) == b"hello"


@pytest.mark.parametrize("secret", [b"", b"another secret, as long"])
def test_strangers_reach_no_method_and_are_told_what_to_do(desk: Desk, secret: bytes) -> None:
    with open_channel(desk.address, secret) as channel, pytest.raises(grpc.RpcError) as refused:
        ask(channel)
    assert refused.value.code() is grpc.StatusCode.UNAVAILABLE
    assert "give both the same secret_file" in remedy(refused.value.details(), secret)
    assert desk.asked == []


def test_a_client_does_not_talk_to_a_server_without_its_secret(tmp_path: Path) -> None:
    desk = Desk(f"unix:{tmp_path}/desk.sock", b"")
    try:
        with open_channel(desk.address, SECRET) as channel, pytest.raises(grpc.RpcError) as refused:
            ask(channel)
        assert "give both the same secret_file" in remedy(refused.value.details(), SECRET)
        assert desk.asked == []
    finally:
        desk.stop()


@pytest.mark.parametrize(
    "junk", [b"GET / HTTP/1.1\r\n\r\n", bytes(200), b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + bytes(50)]
)
def test_what_is_no_handshake_is_hung_up_on(desk: Desk, junk: bytes) -> None:
    is_unix = desk.address.startswith("unix:")
    with socket.socket(socket.AF_UNIX if is_unix else socket.AF_INET) as sock:
        sock.settimeout(PATIENCE_S)
        sock.connect(desk.address.removeprefix("unix:") if is_unix else ("127.0.0.1", desk.port))
        sock.sendall(junk)
        try:
            answer = sock.recv(1 << 16)
        except ConnectionResetError:
            answer = b""
    assert b"desk" not in answer
    assert len(answer) <= 7  # nothing, or a TLS alert
    assert desk.asked == []


def test_other_failures_are_not_blamed_on_the_secret(tmp_path: Path) -> None:
    with open_channel(f"unix:{tmp_path}/nobody.sock", SECRET) as channel, pytest.raises(grpc.RpcError) as failed:
        ask(channel)
    assert remedy(failed.value.details(), SECRET) == ""


class Cable:
    """TCP between one client and a server, which can be pulled: what was connected stays so, and nothing passes."""

    def __init__(self, port: int) -> None:
        self.connections = 0
        self._port = port
        self._listening = socket.create_server(("127.0.0.1", 0))
        self.address = f"127.0.0.1:{self._listening.getsockname()[1]}"
        self._pulled = threading.Event()
        self._sockets: list[socket.socket] = [self._listening]
        threading.Thread(target=self._accept, daemon=True).start()

    def pull(self) -> None:
        """New connections go through another one."""
        self._pulled.set()
        self._pulled = threading.Event()

    def close(self) -> None:
        for sock in self._sockets:
            with contextlib.suppress(OSError):
                sock.shutdown(socket.SHUT_RDWR)
            sock.close()

    def _accept(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                client, _ = self._listening.accept()
                self.connections += 1
                server = socket.create_connection(("127.0.0.1", self._port))
                self._sockets += [client, server]
                for pair in ((client, server), (server, client)):
                    threading.Thread(target=self._forward, args=(*pair, self._pulled), daemon=True).start()

    @staticmethod
    def _forward(source: socket.socket, target: socket.socket, pulled: threading.Event) -> None:
        with contextlib.suppress(OSError):
            while data := source.recv(1 << 16):
                if not pulled.is_set():
                    target.sendall(data)


def hastened(options: Options) -> Options:
    """Ten times as fast."""
    return [(name, value // 10 if name.endswith("_ms") else value) for name, value in options]


@pytest.fixture
def cable(monkeypatch: pytest.MonkeyPatch) -> Iterator[Cable]:
    monkeypatch.setattr(credentials, "_CHANNEL_OPTIONS", hastened(credentials._CHANNEL_OPTIONS))
    desk = Desk("127.0.0.1:0", SECRET, hastened(credentials.SERVER_OPTIONS))
    cable = Cable(desk.port)
    yield cable
    cable.close()
    desk.stop()


def test_a_connection_that_went_silent_is_given_up_and_another_one_made(cable: Cable) -> None:
    with open_channel(cable.address, SECRET) as channel:
        assert ask(channel) == b"hello"
        cable.pull()
        end = time.monotonic() + PATIENCE_S
        while True:
            try:
                assert channel.unary_unary("/desk/Ask")(b"hello", timeout=1.0) == b"hello"
                break
            except grpc.RpcError:
                assert time.monotonic() < end
        assert cable.connections > 1


def test_a_client_that_says_nothing_but_asks_whether_the_server_is_there_is_not_hung_up_on(cable: Cable) -> None:
    states: list[grpc.ChannelConnectivity] = []
    with open_channel(cable.address, SECRET) as channel:
        assert ask(channel) == b"hello"
        channel.subscribe(states.append)
        end = time.monotonic() + credentials.KEEPALIVE_MS / 1000  # ten times what it waits before it asks
        while time.monotonic() < end:
            time.sleep(0.05)
            assert set(states) <= {grpc.ChannelConnectivity.READY}
        assert ask(channel) == b"hello"
    assert cable.connections == 1
