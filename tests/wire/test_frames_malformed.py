"""The parser takes exactly what the packer makes, within the limits of the protocol."""

from __future__ import annotations

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tandem.wire.header import HEADER_BYTES, Header, ProtocolError, VersionMismatch, checksum
from tandem.wire.protocol import Body, Hello, Nothing, Reason, expect

from .notes import BODIES, MAX_BODY, MAX_LONG, MAX_PAYLOAD, NOTES, VERSION, Kind, Note, notes

U32 = st.integers(0, 2**32 - 1)
U64 = st.integers(0, 2**64 - 1)
WITH_BODY = (Kind.HELLO, Kind.REFUSE, Kind.NOTE, Kind.END)
BODY_LIMITS = dict.fromkeys(Kind, 0) | dict.fromkeys(WITH_BODY, MAX_BODY) | {Kind.LONG: MAX_LONG}
PAYLOAD_LIMITS = dict.fromkeys(Kind, 0) | {Kind.BYTES: MAX_PAYLOAD}


@st.composite
def headers(draw: st.DrawFn) -> Header:
    kind = draw(st.sampled_from(Kind))
    body, payload = draw(st.integers(0, BODY_LIMITS[kind])), draw(st.integers(0, PAYLOAD_LIMITS[kind]))
    return Header(kind, draw(U64), body, payload, draw(U64), draw(U32))


@given(headers())
def test_every_header_survives_the_wire(header: Header) -> None:
    raw = NOTES.pack(header)
    assert len(raw) == HEADER_BYTES == 44
    assert NOTES.parse(raw) == header


@given(headers(), st.integers(0, HEADER_BYTES * 8 - 1))
def test_any_flipped_bit_is_noticed(header: Header, bit: int) -> None:
    raw = bytearray(NOTES.pack(header))
    raw[bit // 8] ^= 1 << bit % 8
    with pytest.raises(ProtocolError):
        NOTES.parse(raw)


@given(st.binary(max_size=200))
def test_random_bytes_are_never_a_header(raw: bytes) -> None:
    with pytest.raises(ProtocolError):
        NOTES.parse(raw)


@given(headers(), st.integers(0, HEADER_BYTES - 1))
def test_a_truncated_header_is_never_one(header: Header, length: int) -> None:
    with pytest.raises(ProtocolError):
        NOTES.parse(NOTES.pack(header)[:length])


def test_another_version_and_another_protocol_are_told_apart_from_noise() -> None:
    later = notes(VERSION + 1).pack(Header(Kind.HELLO, 0))
    with pytest.raises(VersionMismatch, match=rf"notes version {VERSION + 1}.*version {VERSION}"):
        NOTES.parse(later)
    with pytest.raises(VersionMismatch):
        NOTES.check_start(later[:8])
    with pytest.raises(ProtocolError, match="not a notes connection"):
        NOTES.parse(notes(name="else").pack(Header(Kind.HELLO, 0)))


@pytest.mark.parametrize("kind", [0, 3, 15, 65535])
def test_an_unknown_kind_is_refused(kind: int) -> None:
    raw = bytearray(NOTES.pack(Header(Kind.PING, 1)))
    raw[6:8] = kind.to_bytes(2, "little")
    raw[40:] = checksum(raw[:40]).to_bytes(4, "little")
    with pytest.raises(ProtocolError, match=f"unknown frame kind {kind}"):
        NOTES.parse(raw)


@pytest.mark.parametrize("kind", Kind)
def test_no_header_can_ask_for_more_memory_than_the_limit(kind: Kind) -> None:
    header = Header(kind, 1, BODY_LIMITS[kind], PAYLOAD_LIMITS[kind])
    assert NOTES.parse(NOTES.pack(header)) == header
    for beyond in (
        header._replace(body_length=header.body_length + 1),
        header._replace(payload_length=header.payload_length + 1),
    ):
        with pytest.raises(ProtocolError, match="limit"):
            NOTES.parse(NOTES.pack(beyond))


@given(st.sampled_from(Kind), st.binary(max_size=300))
def test_any_body_is_a_body_or_an_error(kind: Kind, raw: bytes) -> None:
    try:
        body = NOTES.decode(Header(kind, 1, len(raw), body_checksum=checksum(raw)), raw)
    except ProtocolError:
        return
    assert isinstance(body, Body)


@settings(max_examples=30)
@given(st.lists(st.none() | U64 | st.text(max_size=5) | st.lists(st.booleans()), min_size=6, max_size=8))
def test_other_objects_as_a_body_are_errors(value: list[object]) -> None:
    raw = msgspec.msgpack.encode(value)
    for kind in (Kind.HELLO, *BODIES):
        with pytest.raises(ProtocolError, match=kind.name):
            NOTES.decode(Header(kind, 1, len(raw), body_checksum=checksum(raw)), raw)


@pytest.mark.parametrize("raw", [b"\x91" * MAX_BODY, b"\x92\xa1x" + b"\x91" * MAX_BODY])
def test_a_body_nested_without_end_is_an_error(raw: bytes) -> None:
    with pytest.raises(ProtocolError):
        NOTES.decode(Header(Kind.NOTE, 1, len(raw), body_checksum=checksum(raw)), raw)


@given(st.text(max_size=500), st.integers(0, 2**63), st.integers(0))
def test_a_damaged_body_is_noticed(text: str, number: int, bit: int) -> None:
    raw = bytearray(NOTES.frame(Kind.NOTE, 1, Note(text, number)))
    header, body = NOTES.parse(raw[:HEADER_BYTES]), raw[HEADER_BYTES:]
    assert NOTES.decode(header, body) == Note(text, number)
    bit %= len(body) * 8
    body[bit // 8] ^= 1 << bit % 8
    with pytest.raises(ProtocolError, match="checksum"):
        NOTES.decode(header, body)


@given(st.text(), st.text(), st.booleans())
def test_a_reason_of_any_length_can_be_sent(code: str, message: str, retriable: bool) -> None:
    raw = NOTES.frame(Kind.END, 1, Reason(code, message, retriable))
    reason = NOTES.decode(NOTES.parse(raw[:HEADER_BYTES]), raw[HEADER_BYTES:])
    assert reason == Reason(code[:64], message[:1024], retriable)


def test_a_reason_with_the_name_of_a_file_that_is_no_text_can_be_sent() -> None:
    assert NOTES.frame(Kind.END, 1, Reason("source", "no file \udcff"))


def test_what_does_not_fit_its_kind_or_is_too_large_is_not_packed() -> None:
    for kind, body in ((Kind.NOTE, None), (Kind.NOTE, Hello("x")), (Kind.PING, Note("x")), (Kind.END, Note("x"))):
        with pytest.raises(ValueError, match="body"):
            NOTES.frame(kind, 1, body)
    with pytest.raises(ValueError, match="limit"):
        NOTES.frame(Kind.NOTE, 1, Note("x" * MAX_BODY))
    assert NOTES.frame(Kind.LONG, 1, Note("x" * MAX_BODY))
    with pytest.raises(ProtocolError, match="Nothing instead of a Note"):
        expect(Nothing(), Note)
