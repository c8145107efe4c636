"""A node of the store: `interfaces.HomeNode` over host memory, lower tiers and other nodes.

    begin_put ── commit ──> host ──write-back──> disk ──write-back──> remote
    fetch <── host <──loaders── disk, peers, remote

`core.py` has the paths of bytes (puts, fetches, reads for peers); here are look-ups, the node's life, its janitor, and
what operators do.
"""

from __future__ import annotations

import itertools
import threading
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from tandem.kvstore.interfaces import (
    Directory,
    DirectoryEvent,
    Located,
    NodeInfo,
    ObjectInfo,
    ObjectKey,
    PeerReader,
    StoreIntegrityError,
    Tier,
    TierName,
)
from tandem.kvstore.node import content
from tandem.kvstore.node.core import LOWER_TIERS, NodeCore, OnLoad
from tandem.kvstore.node.fetching import NodeFetch
from tandem.kvstore.node.finding import choose_peer
from tandem.kvstore.node.host import HostObject, Phase
from tandem.kvstore.node.index import Pin, PolicyFactory, Shelf
from tandem.kvstore.node.settings import ZOMBIE_GRACE_S, NodeSettings
from tandem.kvstore.node.stats import NodeStats, ScrubReport, TierStats
from tandem.kvstore.node.tickets import Ticket, TicketState

_JANITOR_S = 0.5
_HOT_HALF_LIFE_S = 60.0
_EXPIRED_PER_ROUND = 256
_REMOTE_LOOKUP_S = 0.05
"""Longest that `locate` asks a remote tier; what it learns is remembered, so that the next look-up gets further."""
_FLUSH_S = 5.0
_MOVE_S = 30.0
_ALL_LAYERS = 1 << 30


@dataclass(frozen=True, slots=True)
class StoredObject:
    key: ObjectKey
    info: ObjectInfo
    """Of the copy in the first of `tiers`; codecs may make the others smaller."""
    tiers: tuple[TierName, ...]


class KvNode(NodeCore):
    """Threads start with `start`; before that puts and reads of host memory work, loads and write-backs wait."""

    def __init__(
        self,
        settings: NodeSettings,
        *,
        tiers: Sequence[Tier] = (),
        directory: Directory | None = None,
        peers: PeerReader | None = None,
        clock: Callable[[], float] = time.monotonic,
        policy_factory: PolicyFactory | None = None,
        on_load: OnLoad | None = None,
    ) -> None:
        """As `NodeCore`."""
        super().__init__(
            settings,
            tiers=tiers,
            directory=directory,
            peers=peers,
            clock=clock,
            policy_factory=policy_factory,
            on_load=on_load,
        )
        self._info = NodeInfo(
            node_id=settings.node_id,
            epoch=settings.epoch,
            host_id=settings.host_id,
            capacity_bytes=self._host.arena.capacity_bytes,
        )
        self._scrubbed: tuple[bytes, str] = (b"", "")
        self._stopping = threading.Event()
        self._janitor = threading.Thread(target=self._clean, name="kv-janitor", daemon=True)

    # Life

    def start(self, *, unix_path: str = "", host: str = "", port: int = 0, grpc_address: str = "") -> None:
        """Takes up what the disk holds, and announces it with where other nodes reach this one. Call it once, when the
        servers listen."""
        disk = self._lower.get(TierName.DISK)
        if disk is not None:
            disk.load_index(stop=lambda: self._closed)
            disk.trim()
        self._info = replace(self._info, unix_path=unix_path, host=host, port=port, grpc_address=grpc_address)
        self._announcer.register(self._info, self.snapshot)
        self._loader.start()
        for queue in self._write_backs:
            queue.start()
        self._janitor.start()

    def snapshot(self) -> list[DirectoryEvent]:
        """Everything that other nodes can read here: for the directory, which calls it from a thread of its own."""
        with self._lock:
            shelves = [lower.shelf for name, lower in self._lower.items() if name is TierName.DISK]
            return [
                DirectoryEvent(resident.key, shelf.name, resident.info.size)
                for shelf in (self._host.shelf, *shelves)
                for resident in shelf
            ]

    def flush(self, timeout_s: float) -> bool:
        """Waits until everything committed is in the lower tiers, or was dropped. False: time is up."""
        deadline = time.monotonic() + timeout_s
        return all(queue.flush(deadline) for queue in self._write_backs)

    def close(self, flush_s: float = _FLUSH_S) -> None:
        """No new puts or fetches; waits at most `flush_s` for the write-back, then ends all leases and closes the
        tiers. Fetches that are open fail. Idempotent."""
        with self._lock:
            if self._closed:
                return
            self._closed = True
        if self._janitor.is_alive():
            self.flush(flush_s)
            self._stopping.set()
            self._janitor.join()
        self._loader.close()
        for queue in self._write_backs:
            left = queue.close()
            with self._lock:
                for item in left:
                    self._host.release(item)
                queue.lower.shelf.counters.writes_dropped += len(left)
        for fetch in list(self._fetches):
            self.end_fetch(fetch)
        for lower in self._lower.values():
            lower.tier.close()
        self._host.arena.close()

    # Look-ups

    def locate_here(self, keys: Sequence[ObjectKey]) -> list[Located] | None:
        """What `locate` says, if this node has all of them; None: others have to be asked. Never waits."""
        with self._lock:
            now = self._clock()
            places = [] if self._closed else [self._locate_here(key, now) for key in keys]
        found = [place for place in places if place is not None]
        return found if len(found) == len(places) else None

    def locate(self, keys: Sequence[ObjectKey]) -> list[Located]:
        places: list[Located | None]
        with self._lock:
            if self._closed:
                return []
            now = self._clock()
            places = [self._locate_here(key, now) for key in keys]
        missing = [index for index, place in enumerate(places) if place is None]
        if missing and self._directory is not None and self._peers is not None:
            answers = self._directory.lookup([keys[index] for index in missing])
            nodes = self._directory.nodes() if any(answers) else {}
            with self._lock:
                for index, locations in zip(missing, answers, strict=True):
                    places[index] = choose_peer(keys[index], locations, nodes, self._info, self._avoided, now)
        missing = [index for index, place in enumerate(places) if place is None]
        remote = self._lower.get(TierName.REMOTE)
        if missing and remote is not None:
            infos = remote.infos([keys[index] for index in missing], _REMOTE_LOOKUP_S)
            for index, info in zip(missing, infos, strict=True):
                if info is not None:
                    places[index] = Located(keys[index], TierName.REMOTE, TierName.REMOTE.value, info.size)
        run = [place for place in itertools.takewhile(lambda place: place is not None, places) if place is not None]
        if len(run) < len(keys):
            with self._lock:
                self._counters.misses += len(keys) - len(run)
        return run

    def _locate_here(self, key: ObjectKey, now: float) -> Located | None:
        item = self._host.get(key, now)
        if item is not None:
            return item.place
        loading = self._host.pending(key)
        if loading is not None and loading.phase is Phase.LOADING:
            return self._loads[loading].source
        for name, lower in self._lower.items():
            resident = lower.peek(key)
            if resident is not None and name is TierName.DISK:
                return Located(key, name, name.value, resident.info.size)
        return None

    def contains(self, key: ObjectKey) -> list[TierName]:
        """The tiers of this node that have it."""
        with self._lock:
            here = [TierName.HOST] if self._host.get(key, self._clock()) is not None else []
            return here + [name for name, lower in self._lower.items() if lower.peek(key) is not None]

    def info(self, key: ObjectKey) -> ObjectInfo | None:
        """Of the copy in the first tier that has it."""
        with self._lock:
            item = self._host.get(key, self._clock())
            if item is not None:
                return item.info
            found = (lower.peek(key) for lower in self._lower.values())
            return next((resident.info for resident in found if resident is not None), None)

    def objects(self) -> list[StoredObject]:
        """Everything this node knows of, in no order."""
        infos: dict[ObjectKey, ObjectInfo] = {}
        tiers: dict[ObjectKey, list[TierName]] = {}
        with self._lock:
            for shelf in self._shelves():
                for resident in shelf:
                    infos.setdefault(resident.key, resident.info)
                    tiers.setdefault(resident.key, []).append(shelf.name)
        return [StoredObject(key, info, tuple(tiers[key])) for key, info in infos.items()]

    def hot(self, threshold: int) -> dict[ObjectKey, int]:
        """Objects that were fetched or read at least so often of late (counts are halved every minute), and how often;
        most first. They need not be here any more."""
        with self._lock:
            return self._hot.above(threshold)

    # Pins

    def pin(self, key: ObjectKey, owner: str, ttl_s: float | None, hard: bool) -> bool:
        """Keeps the object in the highest tier of this node that has it: softly pinned objects leave last, hard pinned
        ones never, until `unpin`, `ttl_s`, `clear`, quarantine, or the object's own ttl. One pin for each owner, which
        a second call replaces. False: it is not here, or hard pins would take more than half of the tier."""
        with self._lock:
            now = self._clock()
            shelf = self._highest(key)
            resident = shelf.get(key) if shelf is not None else None
            if self._closed or shelf is None or resident is None:
                return False
            return shelf.pin(resident, owner, Pin(hard, None if ttl_s is None else now + ttl_s))

    def unpin(self, key: ObjectKey, owner: str) -> bool:
        """In whichever tier it is. False: `owner` has no pin on it."""
        with self._lock:
            found = [(shelf, shelf.get(key)) for shelf in self._shelves()]
            return sum(shelf.unpin(resident, owner) for shelf, resident in found if resident is not None) > 0

    # What operators do

    def clear(self, owner: str | None = None, model: str | None = None) -> int:
        """Drops all objects of an owner, of a model, of both at once, or all; pins do not save them, and readers finish
        reading. How many. Puts that are not committed stay."""
        chosen = [
            stored.key
            for stored in self.objects()
            if owner in (None, stored.info.owner) and model in (None, stored.info.model)
        ]
        for key in chosen:
            self._drop(key, list(self._lower))
        return len(chosen)

    def move(self, key: ObjectKey, tier: TierName) -> bool:
        """HOST: brings it up, and lower tiers keep it. DISK, REMOTE: writes it there now, and it leaves the tiers
        above. False: not here, no such tier, no room, a fault, or pinned in a tier that it would leave; then nothing
        leaves."""
        if tier is TierName.HOST:
            with self.fetch(self.locate([key])) as fetch:
                return len(fetch.sources) == 1 and _arrives(fetch)
        lower = self._lower.get(tier)
        if lower is None:
            return False
        above = [name for name in self._lower if LOWER_TIERS.index(name) < LOWER_TIERS.index(tier)]
        with self._lock:
            leaving = [self._host.shelf, *(self._lower[name].shelf for name in above)]
            if any(shelf.pins(key) for shelf in leaving):
                return False
            is_there = lower.peek(key) is not None
        if not is_there:
            with self.fetch(self.locate([key])) as fetch:
                if len(fetch.sources) != 1 or not _arrives(fetch) or not self._write_down(fetch.items[0], lower):
                    return False
        self._drop(key, above, moved=True)
        return True

    def _drop(self, key: ObjectKey, lower_tiers: Sequence[TierName], *, moved: bool = False) -> None:
        """From host memory and from these tiers. `moved`: a write-back that is under way is not undone."""
        with self._lock:
            item = self._host.stale(key)
            if item is not None:
                item.moved = moved
                self._host.detach(item)
                self._announcer.note(key, TierName.HOST, 0)
        for name in lower_tiers:
            self._lower[name].drop(key)
        self._announcer.publish()

    def scrub(self, limit: int) -> ScrubReport:
        """Reads at most `limit` objects of host memory and disk, from where the last call stopped and around, and
        checks all checksums; what is wrong is quarantined."""
        with self._lock:
            shelves = [shelf for shelf in self._shelves() if shelf.name is not TierName.REMOTE]
            todo = sorted((resident.key, shelf.name) for shelf in shelves for resident in shelf)
        later = [place for place in todo if place > self._scrubbed]
        chosen = (later + todo[: len(todo) - len(later)])[:limit]
        bad: list[bytes] = []
        unread = checked_bytes = 0
        for key, tier in chosen:
            outcome = self._check_host(key) if tier is TierName.HOST else self._check_disk(key)
            if outcome is None:
                unread += 1
            elif outcome < 0:
                bad.append(key)
                self.quarantine(key, f"scrub of {tier}: a checksum is wrong")
            else:
                checked_bytes += outcome
            self._scrubbed = (key, tier)
        return ScrubReport(checked=len(chosen) - unread, checked_bytes=checked_bytes, bad=tuple(bad), unread=unread)

    def _check_host(self, key: ObjectKey) -> int | None:
        """Bytes that are sound; -1: wrong; None: it left."""
        with self.view(key, counts=False) as whole:
            if whole is None:
                return None
            return len(whole) if content.is_sound(whole) else -1

    def _check_disk(self, key: ObjectKey) -> int | None:
        disk = self._lower[TierName.DISK]
        info = disk.info(key)
        if info is None:
            return None
        whole = memoryview(bytearray(info.size))
        if not disk.read(key, 0, whole):
            disk.drop(key)
            self._announcer.publish()
            return None
        return len(whole) if content.is_sound(whole) else -1

    # Janitor

    def _clean(self) -> None:
        decayed_at = time.monotonic()
        while not self._stopping.wait(_JANITOR_S):
            while self._host.arena.pages.warm() and not self._stopping.is_set():
                pass
            self.reap()
            if time.monotonic() - decayed_at > _HOT_HALF_LIFE_S:
                decayed_at = time.monotonic()
                with self._lock:
                    self._hot.decay()

    def reap(self) -> None:
        """What time has ended: leases, pins, objects. The janitor calls it twice a second."""
        stale: list[tuple[TierName, ObjectKey]] = []
        with self._lock:
            if self._closed:
                return
            now = self._clock()
            for ticket in [ticket for ticket in self._tickets if ticket.deadline <= now]:
                self._reap_ticket(ticket, now)
            lapsed = [
                (fetch, now - fetch.touched_at)
                for fetch in self._fetches
                if fetch.lease_s is not None and now - fetch.touched_at > fetch.lease_s
            ]
            for shelf in self._shelves():
                shelf.end_pins(now)
                for resident in shelf.expired(now, _EXPIRED_PER_ROUND):
                    self._counters.expired += 1
                    if isinstance(resident, HostObject):
                        self._host.detach(resident)
                        self._announcer.note(resident.key, TierName.HOST, 0)
                    else:
                        stale.append((shelf.name, resident.key))
        for fetch, idle_s in lapsed:
            self._reap_fetch(fetch, idle_s)
        for tier, key in stale:
            self._lower[tier].drop(key)
        self._announcer.publish()

    def _reap_ticket(self, ticket: Ticket, now: float) -> None:
        """Under the lock."""
        if ticket.state is TicketState.OPEN:
            self._host.detach(ticket.item)
            ticket.state = TicketState.ZOMBIE
            ticket.deadline = now + ZOMBIE_GRACE_S
            self._counters.reaped += 1
        else:
            self._finish_ticket(ticket)
            self._host.release(ticket.item)

    def _reap_fetch(self, fetch: NodeFetch, idle_s: float) -> None:
        """It ends at once; its memory rests for as long again, because its reader may be in the middle of a copy."""
        if not fetch.ended:
            fetch.end()
            with self._lock:
                self._counters.reaped += 1
        if fetch.lease_s is not None and idle_s > 2 * fetch.lease_s:
            self.end_fetch(fetch)

    # Books

    def stats(self) -> NodeStats:
        with self._lock:
            host, counters = self._host, self._counters
            zombies = sum(1 for ticket in self._tickets if ticket.state is TicketState.ZOMBIE)
            tiers = [_tier_stats(host.shelf, host.arena.used_bytes)]
            tiers += [_tier_stats(lower.shelf, 0) for lower in self._lower.values()]
            outcome = NodeStats(
                tiers=tuple(tiers),
                peer_hits=counters.peer_hits,
                peer_hit_bytes=counters.peer_hit_bytes,
                misses=counters.misses,
                lost=counters.lost,
                quarantined=counters.quarantined,
                reaped=counters.reaped,
                expired=counters.expired,
                failed_loads=counters.failed_loads,
                refused=dict(counters.refused),
                leases=sum(item.leases for item in host.living()),
                puts_in_flight=len(self._tickets) - zombies,
                loads_in_flight=len(self._loads),
                fetches_open=len(self._fetches),
                zombies=zombies,
                detached=host.num_gone,
                write_back_queued=sum(len(queue.held()) for queue in self._write_backs),
                write_back_queued_bytes=sum(queue.queued_bytes for queue in self._write_backs),
                fragmentation=host.arena.fragmentation,
            )
        return replace(outcome, tiers=tuple(self._with_used_bytes(tier) for tier in outcome.tiers))

    def _with_used_bytes(self, stats: TierStats) -> TierStats:
        """Asks the tier, without the lock: it may have one of its own."""
        lower = self._lower.get(stats.tier)
        return stats if lower is None else replace(stats, used_bytes=lower.used_bytes)

    def check_integrity(self) -> None:
        """Raises StoreIntegrityError with everything that is wrong: books, leases, arena, tiers. At any time; costs a
        pass over everything."""
        with self._lock:
            wrong = self._host.check_integrity()
            holders: Counter[HostObject] = Counter(self._views)
            holders.update(item for fetch in self._fetches for item in fetch.items)
            holders.update(ticket.item for ticket in self._tickets)
            holders.update(self._loads.keys())
            holders.update(item for queue in self._write_backs for item in queue.held())
            living = self._host.living()
            wrong += [
                f"{item.key.hex()} ({item.phase.name}) counts {item.leases} leases, {holders[item]} are held"
                for item in living
                if item.leases != holders[item]
            ]
            wrong += [f"{item.key.hex()} is held and has no memory" for item in holders.keys() - set(living)]
            if {item for item in living if item.phase is Phase.LOADING} - self._loads.keys():
                wrong.append("an object is LOADING and nobody loads it")
        for lower in self._lower.values():
            wrong += lower.check_integrity()
        if wrong:
            raise StoreIntegrityError("; ".join(wrong))

    # Under the lock

    def _shelves(self) -> list[Shelf]:
        return [self._host.shelf, *(lower.shelf for lower in self._lower.values())]

    def _highest(self, key: ObjectKey) -> Shelf | None:
        if self._host.get(key, self._clock()) is not None:
            return self._host.shelf
        return next((lower.shelf for lower in self._lower.values() if lower.peek(key) is not None), None)


def _arrives(fetch: NodeFetch) -> bool:
    return fetch.wait(_ALL_LAYERS, _MOVE_S)


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
