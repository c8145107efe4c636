"""How a lower tier writes down what it stores: one header page before the content of each object.

    page (4096 bytes) = magic | state | body length | xxh3-64 of the body | body (msgpack) | zeros
    record            = page | content | zeros up to a multiple of 4096 (only in segments of the disk tier)

The state lies outside the checksum so that deleting a record is one small write in place. The body names the place of
the record itself: bytes inside an object that look like a header never pass for one. Whether the *content* is right is
for the reader to check, end to end; this page only says whose bytes they are and how many.
"""

from __future__ import annotations

import struct
from typing import Annotated

import msgspec
import xxhash

from tandem.kvstore.interfaces import ObjectInfo, ObjectKey

PAGE = 4096
KEY_BYTES = 32
STATE_OFFSET = 8
LIVE = b"LIVE"
DEAD = b"DEAD"

_MAGIC = b"TKVREC\x00\x01"
"""The last byte is the version. 1: first version."""
_HEAD = struct.Struct("<8s4sIQ")
_Count = Annotated[int, msgspec.Meta(ge=0, lt=1 << 62)]


class Record(msgspec.Struct, frozen=True, array_like=True, kw_only=True, gc=False):
    """An object as a tier knows it."""

    key: Annotated[bytes, msgspec.Meta(min_length=KEY_BYTES, max_length=KEY_BYTES)]
    size: _Count
    num_tokens: _Count
    owner: str
    model: str
    recompute_s: float
    unused: float | None = None
    """None. Keeps the place of the fields after it in records of earlier versions."""
    sequence: _Count = 0
    """Disk tier: grows with every put; of two records with one key the later one counts."""
    segment: _Count = 0
    offset: _Count = 0
    start_position: _Count = 0
    """Last: records of stores that did not know it can still be read."""

    def info(self) -> ObjectInfo:
        """What the node is told of it."""
        return ObjectInfo(
            size=self.size,
            num_tokens=self.num_tokens,
            owner=self.owner,
            model=self.model,
            recompute_s=self.recompute_s,
            start_position=self.start_position,
        )


_encoder = msgspec.msgpack.Encoder()
_decoder = msgspec.msgpack.Decoder(Record)


def new_record(key: ObjectKey, info: ObjectInfo, content: memoryview) -> Record:
    """Raises ValueError if the arguments contradict each other: a defect of the caller, not a fault."""
    if len(key) != KEY_BYTES:
        raise ValueError(f"key has {len(key)} bytes; a key is a digest of {KEY_BYTES}")
    if info.size != content.nbytes:
        raise ValueError(f"info.size is {info.size} but content has {content.nbytes} bytes; set it to the stored size")
    return Record(
        key=key,
        size=info.size,
        num_tokens=info.num_tokens,
        owner=info.owner,
        model=info.model,
        recompute_s=info.recompute_s,
        start_position=info.start_position,
    )


def encode_body(record: Record) -> bytes:
    return _encoder.encode(record)


def decode_body(body: bytes | memoryview) -> Record | None:
    """The record; None for any bytes that are none."""
    try:
        return _decoder.decode(body)
    except (msgspec.DecodeError, UnicodeDecodeError):
        return None


def encode_page(record: Record) -> bytes | None:
    """None if owner and model are too long for a page."""
    body = encode_body(record)
    if _HEAD.size + len(body) > PAGE:
        return None
    return (_HEAD.pack(_MAGIC, LIVE, len(body), xxhash.xxh3_64_intdigest(body)) + body).ljust(PAGE, b"\0")


def decode_page(page: bytes | memoryview) -> tuple[Record, bool] | None:
    """The record and whether it is live; None for any bytes that are no header page."""
    if len(page) < _HEAD.size:
        return None
    magic, state, length, checksum = _HEAD.unpack_from(page)
    if magic != _MAGIC or state not in (LIVE, DEAD) or not 0 < length <= len(page) - _HEAD.size:
        return None
    body = bytes(page[_HEAD.size : _HEAD.size + length])
    if xxhash.xxh3_64_intdigest(body) != checksum:
        return None
    record = decode_body(body)
    return None if record is None else (record, state == LIVE)


def padded(size: int) -> int:
    """Bytes of a whole record in a segment."""
    return PAGE + -(-size // PAGE) * PAGE
