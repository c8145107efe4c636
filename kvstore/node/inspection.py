"""Looks over the whole node: what it counts, and whether its books balance."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace

from tandem.kvstore.interfaces import StoreIntegrityError
from tandem.kvstore.node.books import Books
from tandem.kvstore.node.fetches import Fetches
from tandem.kvstore.node.host import HostObject, Phase
from tandem.kvstore.node.index import Shelf
from tandem.kvstore.node.puts import Puts
from tandem.kvstore.node.stats import NodeStats, TierStats
from tandem.kvstore.node.views import Views
from tandem.kvstore.node.write_backs import WriteBacks


class Inspection:
    """Owns nothing; reads every part under the books' lock."""

    def __init__(self, books: Books, puts: Puts, fetches: Fetches, views: Views, write_backs: WriteBacks) -> None:
        self._books = books
        self._puts = puts
        self._fetches = fetches
        self._views = views
        self._write_backs = write_backs

    def stats(self) -> NodeStats:
        """The counters, and the state of the moment."""
        books, host, counters = self._books, self._books.host, self._books.counters
        with books.lock:
            tiers = [_tier_stats(host.shelf, host.arena.used_bytes)]
            tiers += [_tier_stats(lower.shelf, 0) for lower in books.lower.values()]
            outcome = NodeStats(
                tiers=tuple(tiers),
                peer_hits=counters.peer_hits,
                peer_hit_bytes=counters.peer_hit_bytes,
                misses=counters.misses,
                lost=counters.lost,
                quarantined=counters.quarantined,
                reaped=counters.reaped,
                failed_loads=counters.failed_loads,
                refused=dict(counters.refused),
                leases=sum(item.leases for item in host.living()),
                puts_in_flight=self._puts.num_open,
                loads_in_flight=len(self._fetches.loading()),
                fetches_open=self._fetches.num_open,
                zombies=self._puts.num_zombies,
                detached=host.num_gone,
                write_back_queued=sum(1 for _ in self._write_backs.held()),
                write_back_queued_bytes=self._write_backs.queued_bytes,
                fragmentation=host.arena.fragmentation,
            )
        return replace(outcome, tiers=tuple(self._with_used_bytes(tier) for tier in outcome.tiers))

    def check_integrity(self) -> None:
        """Raises StoreIntegrityError with everything that is wrong: books, leases, arena, tiers. At any time; costs a
        pass over everything."""
        books = self._books
        with books.lock:
            wrong = books.host.check_integrity()
            holders: Counter[HostObject] = Counter()
            for part in (self._views, self._fetches, self._puts, self._write_backs):
                holders.update(part.held())
            living = books.host.living()
            wrong += [
                f"{item.key.hex()} ({item.phase.name}) counts {item.leases} leases, {holders[item]} are held"
                for item in living
                if item.leases != holders[item]
            ]
            wrong += [f"{item.key.hex()} is held and has no memory" for item in holders.keys() - set(living)]
            if {item for item in living if item.phase is Phase.LOADING} - self._fetches.loading():
                wrong.append("an object is LOADING and nobody loads it")
        for lower in books.lower.values():
            wrong += lower.check_integrity()
        if wrong:
            raise StoreIntegrityError("; ".join(wrong))

    def _with_used_bytes(self, stats: TierStats) -> TierStats:
        """Asks the tier, without the lock: it may have one of its own."""
        lower = self._books.lower.get(stats.tier)
        return stats if lower is None else replace(stats, used_bytes=lower.used_bytes)


def _tier_stats(shelf: Shelf, used_bytes: int) -> TierStats:
    counters = shelf.counters
    soft, hard = shelf.count_pins()
    return TierStats(
        tier=shelf.name,
        objects=len(shelf),
        bytes=shelf.bytes,
        used_bytes=used_bytes,
        capacity_bytes=shelf.capacity_bytes,
        hits=counters.hits,
        hit_bytes=counters.hit_bytes,
        evictions=counters.evictions,
        evicted_bytes=counters.evicted_bytes,
        writes=counters.writes,
        written_bytes=counters.written_bytes,
        writes_dropped=counters.writes_dropped,
        faults=counters.faults,
        soft_pins=soft,
        hard_pins=hard,
        hard_pinned_bytes=shelf.hard_pinned_bytes,
    )
