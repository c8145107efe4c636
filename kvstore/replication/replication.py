"""More copies of hot objects, and new ones when a node is lost: one pure decision, and a thread that carries it out.

Each node looks after what it holds itself; nobody is in charge. Of the holders of an object the first on the ring
copies it, and if that one does not (it may find the object not hot, or be gone), a round later the second does, and so
on.
"""

from __future__ import annotations

import logging
import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence, Set
from contextlib import AbstractContextManager
from dataclasses import dataclass
from itertools import islice
from typing import Protocol

from tandem.kvstore.interfaces import Directory, NodeInfo, ObjectInfo, ObjectKey, PeerReader
from tandem.kvstore.replication.ring import Ring

log = logging.getLogger(__name__)

HOT_HITS = 8
"""Reads that make an object worth a second copy."""
ROUND_S = 1.0
SETTLE_S = 5.0
"""Nodes must have been the same for so long before anything is copied: they may just be starting, or the directory."""
KEYS_PER_ROUND = 512
MAX_REMEMBERED = 65_536
"""Objects known to lie on other nodes, too; and objects at rest."""
BYTES_PER_S = 64 << 20
"""What a node copies at most, over time."""
REST_S = 60.0
"""An object is not copied twice within this time: a target that throws it out again has better use for its memory."""


class ReplicaSource(Protocol):
    """What is needed of the node whose objects are copied."""

    def hot(self, threshold: int) -> Sequence[tuple[ObjectKey, int]]:
        """Keys read at least `threshold` times lately, and how often; most first."""

    def objects(self) -> Iterable[tuple[ObjectKey, ObjectInfo]]: ...

    def info(self, key: ObjectKey) -> ObjectInfo | None: ...

    def view(self, key: ObjectKey, *, counts: bool) -> AbstractContextManager[memoryview | None]: ...

    def read_range(self, key: ObjectKey, offset: int, out: memoryview) -> bool: ...


@dataclass(frozen=True, slots=True)
class Copy:
    key: ObjectKey
    target: str
    """Node id."""


@dataclass(frozen=True, slots=True)
class Plan:
    copies: tuple[Copy, ...]
    waiting: dict[ObjectKey, int]
    """Objects left to a holder before this one on the ring, and for how many rounds by now."""


def plan_copies(
    holders: Mapping[ObjectKey, Set[str]],
    nodes: Mapping[str, NodeInfo],
    self_id: str,
    replicas: int,
    waited: Mapping[ObjectKey, int],
) -> Plan:
    """What node `self_id` should copy now. Pure.

    `holders`: node ids per object. One that does not name `self_id` is skipped: the directory does not know it yet.
    Targets are the first nodes on the ring that have no copy, those on hosts without one before the others.
    """
    copies: list[Copy] = []
    waiting: dict[ObjectKey, int] = {}
    ring = Ring(nodes)
    for key, listed in holders.items():
        order = ring.owners(key, len(nodes))
        having = [node for node in order if node in listed]
        if self_id not in having or len(having) >= replicas:
            continue
        rounds = waited.get(key, 0)
        if rounds < having.index(self_id):
            waiting[key] = rounds + 1
            continue
        hosts = {nodes[node].host_id for node in having}
        free = [node for node in order if node not in listed]
        for _ in range(min(replicas - len(having), len(free))):
            target = next((node for node in free if nodes[node].host_id not in hosts), free[0])
            free.remove(target)
            hosts.add(nodes[target].host_id)
            copies.append(Copy(key, target))
    return Plan(tuple(copies), waiting)


class Replicator:
    """`start` runs it in a thread; a test may call `round` by itself instead."""

    def __init__(
        self,
        node: ReplicaSource,
        directory: Directory,
        peers: PeerReader,
        replicas: int,
        *,
        node_id: str,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """`replicas`: copies of a hot object, this node's included."""
        self._node = node
        self._directory = directory
        self._peers = peers
        self._replicas = replicas
        self._node_id = node_id
        self._clock = clock
        self.copied = 0
        self.copied_bytes = 0
        self.refused = 0
        """Copies that the target did not take."""
        self._members: dict[str, int] = {}
        self._changed_at = self._round_at = clock()
        self._settled: dict[str, int] = {}
        self._elsewhere: OrderedDict[ObjectKey, frozenset[str]] = OrderedDict()
        self._repairs: OrderedDict[ObjectKey, None] = OrderedDict()
        self._waited: dict[ObjectKey, int] = {}
        self._resting: OrderedDict[ObjectKey, float] = OrderedDict()
        self._scan: Iterator[tuple[ObjectKey, ObjectInfo]] = iter(())
        self._allowed_bytes = 0.0
        self._closing = threading.Event()
        self._thread = threading.Thread(target=self._run, name="kv-replicate", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def close(self) -> None:
        """Waits for the copy under way, seconds at most."""
        self._closing.set()
        if self._thread.ident is not None:
            self._thread.join()

    def _run(self) -> None:
        while not self._closing.wait(ROUND_S):
            try:
                self.round()
            except Exception:
                log.exception("a round of replication failed; the next one tries again")

    def round(self) -> None:
        """Copies what one round may copy. Its thread calls it once in `ROUND_S`."""
        now = self._clock()
        self._allowed_bytes = min(self._allowed_bytes + (now - self._round_at) * BYTES_PER_S, BYTES_PER_S)
        self._round_at = now
        nodes = self._directory.nodes()
        members = {name: node.epoch for name, node in nodes.items()}
        if members != self._members:
            self._members, self._changed_at = members, now
        if now - self._changed_at < SETTLE_S or self._node_id not in members:
            return
        self._note_losses(members)
        repairs = self._next_repairs()
        due = [*repairs, *(key for key, _ in self._node.hot(HOT_HITS)[:KEYS_PER_ROUND])]
        keys = list(dict.fromkeys([*due, *self._next_scanned()]))
        found = self._directory.lookup(keys)
        holders = {key: {it.node_id for it in places} for key, places in zip(keys, found, strict=True)}
        for key in keys:
            self._remember(key, frozenset(holders[key] - {self._node_id}))
        wanted = {key: holders[key] for key in due if not self._is_resting(key, now)}
        plan = plan_copies(wanted, nodes, self._node_id, self._replicas, self._waited)
        self._waited = plan.waiting
        left = self._carry_out(plan.copies, now)
        for key in repairs:
            if key in left or key in plan.waiting:
                self._repairs[key] = None

    # Inside

    def _note_losses(self, members: dict[str, int]) -> None:
        lost = {name for name, epoch in self._settled.items() if members.get(name) != epoch}
        self._settled = members
        if lost:
            hit = [key for key, others in self._elsewhere.items() if others & lost]
            log.info("lost %s: %d objects here had a copy there", ", ".join(sorted(lost)), len(hit))
            self._repairs.update(dict.fromkeys(hit[: MAX_REMEMBERED - len(self._repairs)]))

    def _next_repairs(self) -> list[ObjectKey]:
        keys = list(islice(self._repairs, KEYS_PER_ROUND))
        for key in keys:
            del self._repairs[key]
        return keys

    def _next_scanned(self) -> list[ObjectKey]:
        """The next few of all objects here, round and round: a loss is answered from what is remembered of them."""
        keys = [key for key, _ in islice(self._scan, KEYS_PER_ROUND)]
        if len(keys) < KEYS_PER_ROUND:
            self._scan = iter(self._node.objects())
        return keys

    def _remember(self, key: ObjectKey, others: frozenset[str]) -> None:
        self._elsewhere.pop(key, None)
        if others:
            self._elsewhere[key] = others
            if len(self._elsewhere) > MAX_REMEMBERED:
                self._elsewhere.popitem(last=False)

    def _is_resting(self, key: ObjectKey, now: float) -> bool:
        return self._resting.get(key, now) > now

    def _carry_out(self, copies: Sequence[Copy], now: float) -> set[ObjectKey]:
        """Copies as much as the rate allows; returns the keys that were not even tried."""
        left: set[ObjectKey] = set()
        for copy in copies:
            if self._closing.is_set() or self._allowed_bytes <= 0:
                left.add(copy.key)
                continue
            self._resting[copy.key] = now + REST_S
            self._resting.move_to_end(copy.key)
            size = self._push(copy)
            self._allowed_bytes -= size or 0
            if size is None:
                self.refused += 1
            else:
                self.copied += 1
                self.copied_bytes += size
        while self._resting and (len(self._resting) > MAX_REMEMBERED or next(iter(self._resting.values())) <= now):
            self._resting.popitem(last=False)
        return left

    def _push(self, copy: Copy) -> int | None:
        """Bytes sent; None if the object is gone or the target refuses."""
        info = self._node.info(copy.key)
        if info is None:
            return None
        with self._node.view(copy.key, counts=False) as content:
            if content is not None:
                return self._send(copy, info, content)
        buffer = memoryview(bytearray(info.size))
        return self._send(copy, info, buffer) if self._node.read_range(copy.key, 0, buffer) else None

    def _send(self, copy: Copy, info: ObjectInfo, content: memoryview) -> int | None:
        return len(content) if self._peers.push(copy.target, copy.key, info, content) else None
