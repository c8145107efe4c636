"""Bodies and lengths of the hand-over are within their bounds, whatever is sent."""

from __future__ import annotations

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tandem.handover.frames import (
    HAND_OVER,
    MAX_CONTROL_BYTES,
    MAX_PAYLOAD_BYTES,
    Accept,
    Ack,
    Finish,
    Kind,
    Open,
    Rows,
)
from tandem.wire.header import HEADER_BYTES, Header, ProtocolError, checksum
from tandem.wire.protocol import Body

U64 = st.integers(0, 2**64 - 1)
CONTROL = (Kind.HELLO, Kind.REFUSE, Kind.OPEN, Kind.ACCEPT, Kind.ROWS, Kind.ABORT, Kind.ACK)
BODY_LIMITS = dict.fromkeys(Kind, 0) | dict.fromkeys(CONTROL, MAX_CONTROL_BYTES) | {Kind.FINISH: MAX_PAYLOAD_BYTES}
PAYLOAD_LIMITS = dict.fromkeys(Kind, 0) | {Kind.ROWS: MAX_PAYLOAD_BYTES}


def decode(kind: Kind, raw: bytes) -> Body:
    return HAND_OVER.decode(Header(kind, 1, len(raw), body_checksum=checksum(raw)), raw)


@pytest.mark.parametrize("kind", Kind)
def test_no_header_can_ask_for_more_memory_than_the_limit(kind):
    largest = Header(kind, 1, BODY_LIMITS[kind], PAYLOAD_LIMITS[kind])
    assert HAND_OVER.parse(HAND_OVER.pack(largest)) == largest
    for beyond in (
        largest._replace(body_length=largest.body_length + 1),
        largest._replace(payload_length=largest.payload_length + 1),
    ):
        with pytest.raises(ProtocolError, match="limit"):
            HAND_OVER.parse(HAND_OVER.pack(beyond))


@given(st.sampled_from(Kind), st.binary(max_size=300))
def test_random_bytes_as_a_body_are_one_or_an_error(kind, raw):
    try:
        body = decode(kind, raw)
    except ProtocolError:
        return
    assert isinstance(body, Body)


OPEN = {"request_id": "r", "epoch": 1, "num_tokens": 1, "row_bytes": 1, "num_layers": 1}
ROWS = {"layer": 0, "start": 0, "stop": 1, "length": 1, "checksum": 2**64 - 1, "offset": 0}


@pytest.mark.parametrize(
    ("kind", "fields"),
    [
        (Kind.OPEN, {"request_id": ""}),
        (Kind.OPEN, {"request_id": "x" * 513}),
        (Kind.OPEN, {"epoch": -1}),
        (Kind.OPEN, {"num_tokens": 0}),
        (Kind.OPEN, {"num_tokens": 2**32}),
        (Kind.OPEN, {"row_bytes": 0}),
        (Kind.OPEN, {"row_bytes": MAX_PAYLOAD_BYTES + 1}),
        (Kind.OPEN, {"num_layers": 0}),
        (Kind.OPEN, {"num_layers": 2**16 + 1}),
        (Kind.OPEN, {"request_id": 7}),
        (Kind.OPEN, {"num_tokens": "7"}),
        (Kind.OPEN, {"more": 1}),
        (Kind.ROWS, {"layer": -1}),
        (Kind.ROWS, {"start": 2**32}),
        (Kind.ROWS, {"stop": -1}),
        (Kind.ROWS, {"length": -1}),
        (Kind.ROWS, {"length": MAX_PAYLOAD_BYTES + 1}),
        (Kind.ROWS, {"checksum": -1}),
        (Kind.ROWS, {"offset": -1}),
        (Kind.ROWS, {"more": 1}),
    ],
)
def test_a_body_outside_its_bounds_is_refused(kind, fields):
    good = OPEN if kind is Kind.OPEN else ROWS
    decode(kind, msgspec.msgpack.encode(list(good.values())))
    with pytest.raises(ProtocolError, match=kind.name):
        decode(kind, msgspec.msgpack.encode(list((good | fields).values())))


@pytest.mark.parametrize("kind", [Kind.ACCEPT, Kind.ACK])
def test_a_negative_count_is_refused(kind):
    with pytest.raises(ProtocolError, match=kind.name):
        decode(kind, msgspec.msgpack.encode([-1]))


@given(st.text(min_size=1, max_size=512), st.integers(0, 2**63 - 1), U64, st.binary(max_size=100))
def test_every_body_survives_the_wire(request_id, epoch, digest, payload):
    for kind, body in (
        (Kind.OPEN, Open(request_id, epoch, 10, 20, 30)),
        (Kind.ACCEPT, Accept(2**32 - 1)),
        (Kind.ROWS, Rows(1, 2, 3, 4, digest, 5)),
        (Kind.FINISH, Finish(payload)),
        (Kind.ACK, Ack(epoch)),
    ):
        raw = HAND_OVER.frame(kind, 1, body)
        assert HAND_OVER.decode(HAND_OVER.parse(raw[:HEADER_BYTES]), raw[HEADER_BYTES:]) == body
