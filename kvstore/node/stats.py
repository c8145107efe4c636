"""What a node counts. Counters grow from 0 at the start of the process; the rest is the state of the moment."""

from __future__ import annotations

from dataclasses import dataclass, field

from tandem.kvstore.interfaces import TierName


@dataclass(slots=True)
class TierCounters:
    """Changed under the node's lock."""

    hits: int = 0
    hit_bytes: int = 0
    evictions: int = 0
    evicted_bytes: int = 0
    writes: int = 0
    written_bytes: int = 0
    writes_dropped: int = 0
    faults: int = 0


@dataclass(slots=True)
class NodeCounters:
    """Changed under the node's lock."""

    misses: int = 0
    lost: int = 0
    quarantined: int = 0
    reaped: int = 0
    failed_loads: int = 0
    peer_hits: int = 0
    peer_hit_bytes: int = 0
    refused: dict[str, int] = field(default_factory=dict)

    def refuse(self, reason: str) -> None:
        """Counts a put that does not begin."""
        self.refused[reason] = self.refused.get(reason, 0) + 1


@dataclass(frozen=True, slots=True, kw_only=True)
class TierStats:
    """Counters and state of one tier of a node."""

    tier: TierName
    objects: int
    bytes: int
    """Bytes of the objects; the tier's own overhead is in `used_bytes`."""
    used_bytes: int
    capacity_bytes: int
    hits: int
    """Objects that fetches found here."""
    hit_bytes: int
    evictions: int
    evicted_bytes: int
    writes: int
    written_bytes: int
    writes_dropped: int
    """Write-backs that were not done: the queue was full, there was no room, or a fault."""
    faults: int
    """Reads and writes that the tier refused or failed."""
    soft_pins: int
    hard_pins: int
    hard_pinned_bytes: int


@dataclass(frozen=True, slots=True, kw_only=True)
class NodeStats:
    """Counters and state of a whole node."""

    tiers: tuple[TierStats, ...]
    """Host first, then the lower tiers this node has."""
    peer_hits: int
    """Objects that fetches read from other nodes."""
    peer_hit_bytes: int
    misses: int
    """Keys that `locate` was asked for and could not place."""
    lost: int
    """Objects that left host memory and are in no lower tier, though there is one."""
    quarantined: int
    reaped: int
    """Puts and fetches whose lease lapsed."""
    failed_loads: int
    refused: dict[str, int]
    """Puts that did not begin, by `Refusal`."""
    leases: int
    """Leases of host memory: by fetches, puts, loads, write-backs, views."""
    puts_in_flight: int
    loads_in_flight: int
    fetches_open: int
    zombies: int
    """Puts that lapsed and whose memory waits for the writer to be gone."""
    detached: int
    """Objects that nobody can find any more, in memory until their last reader is done."""
    write_back_queued: int
    write_back_queued_bytes: int
    fragmentation: float
    """Share of the arena's free bytes that lie outside of the largest free run."""

    def tier(self, name: TierName) -> TierStats | None:
        return next((tier for tier in self.tiers if tier.tier is name), None)


@dataclass(frozen=True, slots=True, kw_only=True)
class ScrubReport:
    """One pass over some objects of host memory and disk."""

    checked: int
    checked_bytes: int
    bad: tuple[bytes, ...]
    """Keys that failed and were quarantined."""
    unread: int
    """Could not be read; counted as faults of the tier, and dropped."""
