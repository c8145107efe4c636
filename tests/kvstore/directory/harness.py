"""A node that only announces, and connections that lose, double, delay and reorder."""

from __future__ import annotations

import random
from collections.abc import Iterable

from tandem.kvstore.directory import EmbeddedDirectory
from tandem.kvstore.directory.messages import UNREACHABLE, Dump, NodeState, Page, Reply, Update, Uplink
from tandem.kvstore.interfaces import Directory, DirectoryEvent, Location, NodeInfo, ObjectKey, TierName

HOST, DISK = TierName.HOST, TierName.DISK


def key(number: int) -> ObjectKey:
    return ObjectKey(number.to_bytes(32, "big"))


def info(name: str, epoch: int = 1, host_id: str = "") -> NodeInfo:
    return NodeInfo(node_id=name, epoch=epoch, host_id=host_id or f"host of {name}")


class Holder:
    """Holds what it is told to hold, and says so to a directory."""

    def __init__(self, name: str, epoch: int = 1) -> None:
        self.info = info(name, epoch)
        self.held: dict[tuple[ObjectKey, TierName], int] = {}
        self.snapshots = 0

    def snapshot(self) -> list[DirectoryEvent]:
        self.snapshots += 1
        held = list(self.held.items())  # in one step: the holder's own thread goes on
        return [DirectoryEvent(name, tier, size) for (name, tier), size in held]

    def take(self, number: int, tier: TierName = HOST, size: int = 100) -> DirectoryEvent:
        """Size 0: lets go."""
        if size:
            self.held[key(number), tier] = size
        else:
            self.held.pop((key(number), tier), None)
        return DirectoryEvent(key(number), tier, size)

    def join(self, directory: Directory) -> None:
        directory.register(self.info, self.snapshot)

    def says(self, directory: Directory, *events: DirectoryEvent) -> None:
        directory.publish(self.info.node_id, events)


def truth(holders: Iterable[Holder], number: int) -> set[Location]:
    return {
        Location(it.info.node_id, it.info.epoch, tier, size)
        for it in holders
        for (name, tier), size in it.held.items()
        if name == key(number)
    }


class FaultyUplink:
    """To the directory `self.to` (which may be replaced), with faults of probability `self.faults`."""

    def __init__(self, to: Uplink, rng: random.Random) -> None:
        self.to = to
        self.faults = 0.0
        self.late: list[Update] = []
        self._rng = rng

    def announce(self, node: NodeInfo, seq: int) -> Reply:
        if self._rng.random() < self.faults:
            return UNREACHABLE
        return self.to.announce(node, seq)

    def apply(self, update: Update) -> Reply:
        if self._rng.random() >= self.faults:
            return self.to.apply(update)
        kind = self._rng.choice(("lost", "late", "unanswered", "doubled"))
        if kind == "late":
            self.late.append(update)
        elif kind == "unanswered":
            self.to.apply(update)
        elif kind == "doubled":
            self.to.apply(update)
            return self.to.apply(update)
        return UNREACHABLE

    def withdraw(self, node_id: str, epoch: int) -> None:
        self.to.withdraw(node_id, epoch)

    def deliver_late(self) -> None:
        """What was under way for long arrives now, in any order."""
        self._rng.shuffle(self.late)
        for update in self.late:
            self.to.apply(update)
        self.late.clear()


class FaultyFeed:
    """From the directory `self.source`, with faults of probability `self.faults`."""

    def __init__(self, source: EmbeddedDirectory, rng: random.Random) -> None:
        self.source = source
        self.faults = 0.0
        self._rng = rng
        self._last_states: dict[str, NodeState] = {}

    def _fault(self) -> bool:
        return self._rng.random() < self.faults

    def states(self) -> dict[str, NodeState] | None:
        if self._fault():
            return self._rng.choice((None, self._last_states))
        self._last_states = self.source.states()
        return self._last_states

    def read(self, cursor: str) -> Page | None:
        page = self.source.read(cursor)
        if not self._fault():
            return page
        updates = list(page.updates)
        match self._rng.choice(("away", "lost", "doubled", "reordered")):
            case "away":
                return None
            case "lost":
                updates = [update for update in updates if self._rng.random() < 0.5]
            case "doubled":
                updates += updates
            case "reordered":
                self._rng.shuffle(updates)
        return Page(tuple(updates), page.cursor)

    def dump(self, node_id: str) -> Dump | None:
        return None if self._fault() else self.source.dump(node_id)
