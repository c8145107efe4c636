"""What a sender and a receiver of KV say to each other: the kinds of frames, their bodies and limits. The id of a frame
is the number of its stream."""

from __future__ import annotations

import enum
from typing import Annotated

import xxhash
from msgspec import Meta

from tandem.wire.protocol import Body, Protocol, Reason

PROTOCOL_VERSION = 3
"""1: first version. 2: the first token says up to which token KV is exact, so none that does not say it is believed.
3: header and handshake are those of the store's data plane."""

MAX_CONTROL_BYTES = 16 << 10
MAX_PAYLOAD_BYTES = 64 << 20
"""Most bytes of the payload of one Rows or Finish frame, which a receiver allocates for a peer."""

_U32 = Annotated[int, Meta(ge=0, le=(1 << 32) - 1)]
_Size = Annotated[int, Meta(ge=1, le=MAX_PAYLOAD_BYTES)]


class Open(Body, frozen=True):
    """The sender wants to hand over."""

    request_id: Annotated[str, Meta(min_length=1, max_length=512)]
    epoch: Annotated[int, Meta(ge=0)]
    num_tokens: Annotated[int, Meta(ge=1, le=(1 << 32) - 1)]
    row_bytes: _Size
    num_layers: Annotated[int, Meta(ge=1, le=1 << 16)]


class Accept(Body, frozen=True):
    """The receiver has room."""

    skip_tokens: _U32
    """Which it has already."""


class Rows(Body, frozen=True):
    """KV of tokens [start, stop) in one layer, in the arena or as the payload of the frame."""

    layer: _U32
    start: _U32
    stop: _U32
    length: Annotated[int, Meta(ge=0, le=MAX_PAYLOAD_BYTES)]
    """Bytes."""
    checksum: Annotated[int, Meta(ge=0)]
    """xxh3-64 of them."""
    offset: Annotated[int, Meta(ge=0)] = 0
    """Offset in the arena, in bytes."""


class Finish(Body, frozen=True):
    """All rows were sent."""

    payload: bytes


class Ack(Body, frozen=True):
    """Tells the sender that it may use a part of the arena again."""

    consumed: Annotated[int, Meta(ge=0)]
    """Rows frames of this connection so far."""


class Kind(enum.IntEnum):
    """Number of a kind of frame."""

    HELLO = 1
    REFUSE = 2
    """Stream 0: the whole connection."""
    OPEN = 10
    ACCEPT = 11
    ROWS = 12
    FINISH = 13
    FINISH_ACK = 14
    ABORT = 15
    RENEW = 16
    ACK = 17


HAND_OVER = Protocol(
    "hand-over",
    b"TDKV",
    PROTOCOL_VERSION,
    Kind,
    {
        Kind.OPEN: Open,
        Kind.ACCEPT: Accept,
        Kind.ROWS: Rows,
        Kind.FINISH: Finish,
        Kind.ABORT: Reason,
        Kind.ACK: Ack,
    },
    max_body_bytes=MAX_CONTROL_BYTES,
    larger_bodies={Kind.FINISH: MAX_PAYLOAD_BYTES},
    max_payload_bytes={Kind.ROWS: MAX_PAYLOAD_BYTES},
)


def checksum(rows: bytes | bytearray | memoryview) -> int:
    """64 bits, of the bytes of a Rows frame."""
    return xxhash.xxh3_64_intdigest(rows)
