"""The wire format: a 64-byte header, and for most kinds a small body.

Header, little-endian: magic 4s, version u16, kind u16, stream u32, layer u32, start u32, stop u32, length u32,
reserved u32 (0), offset u64, sequence u64, checksum u64 (xxh3-64 of the payload), header checksum u64 (xxh3-64 of the
56 bytes before it). The payload of Rows lies in the arena at `offset`, or follows the header; every other payload
follows. Everything malformed raises FrameError, and the connection that brought it is closed.
"""

from __future__ import annotations

import enum
import struct
from typing import Annotated, NamedTuple, TypeVar

import msgspec
import xxhash
from msgspec import Meta

from tandem.handover.interfaces import Reason

PROTOCOL_VERSION = 2
"""1: first version. 2: the first token says up to which token KV is exact, so none that does not say it is believed.

In every version the first 8 bytes are magic, version and kind, and a server answers a Hello of a version it does not
speak with a Refuse of its own version, so that both sides can name the two."""

MAGIC = b"TDKV"
HEADER = struct.Struct("<4sHHIIIIIIQQQ")
HEADER_BYTES = HEADER.size + 8
_TAIL = struct.Struct("<Q")

MAX_CONTROL_BYTES = 16 << 10
MAX_PAYLOAD_BYTES = 64 << 20
"""Of one Rows or Finish frame: the most a receiver allocates for a peer."""


class Kind(enum.IntEnum):
    HELLO = 1
    OPEN = 2
    ACCEPT = 3
    """start: tokens to skip."""
    REFUSE = 4
    """Stream 0: the whole connection."""
    ROWS = 5
    FINISH = 6
    FINISH_ACK = 7
    ABORT = 8
    RENEW = 9
    ACK = 10
    """offset: Rows frames of this connection consumed so far."""


_LENGTH_LIMITS = {
    Kind.HELLO: MAX_CONTROL_BYTES,
    Kind.OPEN: MAX_CONTROL_BYTES,
    Kind.REFUSE: MAX_CONTROL_BYTES,
    Kind.ABORT: MAX_CONTROL_BYTES,
    Kind.ROWS: MAX_PAYLOAD_BYTES,
    Kind.FINISH: MAX_PAYLOAD_BYTES,
}
"""Other kinds have no payload."""
_KINDS = {int(kind): kind for kind in Kind}


class FrameError(Exception):
    """The peer sent something that is not this protocol."""


class VersionMismatch(FrameError):
    def __init__(self, theirs: int) -> None:
        super().__init__(f"peer speaks protocol version {theirs}, this side version {PROTOCOL_VERSION}")


class Frame(NamedTuple):
    """A header. Fields that a kind does not use are 0."""

    kind: Kind
    stream: int = 0
    layer: int = 0
    start: int = 0
    stop: int = 0
    length: int = 0
    offset: int = 0
    sequence: int = 0
    """Counts the frames of one direction of a connection from 0."""
    checksum: int = 0


def checksum(payload: bytes | bytearray | memoryview) -> int:
    return xxhash.xxh3_64_intdigest(payload)


def pack(frame: Frame) -> bytes:
    head = HEADER.pack(
        MAGIC,
        PROTOCOL_VERSION,
        frame.kind,
        frame.stream,
        frame.layer,
        frame.start,
        frame.stop,
        frame.length,
        0,
        frame.offset,
        frame.sequence,
        frame.checksum,
    )
    return head + _TAIL.pack(xxhash.xxh3_64_intdigest(head))


def parse(raw: bytes | bytearray | memoryview) -> Frame:
    """The frame in 64 bytes. Raises FrameError, VersionMismatch for a well-formed start of another version."""
    if len(raw) != HEADER_BYTES:
        raise FrameError(f"a header has {HEADER_BYTES} bytes, not {len(raw)}")
    view = memoryview(raw)
    magic, version, kind, stream, layer, start, stop, length, reserved, offset, sequence, digest = HEADER.unpack(
        view[: HEADER.size]
    )
    if magic != MAGIC:
        raise FrameError("not a hand-over connection: wrong magic")
    if version != PROTOCOL_VERSION:
        raise VersionMismatch(version)
    if _TAIL.unpack(view[HEADER.size :])[0] != checksum(view[: HEADER.size]):
        raise FrameError("header checksum does not match")
    known = _KINDS.get(kind)
    if known is None:
        raise FrameError(f"unknown frame kind {kind}")
    if reserved:
        raise FrameError("reserved field is not 0")
    limit = _LENGTH_LIMITS.get(known, 0)
    if length > limit:
        raise FrameError(f"{known.name} of {length} bytes, the limit is {limit}")
    return Frame(known, stream, layer, start, stop, length, offset, sequence, digest)


class Hello(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """First frame of both directions."""

    worker_id: Annotated[str, Meta(max_length=256)]
    epoch: Annotated[int, Meta(ge=0)]
    compatibility: Annotated[bytes, Meta(max_length=64)]
    lease_s: Annotated[float, Meta(gt=0, le=3600)]
    """Of the receiver, which the sender renews within; a sender's own is ignored."""
    arena_bytes: Annotated[int, Meta(ge=0, le=1 << 40)] = 0
    """Size of the memfd that came with this frame; 0 for none."""


class Open(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    request_id: Annotated[str, Meta(min_length=1, max_length=512)]
    epoch: Annotated[int, Meta(ge=0)]
    num_tokens: Annotated[int, Meta(ge=1, le=(1 << 32) - 1)]
    row_bytes: Annotated[int, Meta(ge=1, le=MAX_PAYLOAD_BYTES)]
    num_layers: Annotated[int, Meta(ge=1, le=1 << 16)]


class ReasonBody(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Body of Refuse and Abort."""

    code: Annotated[str, Meta(max_length=64)]
    message: Annotated[str, Meta(max_length=1024)]
    retriable: bool


_Body = TypeVar("_Body", Hello, Open, ReasonBody)


def encode(body: Hello | Open | ReasonBody) -> bytes:
    return msgspec.msgpack.encode(body)


def decode(raw: bytes | bytearray, kind: type[_Body]) -> _Body:
    """Raises FrameError when `raw` is not exactly one `kind`."""
    try:
        return msgspec.msgpack.decode(raw, type=kind)
    except (msgspec.MsgspecError, ValueError, RecursionError) as error:
        raise FrameError(f"malformed {kind.__name__}: {error}") from error


def encode_reason(reason: Reason) -> bytes:
    message = reason.message[:1024].encode(errors="replace").decode()  # a path in an error may hold lone surrogates
    return encode(ReasonBody(reason.code[:64], message, reason.retriable))


def decode_reason(raw: bytes | bytearray) -> Reason:
    body = decode(raw, ReasonBody)
    return Reason(body.code, body.message, body.retriable)
