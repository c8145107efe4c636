"""The header before every frame, the same for all protocols on sockets.

44 bytes, little-endian: magic 4s, version u16, kind u16, id u64, sequence u64, payload length u64, body length u32,
body checksum u32, header checksum u32 (xxh32 of the 40 bytes before it). The body follows, then the payload. `sequence`
counts the frames of one direction, so a lost, repeated or swapped one is noticed. In every version of every protocol
the first 8 bytes are magic, version and kind: two ends of different versions can tell each other so.
"""

from __future__ import annotations

import enum
import struct
from typing import NamedTuple

import xxhash

START = struct.Struct("<4sHH")
_CHECKED = struct.Struct("<4sHHQQQII")
_HEADER = struct.Struct("<4sHHQQQIII")
_TAIL = struct.Struct("<I")
HEADER_BYTES = _HEADER.size


class ProtocolError(Exception):
    """The peer sent something that is not the protocol of this connection."""


class VersionMismatch(ProtocolError):
    """The peer speaks the same protocol in another version."""

    def __init__(self, name: str, theirs: int, mine: int) -> None:
        super().__init__(f"the peer speaks {name} version {theirs}, this side version {mine}")


class Header(NamedTuple):
    """What a frame is, and how much follows."""

    kind: enum.IntEnum
    id: int
    """Number of a request, which its answer repeats, or of a stream."""
    body_length: int = 0
    payload_length: int = 0
    sequence: int = 0
    body_checksum: int = 0


def checksum(raw: bytes | bytearray | memoryview) -> int:
    """32 bits, of a header or a body."""
    return xxhash.xxh32_intdigest(raw)


def pack(magic: bytes, version: int, header: Header) -> bytes:
    """The 44 bytes of `header`."""
    kind, frame_id, body_length, payload_length, sequence, body_checksum = header
    head = _CHECKED.pack(magic, version, kind, frame_id, sequence, payload_length, body_length, body_checksum)
    return head + _TAIL.pack(checksum(head))


def unpack(raw: bytes | bytearray | memoryview) -> tuple[bytes, int, int, int, int, int, int, int, bool]:
    """Magic, version, kind, id, sequence, payload length, body length and body checksum of 44 bytes, and whether their
    own checksum is right."""
    *fields, digest = _HEADER.unpack(raw)
    return *fields, digest == checksum(raw[: _CHECKED.size])
