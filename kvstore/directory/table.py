"""Key -> locations, in memory: the heart of the embedded directory and of every watcher. No clock and no I/O.

Whole nodes come and go at once: an entry refers to the incarnation of the node that announced it, and is void as soon
as that is. The memory of void entries is taken back in small steps, so that nobody waits for a node with a million.
"""

from __future__ import annotations

import math
import threading
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import islice

from tandem.kvstore.directory.log import UpdateLog
from tandem.kvstore.directory.messages import FORGET_S, Dump, NodeState, Reply, Update, Verdict
from tandem.kvstore.interfaces import DirectoryEvent, Location, NodeInfo, ObjectKey, StoreIntegrityError, TierName

MAX_KEYS = 4_000_000
"""About 1 GB. Keys beyond are not recorded: what the directory does not know is a miss, not an error."""
_MAX_SHARED = 256
"""Claims an incarnation keeps for reuse: without a codec all objects of a model have one size."""


@dataclass(slots=True, eq=False)
class _Incarnation:
    """One epoch of a node, from one reset to the next."""

    info: NodeInfo
    expires_at: float
    seq: int = 0
    live: bool = True
    keys: set[ObjectKey] = field(default_factory=set)
    shared: dict[tuple[TierName, int], _Claim] = field(default_factory=dict)

    def claim(self, tier: TierName, size: int) -> _Claim:
        """Its entry for objects of one tier and size, which share it."""
        found = self.shared.get((tier, size))
        if found is None:
            found = _Claim(self, Location(self.info.node_id, self.info.epoch, tier, size))
            if len(self.shared) < _MAX_SHARED:
                self.shared[tier, size] = found
        return found


@dataclass(frozen=True, slots=True, eq=False)
class _Claim:
    by: _Incarnation
    location: Location


class LocationTable:
    """Safe from any thread; `lookup` takes no lock, since the entries of a key are one immutable tuple."""

    def __init__(self, *, max_keys: int = MAX_KEYS, log: UpdateLog | None = None) -> None:
        """Updates that are taken go to `log`, too, in the same order."""
        self._max_keys = max_keys
        self._log = log
        self._lock = threading.Lock()
        self._by_key: dict[ObjectKey, tuple[_Claim, ...]] = {}
        self._nodes: dict[str, _Incarnation] = {}
        self._void: deque[_Incarnation] = deque()
        self.not_recorded = 0
        """Events ignored because the table was full."""

    def __len__(self) -> int:
        """Keys, those with only void entries included."""
        return len(self._by_key)

    def lookup(self, keys: Sequence[ObjectKey]) -> list[tuple[Location, ...]]:
        get = self._by_key.get
        return [tuple([claim.location for claim in get(key, ()) if claim.by.live]) for key in keys]

    def states(self) -> dict[str, NodeState]:
        with self._lock:
            return {name: NodeState(node.info, node.seq) for name, node in self._nodes.items() if node.live}

    def announce(self, info: NodeInfo, seq: int, expires_at: float) -> Reply:
        """Takes in that a node lives until `expires_at`; a later epoch voids what an earlier one held, and the other
        way round once the later one has been silent: a clock may have been set back."""
        with self._lock:
            node = self._nodes.get(info.node_id)
            if node is not None and node.live and node.info.epoch > info.epoch:
                return Reply(Verdict.SUPERSEDED, node.seq)
            if node is None or node.info.epoch != info.epoch:
                self._retire(info.node_id)
                node = self._nodes[info.node_id] = _Incarnation(info, expires_at)
            node.info, node.expires_at, node.live = info, expires_at, True
            return Reply(Verdict.OK if node.seq == seq else Verdict.RESYNC, node.seq)

    def apply(self, update: Update, expires_at: float) -> Reply:
        """Takes in a batch of changes. The reply asks for a resync where one is missing."""
        batch = update.batch
        with self._lock:
            node = self._nodes.get(batch.node_id)
            if node is None:
                return Reply(Verdict.RESYNC)
            if node.info.epoch != batch.epoch:
                if node.info.epoch > batch.epoch:
                    return Reply(Verdict.SUPERSEDED, node.seq)
                node.live = False  # a later process speaks for it
                return Reply(Verdict.RESYNC)
            node.expires_at, node.live = expires_at, True
            if batch.seq <= node.seq:
                return Reply(Verdict.OK, node.seq)
            if update.reset:
                self._retire(batch.node_id)
                node = self._nodes[batch.node_id] = _Incarnation(node.info, expires_at)
            elif batch.seq != node.seq + 1:
                return Reply(Verdict.RESYNC, node.seq)
            for event in batch.events:
                self._record(node, event)
            node.seq = batch.seq
            if self._log is not None:
                self._log.append(update)
            self._sweep(2 * len(batch.events))
            return Reply(Verdict.OK, node.seq)

    def withdraw(self, node_id: str, epoch: int) -> None:
        """Takes a node out, if it is of that epoch."""
        with self._lock:
            node = self._nodes.get(node_id)
            if node is not None and node.info.epoch == epoch:
                self._retire(node_id)

    def adopt(self, states: dict[str, NodeState]) -> None:
        """Follows another directory: exactly these nodes are live, in these epochs."""
        with self._lock:
            for name, node in list(self._nodes.items()):
                if name not in states or states[name].info.epoch != node.info.epoch:
                    self._retire(name)
            for name, state in states.items():
                node = self._nodes.setdefault(name, _Incarnation(state.info, math.inf))
                node.info, node.live = state.info, True

    def expire(self, now: float) -> list[str]:
        """Hides the entries of nodes that have been silent for too long; returns those newly found."""
        lost = []
        with self._lock:
            for name, node in list(self._nodes.items()):
                if node.live and node.expires_at <= now:
                    node.live = False
                    lost.append(name)
                if node.expires_at + FORGET_S <= now:
                    self._retire(name)
        return lost

    def sweep(self, limit: int) -> bool:
        """Takes back the memory of at most `limit` void entries. Returns whether some are left."""
        with self._lock:
            self._sweep(limit)
            return bool(self._void)

    def dump(self, node_id: str) -> Dump | None:
        """All that one node holds."""
        with self._lock:
            node = self._nodes.get(node_id)
            if node is None or not node.live:
                return None
            seq, keys = node.seq, list(node.keys)
        # Later changes may show up here. They are in later updates, too, and those only repeat them.
        return Dump(node.info.epoch, seq, list(self._claimed(node, keys)))

    def _claimed(self, node: _Incarnation, keys: Sequence[ObjectKey]) -> Iterator[DirectoryEvent]:
        for key in keys:
            for claim in self._by_key.get(key, ()):
                if claim.by is node:
                    yield DirectoryEvent(key, claim.location.tier, claim.location.size)

    def _record(self, node: _Incarnation, event: DirectoryEvent) -> None:
        key = event.key
        before = self._by_key.get(key, ())
        others = tuple([it for it in before if it.by is not node or it.location.tier is not event.tier])
        if event.size > 0:
            if not before and len(self._by_key) >= self._max_keys:
                self.not_recorded += 1
                return
            self._by_key[key] = (*others, node.claim(event.tier, event.size))
            node.keys.add(key)
        elif len(others) != len(before):
            self._replace(key, others)
            if not any(it.by is node for it in others):
                node.keys.discard(key)

    def _replace(self, key: ObjectKey, claims: tuple[_Claim, ...]) -> None:
        if claims:
            self._by_key[key] = claims
        else:
            self._by_key.pop(key, None)

    def _retire(self, node_id: str) -> None:
        node = self._nodes.pop(node_id, None)
        if node is not None:
            node.live = False
            if node.keys:
                self._void.append(node)

    def _sweep(self, limit: int) -> None:
        while self._void and limit > 0:
            node = self._void[0]
            for _ in range(min(limit, len(node.keys))):
                key = node.keys.pop()
                self._replace(key, tuple([claim for claim in self._by_key.get(key, ()) if claim.by is not node]))
                limit -= 1
            if not node.keys:
                self._void.popleft()

    def check_integrity(self) -> None:
        """Raises StoreIntegrityError with everything that is wrong. Cost: the size of the table."""
        wrong: list[str] = []
        with self._lock:
            known = [*self._nodes.values(), *self._void]
            held: dict[int, set[ObjectKey]] = {id(node): set() for node in known}
            for key, claims in self._by_key.items():
                if not claims:
                    wrong.append(f"{key.hex()} has an empty entry")
                if len({(id(it.by), it.location.tier) for it in claims}) != len(claims):
                    wrong.append(f"{key.hex()} is twice in one tier of a node")
                for claim in claims:
                    if id(claim.by) in held:
                        held[id(claim.by)].add(key)
                    else:
                        wrong.append(f"{key.hex()} is claimed by a forgotten incarnation of {claim.location.node_id}")
            for node in known:
                if odd := node.keys ^ held[id(node)]:
                    sample = ", ".join(key.hex() for key in islice(odd, 3))
                    wrong.append(f"{node.info.node_id} and the index disagree on {len(odd)} keys: {sample}")
            if any(node.live for node in self._void):
                wrong.append("a void incarnation is live")
        if wrong:
            raise StoreIntegrityError("; ".join(wrong))
