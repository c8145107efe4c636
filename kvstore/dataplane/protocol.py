"""The wire format of the data plane: a 32-byte header, a small msgpack body, and for two kinds a payload of KV.

Header, little-endian: magic 4s, version u16, kind u16, id u64, body length u32, header checksum u32 (crc32 of the other
28 bytes), payload length u64. An answer carries the id of its request. Everything malformed raises ProtocolError, and
the connection that brought it is closed. A payload is not checked here: bundles carry checksums of their own, which
the consumer verifies once, end to end.
"""

from __future__ import annotations

import enum
import struct
import zlib
from typing import Annotated, NamedTuple

import msgspec
from msgspec import Meta

from tandem.kvstore.interfaces import Located, ObjectInfo, ObjectKey, Refusal

PROTOCOL_VERSION = 3
"""1: first version. 2: memory is held for puts to come, look-ups may begin the fetch, and
arenas can be read over NIXL. 3: the secret is proved before the first frame.

In every version the first 8 bytes are magic, version and kind, and a server answers a Hello of a version it does not
speak with a Refuse of its own version, so that both sides can name the two."""

MAGIC = b"TDKN"
_HEADER = struct.Struct("<4sHHQIIQ")
HEADER_BYTES = _HEADER.size
_CHECKSUM_AT = 20

MAX_BODY_BYTES = 1 << 20
MAX_OBJECT_BYTES = 1 << 30
MAX_KEYS = 4096
"""Of one Locate or Fetch: with chunks of 256 tokens, a million tokens."""
MAX_HELD = 4
"""Of one Commit."""
MAX_RANGES = 4096
"""Of one Read or Lease."""
MAX_METADATA_BYTES = 64 << 10
"""Of a NIXL agent: some hundred bytes for each network device."""


class ProtocolError(Exception):
    """The peer sent something that is not this protocol."""


class VersionMismatch(ProtocolError):
    def __init__(self, theirs: int) -> None:
        super().__init__(f"the peer speaks data plane version {theirs}, this side version {PROTOCOL_VERSION}")


_Key = Annotated[ObjectKey, Meta(min_length=32, max_length=32)]
_Name = Annotated[str, Meta(max_length=512)]
_Count = Annotated[int, Meta(ge=0, le=MAX_KEYS)]
_Size = Annotated[int, Meta(ge=0, le=MAX_OBJECT_BYTES)]
_Offset = Annotated[int, Meta(ge=-1, le=1 << 52)]
"""In the arena. -1: none."""


class Body(msgspec.Struct, frozen=True, array_like=True, forbid_unknown_fields=True):
    """What follows a header. Subclasses are registered in `_BODIES`."""


class Hello(Body, frozen=True):
    """First frame, from the client."""

    name: _Name


class Welcome(Body, frozen=True):
    """Who the server is. Comes with the descriptor of the arena where `arena_bytes` is not 0."""

    node_id: _Name
    epoch: Annotated[int, Meta(ge=0)]
    host_id: _Name
    arena_bytes: Annotated[int, Meta(ge=0, le=1 << 52)]


class Refuse(Body, frozen=True):
    code: Annotated[str, Meta(max_length=64)]
    message: Annotated[str, Meta(max_length=1024)]


class BeginPut(Body, frozen=True):
    key: _Key
    info: ObjectInfo


class Ticket(Body, frozen=True):
    """Named by the id of its BeginPut."""

    offset: _Offset
    refusal: Refusal | None = None


class Commit(Body, frozen=True):
    ticket: int
    """Or held memory, of the size and owner of `info`."""
    answer: bool
    """False: the client does not wait for a Done."""
    key: _Key | None = None
    """What held memory was filled with."""
    info: ObjectInfo | None = None
    hold: Annotated[list[int], Meta(max_length=MAX_HELD)] = []
    """Numbers under which to hold as much memory again as `info` says; a Held answers."""


class Held(Body, frozen=True):
    """Answers a Commit that says `hold`."""

    offsets: Annotated[list[_Offset], Meta(max_length=MAX_HELD)]
    """-1: nothing is held."""


class Done(Body, frozen=True):
    done: bool


class Locate(Body, frozen=True):
    keys: Annotated[list[_Key], Meta(max_length=MAX_KEYS)]
    fetch: int
    """Number of a fetch that begins at once if all are in host memory: it saves the question that mostly follows."""


class LocatedRun(Body, frozen=True):
    located: Annotated[list[Located], Meta(max_length=MAX_KEYS)]
    offsets: Annotated[list[_Offset], Meta(max_length=MAX_KEYS)] = []
    """In the arena, if the fetch has begun: it is complete."""


class Fetch(Body, frozen=True):
    located: Annotated[list[Located], Meta(max_length=MAX_KEYS)]
    overlap_s: Annotated[float, Meta(ge=0)] = 0.0


class Fetching(Body, frozen=True):
    """The answer to a Fetch."""

    sources: Annotated[list[Located], Meta(max_length=MAX_KEYS)]
    offsets: Annotated[list[_Offset], Meta(max_length=MAX_KEYS)]
    """Of the objects in the arena."""
    layers: int
    """Can be read of every object; `ALL_LAYERS` when it is complete."""


class Progress(Body, frozen=True):
    """How far a fetch is; named by the id of the Fetch. Comes by itself, until it is complete or has failed."""

    layers: int
    failed: bool


class Intact(Body, frozen=True):
    fetch: int


class Count(Body, frozen=True):
    count: _Count


class Quarantine(Body, frozen=True):
    key: _Key
    reason: Annotated[str, Meta(max_length=1024)]


class Range(msgspec.Struct, frozen=True, array_like=True, forbid_unknown_fields=True):
    key: _Key
    offset: _Size
    length: _Size


class Lease(Body, frozen=True):
    """Holds the objects in host memory until Release names the id of this frame."""

    ranges: Annotated[list[Range], Meta(max_length=MAX_RANGES)]


class Leased(Body, frozen=True):
    offsets: Annotated[list[_Offset], Meta(max_length=MAX_RANGES)]
    """Of each range in the arena; -1: not in host memory, use Read."""


class Read(Body, frozen=True):
    """Answered by one Data per range, in order."""

    ranges: Annotated[list[Range], Meta(max_length=MAX_RANGES)]


class ReadEncoded(Body, frozen=True):
    """Asks for a whole object under another codec."""

    key: _Key
    codec: Annotated[str, Meta(max_length=32)]


class Encoded(Body, frozen=True):
    """Its payload is the object under that codec; none if it is not in host memory or there is no such codec."""

    encode_s: Annotated[float, Meta(ge=0)]


class Push(Body, frozen=True):
    """Its payload is the object."""

    key: _Key
    info: ObjectInfo


class AgentInfo(Body, frozen=True):
    """The answer to an Agent: how to read the arena over NIXL."""

    name: _Name
    metadata: Annotated[bytes, Meta(max_length=MAX_METADATA_BYTES)]
    """Empty: it cannot be read in this way."""
    address: Annotated[int, Meta(ge=0, le=1 << 62)]
    """Of the arena, in the node's process."""
    arena_bytes: Annotated[int, Meta(ge=0, le=1 << 52)]


class Nothing(Body, frozen=True):
    """The frame says it all."""


ALL_LAYERS = 1 << 30


class Kind(enum.IntEnum):
    HELLO = 1
    WELCOME = 4
    REFUSE = 5
    BEGIN_PUT = 10
    TICKET = 11
    COMMIT = 12
    DONE = 13
    ABORT = 14
    """id: of the Ticket, or of held memory. No answer."""
    LOCATE = 15
    LOCATED = 16
    FETCH = 17
    FETCHING = 18
    PROGRESS = 19
    CLOSE_FETCH = 23
    """id: of the Fetch. No answer."""
    HELD = 24
    INTACT = 20
    COUNT = 21
    QUARANTINE = 22
    """No answer."""
    LEASE = 30
    LEASED = 31
    RELEASE = 32
    """id: of the Lease. No answer."""
    READ = 33
    DATA = 34
    """Payload: the range; none for a miss."""
    PUSH = 35
    READ_ENCODED = 36
    ENCODED = 37
    AGENT = 38
    AGENT_INFO = 39


_BODIES: dict[Kind, type[Body]] = {
    Kind.HELLO: Hello,
    Kind.WELCOME: Welcome,
    Kind.REFUSE: Refuse,
    Kind.BEGIN_PUT: BeginPut,
    Kind.TICKET: Ticket,
    Kind.COMMIT: Commit,
    Kind.HELD: Held,
    Kind.DONE: Done,
    Kind.LOCATE: Locate,
    Kind.LOCATED: LocatedRun,
    Kind.FETCH: Fetch,
    Kind.FETCHING: Fetching,
    Kind.PROGRESS: Progress,
    Kind.INTACT: Intact,
    Kind.COUNT: Count,
    Kind.QUARANTINE: Quarantine,
    Kind.LEASE: Lease,
    Kind.LEASED: Leased,
    Kind.READ: Read,
    Kind.PUSH: Push,
    Kind.READ_ENCODED: ReadEncoded,
    Kind.ENCODED: Encoded,
    Kind.AGENT_INFO: AgentInfo,
}
"""Other kinds have no body."""
_KIND_OF = {body: kind for kind, body in _BODIES.items()}
_KINDS = {int(kind): kind for kind in Kind}
_WITH_PAYLOAD = (Kind.DATA, Kind.PUSH, Kind.ENCODED)
_DECODERS = {kind: msgspec.msgpack.Decoder(body) for kind, body in _BODIES.items()}
_NOTHING = Nothing()
_encode = msgspec.msgpack.Encoder().encode


class Header(NamedTuple):
    kind: Kind
    id: int
    body_length: int = 0
    payload_length: int = 0


def pack(header: Header) -> bytes:
    raw = bytearray(
        _HEADER.pack(MAGIC, PROTOCOL_VERSION, header.kind, header.id, header.body_length, 0, header.payload_length)
    )
    struct.pack_into("<I", raw, _CHECKSUM_AT, _checksum(raw))
    return bytes(raw)


def parse(raw: bytes | bytearray) -> Header:
    """The header in 32 bytes. Raises ProtocolError, VersionMismatch for a well-formed start of another version."""
    if len(raw) != HEADER_BYTES:
        raise ProtocolError(f"a header has {HEADER_BYTES} bytes, not {len(raw)}")
    magic, version, number, frame_id, body_length, checksum, payload_length = _HEADER.unpack(raw)
    if magic != MAGIC:
        raise ProtocolError("not a data plane connection: wrong magic")
    if version != PROTOCOL_VERSION:
        raise VersionMismatch(version)
    if checksum != _checksum(raw):
        raise ProtocolError("header checksum does not match")
    kind = _KINDS.get(number)
    if kind is None:
        raise ProtocolError(f"unknown frame kind {number}")
    if body_length > (MAX_BODY_BYTES if kind in _BODIES else 0):
        raise ProtocolError(f"{kind.name} with a body of {body_length} bytes")
    if payload_length > (MAX_OBJECT_BYTES if kind in _WITH_PAYLOAD else 0):
        raise ProtocolError(f"{kind.name} with a payload of {payload_length} bytes")
    return Header(kind, frame_id, body_length, payload_length)


def _checksum(raw: bytes | bytearray) -> int:
    view = memoryview(raw)
    return zlib.crc32(view[_CHECKSUM_AT + 4 :], zlib.crc32(view[:_CHECKSUM_AT]))


def encode(kind: Kind, frame_id: int, body: Body | None = None, payload_length: int = 0) -> bytes:
    """Header and body. Raises ValueError for a body that is not of that kind, or too large."""
    if body is None:
        if kind in _BODIES:
            raise ValueError(f"{kind.name} needs a body")
        return pack(Header(kind, frame_id, 0, payload_length))
    if _KIND_OF.get(type(body)) is not kind:
        raise ValueError(f"{type(body).__name__} is not the body of {kind.name}")
    raw = _encode(body)
    if len(raw) > MAX_BODY_BYTES:
        raise ValueError(f"a {kind.name} of {len(raw)} bytes, the limit is {MAX_BODY_BYTES}")
    return pack(Header(kind, frame_id, len(raw), payload_length)) + raw


def decode(header: Header, raw: bytes | bytearray) -> Body:
    """The body that belongs to `header`; `Nothing` for a kind without one."""
    decoder = _DECODERS.get(header.kind)
    if decoder is None:
        return _NOTHING
    try:
        return decoder.decode(raw)
    except (msgspec.MsgspecError, ValueError, RecursionError) as error:
        raise ProtocolError(f"malformed {header.kind.name}: {error}") from error
