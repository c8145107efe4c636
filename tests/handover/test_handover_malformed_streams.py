"""Damaged byte streams at a live server and a live client: never a wrong row, a hang or a dead server."""

from __future__ import annotations

import socket
import threading

import msgspec
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tandem.handover import Endpoint
from tandem.handover.frames import HAND_OVER, Finish, Kind, Open, Rows, checksum
from tandem.wire.header import Header
from tandem.wire.header import checksum as body_checksum
from tandem.wire.protocol import Body, Hello

DIGEST = bytes(range(32))
NUM_TOKENS, ROW_BYTES, NUM_LAYERS = 8, 16, 2
LAYERS = [bytes([layer + 1]) * (NUM_TOKENS * ROW_BYTES) for layer in range(NUM_LAYERS)]
ANSWER_S = 30.0

BODIES = st.lists(st.integers(0, 3), max_size=6).map(msgspec.msgpack.encode)
"""Some of which fit some kinds."""

FUZZ = settings(
    max_examples=80, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow]
)


def conversation(request_id: str) -> list[bytes]:
    """Hello, Open, all rows, Finish: what an honest client sends."""
    steps: list[tuple[Kind, int, Body | None, bytes]] = [
        (Kind.HELLO, 0, Hello("p", 1, DIGEST), b""),
        (Kind.OPEN, 1, Open(request_id, 1, NUM_TOKENS, ROW_BYTES, NUM_LAYERS), b""),
        *(
            (Kind.ROWS, 1, Rows(layer, 0, NUM_TOKENS, len(rows), checksum(rows)), rows)
            for layer, rows in enumerate(LAYERS)
        ),
        (Kind.FINISH, 1, Finish(b"first token"), b""),
        (Kind.RENEW, 1, None, b""),
    ]
    return [
        HAND_OVER.frame(kind, stream, body, len(payload), sequence) + payload
        for sequence, (kind, stream, body, payload) in enumerate(steps)
    ]


def deliver(rig, raw: bytes) -> None:
    """Sends `raw`, closes the writing half, and waits until the server has hung up."""
    with socket.create_connection((rig.both.host, rig.both.port)) as sock:
        sock.settimeout(ANSWER_S)
        try:
            sock.sendall(raw)
            sock.shutdown(socket.SHUT_WR)
            while sock.recv(65536):
                pass
        except TimeoutError:
            raise
        except OSError:
            pass  # the server hung up in the middle of it


def check(rig, request_id: str) -> None:
    """Whatever arrived is right, and a request that finished is complete."""
    for (name, _), layers in rig.sink.data.items():
        for layer, received in layers.items():
            for row in range(len(received) // ROW_BYTES):
                got = bytes(received[row * ROW_BYTES : (row + 1) * ROW_BYTES])
                assert got in (bytes(ROW_BYTES), LAYERS[layer][:ROW_BYTES]), name
    for payload in rig.sink.finishes.values():
        assert payload == b"first token"
    assert rig.server.stats().open_streams == 0
    stream, listener = rig.open(f"{request_id}-after", rig.rows(num_tokens=2, row_bytes=ROW_BYTES, num_layers=1))
    stream.finish(b"first token")
    assert listener.ending() == ("done", ""), "the server must serve others as before"
    rig.sink.data.clear()


@pytest.fixture
def transport() -> str:
    return "tcp"


@pytest.fixture
def numbered():
    return iter(range(10**6))


def test_the_honest_conversation_works(rig):
    deliver(rig, b"".join(conversation("r")))
    assert rig.sink.finishes == {("r", 1): b"first token"}
    assert [bytes(rig.sink.data["r", 1][layer]) for layer in range(NUM_LAYERS)] == LAYERS


@FUZZ
@given(data=st.data())
def test_flipped_bits(rig, numbered, data):
    name = f"r{next(numbered):06}"
    raw = bytearray(b"".join(conversation(name)))
    for bit in data.draw(st.lists(st.integers(0, len(raw) * 8 - 1), min_size=1, max_size=4, unique=True)):
        raw[bit // 8] ^= 1 << bit % 8
    deliver(rig, bytes(raw))
    check(rig, name)


@FUZZ
@given(data=st.data())
def test_missing_repeated_swapped_and_cut_frames(rig, numbered, data):
    name = f"r{next(numbered):06}"
    honest = conversation(name)
    steps = data.draw(st.lists(st.sampled_from(honest), max_size=10))
    raw = b"".join(steps)
    raw = raw[: data.draw(st.integers(0, len(raw)))]
    deliver(rig, raw)
    check(rig, name)
    if (name, 1) in rig.sink.finishes:
        assert raw.startswith(b"".join(honest[:5])), "the order of frames is checked"


@FUZZ
@given(raw=st.binary(max_size=400), after=st.integers(0, 5))
def test_noise_at_any_point(rig, numbered, raw, after):
    name = f"r{next(numbered):06}"
    deliver(rig, b"".join(conversation(name)[:after]) + raw)
    check(rig, name)


def test_a_huge_announced_payload_costs_no_memory_until_it_arrives(rig):
    """The limit is checked before the buffer is made; a stream that does not send it is dropped."""
    steps = conversation("r")[:2]
    steps.append(HAND_OVER.pack(Header(Kind.ROWS, 1, payload_length=(64 << 20) + 1, sequence=2)))
    deliver(rig, b"".join(steps))
    assert rig.sink.lost_code("r") == "protocol"


@FUZZ
@given(data=st.data())
def test_a_client_survives_any_answer(rig, numbered, data):
    """A server that sends frames that make no sense, or bytes that are no frames, after a correct Hello."""
    number = next(numbered)
    answers = [HAND_OVER.frame(Kind.HELLO, 0, Hello("d", 1, DIGEST, 3.0))]
    for sequence in range(1, data.draw(st.integers(0, 3)) + 1):
        kind, stream = data.draw(st.sampled_from(Kind)), data.draw(st.integers(0, 3))
        body = data.draw(st.binary(max_size=20) | BODIES) if kind not in (Kind.RENEW, Kind.FINISH_ACK) else b""
        header = Header(kind, stream, len(body), sequence=sequence, body_checksum=body_checksum(body))
        answers.append(HAND_OVER.pack(header) + body)
    noise = data.draw(st.binary(max_size=100))
    with socket.create_server(("127.0.0.1", 0)) as listening:

        def answer() -> None:
            sock, _ = listening.accept()
            with sock:
                sock.settimeout(ANSWER_S)
                sock.recv(4096)
                sock.sendall(b"".join(answers) + noise)

        thread = threading.Thread(target=answer)
        thread.start()
        listener = rig.listener()
        host, port = listening.getsockname()
        stream = rig.client.open(Endpoint("d", 1, host=host, port=port), f"c{number}", 1, 2, 8, 1, listener)
        stream.send_layer(0, 0, 2, lambda start, stop, out: None)
        stream.finish(b"")
        how, _ = listener.ending()
        assert how in {"lost", "refused", "done"}
        thread.join()
