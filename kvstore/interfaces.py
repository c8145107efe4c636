"""What the parts of the KV store promise each other. Read this first; `node/` puts the parts together.

    worker ──HomeNode──> node ──Tier──> disk, remote (Redis, object store)
                          │ ──PeerReader──> other nodes
                          │ ──Directory──> who holds which key
                          └── EvictionPolicy: what leaves a full tier

Everything here is synchronous and safe from any thread unless it says otherwise. A fault is a value (None, False, a
Refusal), never an exception, except where a docstring lists one: a missing object is ordinary.
"""

from __future__ import annotations

import enum
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import NewType, Protocol

ObjectKey = NewType("ObjectKey", bytes)
"""32 bytes: the hash of a chunk on a prefix chain, or of a passage. Equal keys mean equal content."""


class TierName(enum.StrEnum):
    """Where KV came from, in the order in which it is preferred."""

    DEVICE = "device"
    """The engine's own KV pool."""
    HOST = "host"
    DISK = "disk"
    PEER = "peer"
    """Host memory or disk of another node."""
    REMOTE = "remote"
    """Redis or an object store, shared by all nodes."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ObjectInfo:
    """What the store knows of an object without opening it. Travels with it from tier to tier."""

    size: int
    """Bytes of the whole bundle."""
    num_tokens: int
    owner: str = "default"
    """Tenant: who is charged for it and may clear it."""
    model: str = ""
    """Served model name."""
    recompute_s: float = 0.0
    """Measured time to compute it again; 0: unknown."""
    start_position: int = 0
    """Position of its first token on a prefix chain: what lies behind is of no use without it. 0 also where that is
    unknown."""


class Refusal(enum.StrEnum):
    """Why a put does not begin. None of them is an error: the KV is simply not stored."""

    EXISTS = "exists"
    """Stored already, or being written by another."""
    NO_SPACE = "no_space"
    """Everything that could leave is leased or pinned, or the object is larger than the tier."""
    QUOTA = "quota"
    """The owner's quota is taken up by objects that cannot leave."""
    CLOSED = "closed"
    """The node is shutting down or out of reach."""


class PutTicket(Protocol):
    """The right to fill `buffer` and commit. It lapses if neither commit nor abort comes in time."""

    @property
    def key(self) -> ObjectKey: ...

    @property
    def buffer(self) -> memoryview:
        """Writable, `ObjectInfo.size` bytes, host memory of the node."""

    def commit(self) -> bool:
        """The bytes are complete: the object can be found from now on. False: the ticket had lapsed."""

    def abort(self) -> None:
        """Idempotent, and without effect after `commit`."""


@dataclass(frozen=True, slots=True)
class Located:
    """Where an object can be had at the moment, at lowest cost."""

    key: ObjectKey
    tier: TierName
    link: str
    """What the time to fetch it depends on: `host`, `disk`, `remote` or `peer:NODE_ID`."""
    size: int


class Fetch(Protocol):
    """Objects on their way into host memory, layer by layer, and the leases that keep them there. Close it."""

    @property
    def sources(self) -> Sequence[Located]:
        """One per object that was asked for and found: the leading run of the keys."""

    def wait(self, num_layers: int, timeout_s: float) -> bool:
        """Waits until the header and the first `num_layers` layers of every object can be read. False: one of them
        cannot be had any more, or time is up."""

    def intact(self) -> int:
        """How many leading objects are complete now."""

    def buffer(self, index: int) -> memoryview:
        """Read-only bytes of object `index`, valid until `close`."""

    def close(self) -> None:
        """Ends the leases, and the load if it still runs. Idempotent."""


class HomeNode(Protocol):
    """The store as a worker sees it: one node on its own host, in its own process or another."""

    def begin_put(self, key: ObjectKey, info: ObjectInfo) -> PutTicket | Refusal: ...

    def locate(self, keys: Sequence[ObjectKey]) -> list[Located]:
        """The leading run of `keys` that can be had, cheapest place each. Asks the directory; milliseconds."""

    def fetch(self, located: Sequence[Located], overlap_s: float = 0.0) -> Fetch:
        """Starts to bring the objects into host memory; returns at once. `overlap_s`: how long the caller will compute
        with the first layers while the others arrive."""

    def quarantine(self, key: ObjectKey, reason: str) -> None:
        """The content was found to be wrong: the object is dropped from every tier of this node, and counted."""

    def close(self) -> None: ...


# Below the node


class Tier(Protocol):
    """Bytes by key below host memory: disk, Redis, an object store. The node decides what enters and leaves."""

    @property
    def name(self) -> TierName: ...

    @property
    def capacity_bytes(self) -> int: ...

    @property
    def used_bytes(self) -> int:
        """What counts against the capacity, overhead included."""

    def put(self, key: ObjectKey, info: ObjectInfo, content: memoryview) -> bool:
        """Stores a whole object (replacing one of that key). False: no room or a fault; nothing is left behind.
        After True it can be read, also after a restart where the tier is durable."""

    def info(self, key: ObjectKey) -> ObjectInfo | None: ...

    def read(self, key: ObjectKey, offset: int, out: memoryview) -> bool:
        """Fills `out` with the object's bytes from `offset` on. False: not there, too short, or a fault."""

    def delete(self, key: ObjectKey) -> bool: ...

    def objects(self) -> Iterator[tuple[ObjectKey, ObjectInfo]]:
        """Everything that can be read now, oldest first where that is known; after a restart, what survived."""

    def check_integrity(self) -> None:
        """Raises StoreIntegrityError with everything that is wrong."""

    def close(self) -> None: ...


class EvictionPolicy(Protocol):
    """Which object leaves a full tier. Pure: no clock, no I/O; not thread-safe, the node calls it under its lock."""

    def insert(self, key: ObjectKey, info: ObjectInfo) -> None:
        """The object entered the tier."""

    def hit(self, key: ObjectKey) -> None:
        """It was read. Unknown keys are ignored."""

    def remove(self, key: ObjectKey) -> None:
        """It left for another reason than `evict`. Unknown keys are ignored."""

    def evict(self, may_leave: Callable[[ObjectKey], bool]) -> ObjectKey | None:
        """Chooses an object for which `may_leave` is true, forgets it as a resident, and returns its key."""

    def remember(self, most: int) -> None:
        """Keeps no more than so many objects in mind that have left, from now on."""

    def __len__(self) -> int:
        """Residents."""


@dataclass(frozen=True, slots=True)
class EncodedObject:
    content: bytearray
    encode_s: float
    """What encoding took on the other side: no part of what the link takes."""


class PeerReader(Protocol):
    """Reads objects of other nodes."""

    def read_many(self, node_id: str, ranges: Sequence[tuple[ObjectKey, int, memoryview]]) -> list[bool]:
        """Whether `out` now holds the bytes, for each (key, offset, out) in order; where it does not, its content is
        anything, and may still change. Pipelined; blocks for at most a few seconds; all False if the node cannot be
        reached."""

    def read_encoded(self, node_id: str, key: ObjectKey, codec: str) -> EncodedObject | None:
        """The whole object under another codec. None: that node has it in no host memory, or cannot be reached."""

    def push(self, node_id: str, key: ObjectKey, info: ObjectInfo, content: memoryview) -> bool:
        """Puts a replica on another node. False: refused or out of reach."""


# The directory


@dataclass(frozen=True, slots=True)
class Location:
    """One place where the store has an object: a tier of a node."""

    node_id: str
    epoch: int
    """Epoch of the process that announced it: entries of an earlier epoch are void."""
    tier: TierName
    size: int


@dataclass(frozen=True, slots=True, kw_only=True)
class NodeInfo:
    """A node and where to reach it."""

    node_id: str
    epoch: int
    """Differs for every start of the process, and grows."""
    host_id: str
    """Nodes with equal host_id share memory and unix sockets."""
    unix_path: str = ""
    host: str = ""
    port: int = 0
    grpc_address: str = ""
    capacity_bytes: int = 0


@dataclass(frozen=True, slots=True)
class DirectoryEvent:
    """An object that came to a tier of the node that says so, or left it."""

    key: ObjectKey
    tier: TierName
    size: int
    """0: the object left this tier of the node."""


@dataclass(frozen=True, slots=True)
class EventBatch:
    """Changes on one node, in order. `seq` counts batches of one epoch from 1; a gap calls for a resync."""

    node_id: str
    epoch: int
    seq: int
    events: tuple[DirectoryEvent, ...]


class Directory(Protocol):
    """Who holds which key. A hint: a location may be stale, and a reader that finds nothing treats it as a miss."""

    def register(self, node: NodeInfo, snapshot: Callable[[], Sequence[DirectoryEvent]]) -> None:
        """Announces `node`, which this process runs, and keeps it alive until `close`. `snapshot` lists what the node
        holds and is called (from a thread of the directory) whenever everything has to be said again."""

    def publish(self, node_id: str, events: Sequence[DirectoryEvent]) -> None:
        """Queues changes of a registered node: numbers and sends them in the background. Never blocks or raises."""

    def lookup(self, keys: Sequence[ObjectKey]) -> list[tuple[Location, ...]]:
        """Locations on live nodes, one tuple per key. Empty tuples if the directory cannot be reached."""

    def nodes(self) -> dict[str, NodeInfo]:
        """Live nodes by id; what was last known if the directory cannot be reached."""

    def close(self) -> None:
        """Unregisters this process's nodes."""


class StoreIntegrityError(Exception):
    """The books do not balance: a defect in the store, never the user's doing."""
