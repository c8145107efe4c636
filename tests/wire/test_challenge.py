"""Who knows the secret gets in; who does not learns nothing, whatever it sends or has recorded."""

from __future__ import annotations

import random
import socket
import threading
from collections.abc import Callable

import pytest

from tandem.wire.challenge import Unproven, demand, prove

KEY, OTHER = b"k" * 32, b"o" * 32
NONCE = 64
PATIENCE_S = 30.0


class Served:
    """`demand` on one end of a connection, in a thread; hangs up after a failure."""

    def __init__(self, key: bytes = KEY, timeout_s: float = PATIENCE_S) -> None:
        self.client, self.server = socket.socketpair()
        self.client.settimeout(PATIENCE_S)
        self.error: Exception | None = None
        self._thread = threading.Thread(target=self._demand, args=(key, timeout_s))
        self._thread.start()

    def _demand(self, key: bytes, timeout_s: float) -> None:
        try:
            demand(self.server, key, timeout_s)
        except OSError as error:
            self.error = error
            self.server.close()

    def end(self) -> None:
        self._thread.join(PATIENCE_S)
        assert not self._thread.is_alive()
        self.client.close()
        self.server.close()

    def answer(self) -> bytes:
        """All that the server says until it hangs up."""
        heard = b""
        try:
            while piece := self.client.recv(1024):
                heard += piece
        except ConnectionResetError:
            pass
        return heard


@pytest.fixture
def served() -> Served:
    return Served()


def test_both_know_it_and_what_follows_is_left_alone(served: Served) -> None:
    prove(served.client, KEY, PATIENCE_S)
    served.client.sendall(b"first frame")
    served.end()
    assert served.error is None


def test_what_is_sent_right_behind_stays_for_the_reader() -> None:
    served = Served()
    prove(served.client, KEY, PATIENCE_S)
    served.client.sendall(b"first frame")
    assert served.server.recv(100) == b"first frame"
    served.end()


def test_another_secret_is_refused_on_both_sides(served: Served) -> None:
    with pytest.raises(Unproven, match="another secret: give both the same secret_file"):
        prove(served.client, OTHER, PATIENCE_S)
    served.end()
    assert isinstance(served.error, Unproven)


@pytest.mark.parametrize(
    "sent",
    [b"GET / HTTP/1.1\r\n\r\n" * 9, bytes(500), b"TDMSEC2\n" + bytes(64), b"TDKV\x02\0\x01\0" + bytes(56)],
)
def test_strangers_are_told_nothing(served: Served, sent: bytes) -> None:
    served.client.sendall(sent)
    assert served.answer() == b""
    served.end()
    assert isinstance(served.error, Unproven)


def test_random_bytes_never_prove_anything() -> None:
    chance = random.Random(7)
    for _ in range(50):
        served = Served()
        served.client.sendall(b"TDMSEC1\n" + chance.randbytes(NONCE + 32))
        assert len(served.answer()) == NONCE
        served.end()
        assert isinstance(served.error, Unproven)


def test_a_recorded_conversation_cannot_be_played_again() -> None:
    sent: list[bytes] = []
    served = Served()
    recording = Recorder(served.client, sent.append)
    prove(recording, KEY, PATIENCE_S)  # type: ignore[arg-type]
    served.end()
    assert served.error is None
    again = Served()
    again.client.sendall(b"".join(sent))
    assert len(again.answer()) == NONCE
    again.end()
    assert isinstance(again.error, Unproven)


def test_a_proof_cannot_be_sent_back_as_ones_own() -> None:
    """A server that knows nothing answers a client with what it gets from that client."""
    client, server = socket.socketpair()

    def mirror() -> None:
        mine = server.recv(8 + NONCE, socket.MSG_WAITALL)[8:]
        server.sendall(mine)
        server.sendall(server.recv(32, socket.MSG_WAITALL))

    thread = threading.Thread(target=mirror)
    thread.start()
    with pytest.raises(Unproven):
        prove(client, KEY, PATIENCE_S)
    thread.join(PATIENCE_S)
    client.close()
    server.close()


def test_a_silent_client_is_waited_for_only_so_long() -> None:
    served = Served(timeout_s=0.2)
    served.client.sendall(b"TDM")
    served.end()
    assert isinstance(served.error, TimeoutError)


def test_a_server_that_says_nothing_is_waited_for_only_so_long() -> None:
    client, server = socket.socketpair()
    with client, server, pytest.raises(TimeoutError):
        prove(client, KEY, 0.1)


class Recorder:
    """A socket that keeps what is sent."""

    def __init__(self, sock: socket.socket, keep: Callable[[bytes], None]) -> None:
        self._sock = sock
        self._keep = keep
        self.recv = sock.recv
        self.fileno = sock.fileno

    def sendall(self, data: bytes) -> None:
        self._keep(data)
        self._sock.sendall(data)
