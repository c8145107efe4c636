"""What workers, peers and a store node say to each other: the kinds of frames, their bodies and limits.

An answer carries the id of its request. Payloads are not checked here: bundles carry checksums of their own, which the
consumer verifies once, end to end.
"""

from __future__ import annotations

import enum
from typing import Annotated

import msgspec
from msgspec import Meta

from tandem.kvstore.interfaces import Located, ObjectInfo, ObjectKey, Refusal
from tandem.wire.link import Patience
from tandem.wire.protocol import Body, Protocol

PROTOCOL_VERSION = 4
"""1: first version. 2: memory is held for puts to come, look-ups may begin the fetch, and arenas can be read over NIXL.
3: the secret is proved before the first frame. 4: header and handshake are those of the hand-over."""

PATIENCE = Patience(connect_s=2.0, stall_s=5.0)
MAX_BODY_BYTES = 1 << 20
MAX_OBJECT_BYTES = 1 << 30
MAX_KEYS = 4096
"""Most keys of one Locate or Fetch: with chunks of 256 tokens, a million tokens."""
MAX_HELD = 4
"""Most runs of memory for puts to come that one Commit asks for."""
MAX_RANGES = 4096
"""Most ranges of one Read or Lease."""
MAX_METADATA_BYTES = 64 << 10
"""Most bytes of a NIXL agent's metadata: it has some hundred bytes for each network device."""

_Key = Annotated[ObjectKey, Meta(min_length=32, max_length=32)]
_Name = Annotated[str, Meta(max_length=512)]
_Count = Annotated[int, Meta(ge=0, le=MAX_KEYS)]
_Size = Annotated[int, Meta(ge=0, le=MAX_OBJECT_BYTES)]
_Offset = Annotated[int, Meta(ge=-1, le=1 << 52)]
"""Offset in the arena, in bytes. -1: none."""


class BeginPut(Body, frozen=True):
    """Asks for memory for an object; a Ticket answers."""

    key: _Key
    info: ObjectInfo


class Ticket(Body, frozen=True):
    """Named by the id of its BeginPut."""

    offset: _Offset
    refusal: Refusal | None = None


class Commit(Body, frozen=True):
    """Makes a put visible."""

    ticket: int
    """Number of a put, or of memory held for one, of the size and owner of `info`."""
    answer: bool
    """False: the client does not wait for a Done."""
    key: _Key | None = None
    """What held memory was filled with."""
    info: ObjectInfo | None = None
    hold: Annotated[list[int], Meta(max_length=MAX_HELD)] = msgspec.field(default_factory=list)
    """Numbers under which to hold as much memory again as `info` says; a Held answers."""


class Held(Body, frozen=True):
    """Answers a Commit that says `hold`."""

    offsets: Annotated[list[_Offset], Meta(max_length=MAX_HELD)]
    """-1: nothing is held."""


class Done(Body, frozen=True):
    """Answers a Commit or a Push."""

    done: bool


class Locate(Body, frozen=True):
    """Asks for the leading run of keys that can be had."""

    keys: Annotated[list[_Key], Meta(max_length=MAX_KEYS)]
    fetch: int
    """Number of a fetch that begins at once if all are in host memory: it saves the question that mostly follows."""


class LocatedRun(Body, frozen=True):
    """Answers a Locate."""

    located: Annotated[list[Located], Meta(max_length=MAX_KEYS)]
    offsets: Annotated[list[_Offset], Meta(max_length=MAX_KEYS)] = msgspec.field(default_factory=list)
    """Offsets in the arena, in bytes, if the fetch has begun: it is complete."""


class Fetch(Body, frozen=True):
    """Asks for objects in host memory; a Fetching answers."""

    located: Annotated[list[Located], Meta(max_length=MAX_KEYS)]
    overlap_s: Annotated[float, Meta(ge=0)] = 0.0


class Fetching(Body, frozen=True):
    """The answer to a Fetch."""

    sources: Annotated[list[Located], Meta(max_length=MAX_KEYS)]
    offsets: Annotated[list[_Offset], Meta(max_length=MAX_KEYS)]
    """Offsets of the objects in the arena, in bytes."""
    layers: int
    """Can be read of every object; `ALL_LAYERS` when it is complete."""


class Progress(Body, frozen=True):
    """How far a fetch is; named by the id of the Fetch. Comes by itself, until it is complete or has failed."""

    layers: int
    failed: bool


class Intact(Body, frozen=True):
    """Asks how many leading objects of a fetch are complete; a Count answers."""

    fetch: int


class Count(Body, frozen=True):
    """Answers an Intact."""

    count: _Count


class Quarantine(Body, frozen=True):
    """Tells that the content of an object is wrong."""

    key: _Key
    reason: Annotated[str, Meta(max_length=1024)]


class Range(msgspec.Struct, frozen=True, array_like=True, forbid_unknown_fields=True):
    """Bytes of an object."""

    key: _Key
    offset: _Size
    length: _Size


class Lease(Body, frozen=True):
    """Holds the objects in host memory until Release names the id of this frame."""

    ranges: Annotated[list[Range], Meta(max_length=MAX_RANGES)]


class Leased(Body, frozen=True):
    """Answers a Lease."""

    offsets: Annotated[list[_Offset], Meta(max_length=MAX_RANGES)]
    """Offset of each range in the arena, in bytes; -1: it is not in host memory, use Read."""


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
    """Address of the arena in the node's process."""
    arena_bytes: Annotated[int, Meta(ge=0, le=1 << 52)]


ALL_LAYERS = 1 << 30


class Kind(enum.IntEnum):
    """Number of a kind of frame."""

    HELLO = 1
    REFUSE = 2
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


DATA_PLANE = Protocol(
    "data plane",
    b"TDKN",
    PROTOCOL_VERSION,
    Kind,
    {
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
    },
    max_body_bytes=MAX_BODY_BYTES,
    max_payload_bytes=dict.fromkeys((Kind.DATA, Kind.PUSH, Kind.ENCODED), MAX_OBJECT_BYTES),
)
