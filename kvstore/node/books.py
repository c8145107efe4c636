"""The node's books, and the one lock that guards all of them.

No tier, peer or directory is called while the lock is held. Every public method of a part of the node that changes
something ends with `announcer.publish()`, outside of the lock.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Sequence

from tandem.kvstore.eviction import make_policy
from tandem.kvstore.interfaces import Directory, ObjectKey, Tier, TierName
from tandem.kvstore.node.announce import Announcer
from tandem.kvstore.node.finding import Avoided, HotKeys
from tandem.kvstore.node.host import HostObject, HostTier
from tandem.kvstore.node.index import PolicyFactory, Shelf
from tandem.kvstore.node.lower import LowerTier
from tandem.kvstore.node.settings import NodeSettings
from tandem.kvstore.node.stats import NodeCounters, TierCounters

logger = logging.getLogger(__name__)

LOWER_TIERS = (TierName.DISK, TierName.REMOTE)
"""What a node can have below host memory, in the order of write-back."""
AVOID_S = 2.0
"""An object or a node that could not be read from a peer is not tried again for so long: the directory may be late."""
AVOID_DAMAGED_S = 300.0


class Books:
    """What each part of the node has to know of the others: the objects of every tier, counters, places to avoid.

    `lock` guards everything here but `announcer`, which has a rule of its own, and the work of tiers.
    """

    def __init__(
        self,
        settings: NodeSettings,
        tiers: Sequence[Tier],
        directory: Directory | None,
        clock: Callable[[], float],
    ) -> None:
        """Raises ConfigError for a policy that does not exist or memory that is not granted, ValueError for two tiers
        of one name or a tier that is not below host memory."""
        names = [tier.name for tier in tiers]
        if len(set(names)) != len(names) or not set(names) <= set(LOWER_TIERS):
            raise ValueError(f"tiers {names}: at most one each of {', '.join(LOWER_TIERS)}")
        self.lock = threading.Lock()
        self.clock = clock
        self.closed = False
        """No new puts, fetches or reads; set once."""
        self.announcer = Announcer(directory, settings.node_id, self.lock)
        self.counters = NodeCounters()
        self.avoided = Avoided()
        self.hot = HotKeys()
        make: PolicyFactory = lambda capacity_bytes: make_policy(settings.eviction, capacity_bytes)  # noqa: E731
        self.host = HostTier(settings.host_bytes, settings.quotas, make, self._evicted)
        codecs = {TierName.DISK: settings.disk_codec, TierName.REMOTE: settings.remote_codec}
        self.lower = {
            tier.name: LowerTier(
                tier,
                codec=codecs[tier.name],
                shares=settings.quotas,
                policy_factory=make,
                lock=self.lock,
                on_change=self.announcer.note,
            )
            for tier in sorted(tiers, key=lambda tier: LOWER_TIERS.index(tier.name))
        }
        """Lower tiers by name, nearest first; the same as long as the node lives."""

    # Without the lock

    def drop(self, key: ObjectKey, lower_tiers: Sequence[TierName], *, moved: bool = False) -> None:
        """Takes an object out of host memory and these tiers. `moved`: a write-back that is under way is not undone."""
        with self.lock:
            item = self.host.get(key)
            if item is not None:
                item.moved = moved
                self.host.detach(item)
                self.announcer.note(key, TierName.HOST, 0)
        for name in lower_tiers:
            self.lower[name].drop(key)
        self.announcer.publish()

    def quarantine(self, key: ObjectKey, reason: str) -> None:
        """Drops an object with wrong content from every tier, counts it, and leaves the node it came from alone."""
        with self.lock:
            if self.closed:
                return
            item = self.host.get(key)
            if item is not None:
                self.host.detach(item)
                self.announcer.note(key, TierName.HOST, 0)
                if item.origin not in self.lower:
                    self.avoided.add(item.origin, key, self.clock() + AVOID_DAMAGED_S)
            self.counters.quarantined += 1
        for lower in self.lower.values():
            lower.drop(key)
        logger.warning("object %s is quarantined: %s", key.hex()[:16], reason)
        self.announcer.publish()

    # Under the lock

    def shelves(self) -> list[Shelf]:
        """One per tier, host memory first."""
        return [self.host.shelf, *(lower.shelf for lower in self.lower.values())]

    def highest(self, key: ObjectKey) -> Shelf | None:
        """The shelf of the first tier that has the object."""
        if self.host.get(key) is not None:
            return self.host.shelf
        return next((lower.shelf for lower in self.lower.values() if lower.peek(key) is not None), None)

    def count_hit(self, counters: TierCounters, item: HostObject) -> None:
        counters.hits += 1
        counters.hit_bytes += item.info.size

    def _evicted(self, item: HostObject) -> None:
        self.announcer.note(item.key, TierName.HOST, 0)
        if item.dirty and self.lower:
            self.counters.lost += 1
