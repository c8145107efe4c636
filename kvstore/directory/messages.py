"""What a directory, those who feed it and those who follow it say to each other.

A node's changes travel as numbered updates. There is no separate snapshot message: a *reset* update voids all that was
said of the node before, and the updates after it say the rest. One rule orders everything: an update is taken if its
number is the next one, or if it resets and its number is higher. So a late, doubled or reordered message is harmless,
whichever way it comes, and whoever misses a number asks for the whole.
"""

from __future__ import annotations

import enum
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from tandem.kvstore.interfaces import DirectoryEvent, EventBatch, NodeInfo

NODE_TTL_S = 3.0
"""A node that was silent for this long is taken for dead."""
BEAT_S = 1.0
"""How often a node says that it lives, if it has nothing else to say."""
FORGET_S = 60.0
"""A silent node's entries are kept, unseen, for this long: it may only have been suspended."""
MAX_BATCH = 512
"""Events of an update: Redis serves nobody else while it takes one in (about 2 ms)."""


@dataclass(frozen=True, slots=True)
class Update:
    batch: EventBatch
    reset: bool = False
    """Everything said of this node before is void."""


class Verdict(enum.Enum):
    """What a directory makes of a node's update."""

    OK = "ok"
    RESYNC = "resync"
    """The directory lacks something: say everything again."""
    SUPERSEDED = "superseded"
    """A later process goes by this node's id."""
    UNREACHABLE = "unreachable"


@dataclass(frozen=True, slots=True)
class Reply:
    verdict: Verdict
    seq: int = 0
    """The last number the directory has taken from this node and epoch."""


UNREACHABLE = Reply(Verdict.UNREACHABLE)


@dataclass(frozen=True, slots=True)
class NodeState:
    info: NodeInfo
    seq: int


@dataclass(frozen=True, slots=True)
class Page:
    """A piece of the stream of updates of all nodes."""

    updates: tuple[Update, ...]
    cursor: str
    """Where the next piece begins. Its content is the feed's own affair."""


@dataclass(frozen=True, slots=True)
class Dump:
    """Everything one node held when it had said `seq`; what it said later may be in it, too."""

    epoch: int
    seq: int
    events: Sequence[DirectoryEvent]


class Uplink(Protocol):
    """How a publisher reaches the directory. Blocks for about a second at most; faults are UNREACHABLE."""

    def announce(self, node: NodeInfo, seq: int) -> Reply:
        """`node` lives, and `seq` was its last update."""

    def apply(self, update: Update) -> Reply: ...

    def withdraw(self, node_id: str, epoch: int) -> None:
        """The node leaves in good order: its entries are void at once."""


class Feed(Protocol):
    """How a watcher follows the directory. None: it cannot be reached, or has nothing of the kind."""

    def states(self) -> dict[str, NodeState] | None:
        """The live nodes."""

    def read(self, cursor: str) -> Page | None:
        """The updates that followed. "" stands for the end of the stream. May leave gaps. Does not wait."""

    def dump(self, node_id: str) -> Dump | None: ...
