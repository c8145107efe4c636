"""gRPC channels with a secret: those who know it talk, strangers get nowhere."""

from __future__ import annotations

import socket
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import grpc
import grpc.aio
import pytest

from tandem.common.credentials import add_port, open_aio_channel, open_channel, remedy

SECRET = b"a secret of enough bytes"
PATIENCE_S = 30.0


class Desk:
    """A server whose one method answers what it was sent."""

    def __init__(self, listen: str, secret: bytes) -> None:
        self.asked: list[bytes] = []
        self._server = grpc.server(ThreadPoolExecutor(4))
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
