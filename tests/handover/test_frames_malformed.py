"""The parser takes exactly what the packer makes."""

from __future__ import annotations

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tandem.handover import Reason
from tandem.handover.frames import (
    HEADER,
    HEADER_BYTES,
    MAGIC,
    MAX_CONTROL_BYTES,
    MAX_PAYLOAD_BYTES,
    PROTOCOL_VERSION,
    Frame,
    FrameError,
    Hello,
    Kind,
    Open,
    ReasonBody,
    VersionMismatch,
    checksum,
    decode,
    decode_reason,
    encode,
    encode_reason,
    pack,
    parse,
)

U32 = st.integers(0, 2**32 - 1)
U64 = st.integers(0, 2**64 - 1)
LIMITS = dict.fromkeys(Kind, 0) | dict.fromkeys((Kind.HELLO, Kind.OPEN, Kind.REFUSE, Kind.ABORT), MAX_CONTROL_BYTES)
LIMITS |= {Kind.ROWS: MAX_PAYLOAD_BYTES, Kind.FINISH: MAX_PAYLOAD_BYTES}


@st.composite
def frames(draw):
    kind = draw(st.sampled_from(Kind))
    length = draw(st.integers(0, LIMITS[kind]))
    return Frame(kind, draw(U32), draw(U32), draw(U32), draw(U32), length, draw(U64), draw(U64), draw(U64))


@given(frames())
def test_every_frame_survives_the_wire(frame):
    raw = pack(frame)
    assert len(raw) == HEADER_BYTES == 64
    assert parse(raw) == frame


@given(frames(), st.integers(0, HEADER_BYTES * 8 - 1))
def test_any_flipped_bit_is_noticed(frame, bit):
    raw = bytearray(pack(frame))
    raw[bit // 8] ^= 1 << bit % 8
    with pytest.raises(FrameError):
        parse(raw)


@given(st.binary(max_size=200))
def test_random_bytes_are_never_a_frame(raw):
    with pytest.raises(FrameError):
        parse(raw)


@given(frames(), st.integers(0, HEADER_BYTES - 1))
def test_a_truncated_header_is_never_a_frame(frame, length):
    with pytest.raises(FrameError):
        parse(pack(frame)[:length])


def _header(*, version=PROTOCOL_VERSION, kind=5, length=0, reserved=0):
    head = HEADER.pack(MAGIC, version, kind, 1, 0, 0, 0, length, reserved, 0, 0, 0)
    return head + checksum(head).to_bytes(8, "little")


def test_another_version_is_told_apart_from_noise():
    with pytest.raises(VersionMismatch, match=rf"version {PROTOCOL_VERSION + 1}.*version {PROTOCOL_VERSION}"):
        parse(_header(version=PROTOCOL_VERSION + 1))


@pytest.mark.parametrize("kind", [0, 11, 65535])
def test_an_unknown_kind_is_refused(kind):
    with pytest.raises(FrameError, match="kind"):
        parse(_header(kind=kind))


def test_the_reserved_field_must_be_zero():
    with pytest.raises(FrameError, match="reserved"):
        parse(_header(reserved=1))


@pytest.mark.parametrize("kind", Kind)
def test_no_header_can_ask_for_more_memory_than_the_limit(kind):
    assert parse(_header(kind=kind, length=LIMITS[kind])).length == LIMITS[kind]
    with pytest.raises(FrameError, match="limit"):
        parse(_header(kind=kind, length=LIMITS[kind] + 1))


@given(st.binary(max_size=300), st.sampled_from([Hello, Open, ReasonBody]))
def test_random_bytes_as_a_body_raise_only_frame_errors(raw, kind):
    try:
        body = decode(raw, kind)
    except FrameError:
        return
    assert isinstance(body, kind)


@settings(max_examples=30)
@given(st.lists(st.none() | st.integers(0, 2**64 - 1) | st.text(max_size=5) | st.lists(st.booleans()), max_size=6))
def test_other_objects_as_a_body_raise_only_frame_errors(value):
    for kind in (Hello, Open, ReasonBody):
        with pytest.raises(FrameError):
            decode(msgspec.msgpack.encode(value), kind)


def test_a_body_nested_without_end_is_a_frame_error():
    with pytest.raises(FrameError):
        decode(b"\x91" * MAX_CONTROL_BYTES, Open)
    with pytest.raises(FrameError):
        decode(b"\x81\xa1x" + b"\x91" * MAX_CONTROL_BYTES, Open)


@pytest.mark.parametrize(
    "fields",
    [
        {"request_id": ""},
        {"request_id": "x" * 513},
        {"epoch": -1},
        {"num_tokens": 0},
        {"num_tokens": 2**32},
        {"row_bytes": 0},
        {"row_bytes": MAX_PAYLOAD_BYTES + 1},
        {"num_layers": 0},
        {"num_layers": 2**16 + 1},
        {"request_id": 7},
        {"num_tokens": "7"},
        {"more": 1},
    ],
)
def test_an_open_outside_its_bounds_is_refused(fields):
    good = {"request_id": "r", "epoch": 1, "num_tokens": 1, "row_bytes": 1, "num_layers": 1}
    decode(msgspec.msgpack.encode(good), Open)
    with pytest.raises(FrameError):
        decode(msgspec.msgpack.encode(good | fields), Open)


@given(st.text(), st.text(), st.booleans())
def test_a_reason_of_any_length_can_be_sent(code, message, retriable):
    reason = decode_reason(encode_reason(Reason(code, message, retriable)))
    assert reason == Reason(code[:64], message[:1024], retriable)


@given(st.text(min_size=1, max_size=512), U64)
def test_an_open_survives_the_wire(request_id, epoch):
    body = Open(request_id, epoch, 10, 20, 30)
    assert decode(encode(body), Open) == body
