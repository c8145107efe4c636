"""The node's state, and the paths of bytes through it: puts, fetches, reads for peers.

One lock guards all books; no tier, peer or directory is called while it is held. Every public method that changes
something ends with `_announcer.publish()`, outside of the lock. `tickets.py` has the life of a put, `host.py` says who
keeps memory alive, `fetching.py` how objects come in.
"""

from __future__ import annotations

import contextlib
import logging
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace

from tandem.kvstore.eviction import make_policy
from tandem.kvstore.interfaces import (
    Directory,
    Located,
    ObjectInfo,
    ObjectKey,
    PeerReader,
    Refusal,
    Tier,
    TierName,
)
from tandem.kvstore.node import content
from tandem.kvstore.node.announce import Announcer
from tandem.kvstore.node.arena import HostArena
from tandem.kvstore.node.fetching import Load, Loader, NodeFetch, Range, tell_watchers
from tandem.kvstore.node.finding import Avoided, HotKeys, peer_of
from tandem.kvstore.node.host import HostObject, HostTier, Phase
from tandem.kvstore.node.index import PolicyFactory
from tandem.kvstore.node.link_codecs import LinkCodecs
from tandem.kvstore.node.lower import LowerTier
from tandem.kvstore.node.settings import PUT_LEASE_S, READ_LEASE_S, NodeSettings
from tandem.kvstore.node.stats import NodeCounters, TierCounters
from tandem.kvstore.node.tickets import Ticket, TicketState
from tandem.kvstore.node.write_back import WriteBack

logger = logging.getLogger(__name__)

LOWER_TIERS = (TierName.DISK, TierName.REMOTE)
"""What a node can have below host memory, in the order of write-back."""
_QUEUE_SHARE = 4
"""Each write-back queue holds at most a quarter of host memory, because what is queued cannot leave."""
_AVOID_S = 2.0
"""An object or a node that could not be read from a peer is not tried again for so long: the directory may be late."""
_AVOID_DAMAGED_S = 300.0
_UNKNOWN_OWNER = ""
"""Charged for an object of another node until its header is here."""

OnLoad = Callable[[str, int, int, float], None]
"""(link, bytes, objects, seconds) of what a fetch has read."""


class NodeCore:
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
        """The node closes `tiers`; directory and peers stay the caller's. `on_load` is called by loader threads. Raises
        ConfigError for a policy that does not exist or memory that is not granted, ValueError for two tiers of one name
        or a tier that is not below host memory."""
        names = [tier.name for tier in tiers]
        if len(set(names)) != len(names) or not set(names) <= set(LOWER_TIERS):
            raise ValueError(f"tiers {names}: at most one each of {', '.join(LOWER_TIERS)}")
        make = policy_factory or (lambda capacity_bytes: make_policy(settings.eviction, capacity_bytes))
        self.settings = settings
        self._clock = clock
        self._peers = peers
        self._directory = directory
        self._on_load = on_load
        self._lock = threading.Lock()
        self._closed = False
        self._announcer = Announcer(directory, settings.node_id, self._lock)
        self._host = HostTier(settings.host_bytes, settings.quotas, make, self._evicted)
        codecs = {TierName.DISK: settings.disk_codec, TierName.REMOTE: settings.remote_codec}
        self._lower = {
            tier.name: LowerTier(
                tier,
                codec=codecs[tier.name],
                shares=settings.quotas,
                policy_factory=make,
                lock=self._lock,
                clock=clock,
                on_change=self._announcer.note,
            )
            for tier in sorted(tiers, key=lambda tier: LOWER_TIERS.index(tier.name))
        }
        self._write_backs = [
            WriteBack(
                lower,
                self._host.arena.capacity_bytes // _QUEUE_SHARE,
                self._write_back,
                index_first=lower.is_shared,
            )
            for lower in self._lower.values()
        ]
        self._link_codecs = LinkCodecs(settings.link_codec, near_allowed=settings.near_allowed)
        self._loader = Loader(self, settings.loaders)
        self._counters = NodeCounters()
        self._tickets: set[Ticket] = set()
        """Open ones and zombies."""
        self._fetches: set[NodeFetch] = set()
        self._loads: dict[HostObject, Load] = {}
        self._views: Counter[HostObject] = Counter()
        self._avoided = Avoided()
        self._hot = HotKeys()

    @property
    def arena(self) -> HostArena:
        """For a server that passes its descriptor to other processes."""
        return self._host.arena

    # Puts

    def begin_put(self, key: ObjectKey, info: ObjectInfo) -> Ticket | Refusal:
        """An object that is on disk only is taken, too: that saves its next fetch. Raises ValueError for a size that
        is not positive."""
        if info.size <= 0:
            raise ValueError(f"ObjectInfo.size is {info.size}: an object has bytes")
        with self._lock:
            now = self._clock()
            item: HostObject | Refusal | None = self._why_not(key, now)
            if item is None:
                self._drop_expired(key)
                item = self._host.reserve(key, info, Phase.WRITING)
            if isinstance(item, Refusal):
                self._counters.refuse(item)
                outcome: Ticket | Refusal = item
            else:
                outcome = Ticket(self, item, self._host.view(item), now + PUT_LEASE_S)
                self._tickets.add(outcome)
        self._announcer.publish()
        return outcome

    def rename_put(self, ticket: Ticket, key: ObjectKey, info: ObjectInfo) -> Refusal | None:
        """Of `Ticket.commit_as`. None: it is the put of that object from now on."""
        with self._lock:
            now = self._clock()
            refusal = self._why_not(key, now) if ticket.state is TicketState.OPEN else Refusal.CLOSED
            if refusal is None:
                self._drop_expired(key)
                self._host.rename(ticket.item, key, info)
            elif ticket.state is TicketState.OPEN:
                self._counters.refuse(refusal)
        self._announcer.publish()
        return refusal

    def _why_not(self, key: ObjectKey, now: float) -> Refusal | None:
        """Why a put cannot begin. Offering what is there counts as a use of it: a worker has it cached, and so does not
        ask for it."""
        if self._closed:
            return Refusal.CLOSED
        if (found := self._host.get(key, now)) is not None:
            self._host.shelf.hit(found)
            return Refusal.EXISTS
        return Refusal.EXISTS if self._host.pending(key) is not None else None

    def commit_put(self, ticket: Ticket) -> bool:
        """Of `Ticket.commit`."""
        with self._lock:
            item, was_open = ticket.item, ticket.state is TicketState.OPEN
            if ticket.state is TicketState.DONE:
                return False
            self._finish_ticket(ticket)
            if was_open and not self._closed:
                item.dirty = True
                if self._host.complete(item, item.info, self._clock()):
                    self._announcer.note(item.key, TierName.HOST, item.info.size)
                    self._queue_write(item, 0)
            elif was_open:
                self._host.detach(item)
            stored = item.phase is Phase.COMPLETE
            self._host.release(item)
        self._announcer.publish()
        return stored

    def abort_put(self, ticket: Ticket) -> None:
        """Of `Ticket.abort`."""
        with self._lock:
            if ticket.state is TicketState.DONE:
                return
            self._finish_ticket(ticket)
            self._host.detach(ticket.item)
            self._host.release(ticket.item)

    def _finish_ticket(self, ticket: Ticket) -> None:
        ticket.state = TicketState.DONE
        self._tickets.discard(ticket)

    # Fetches

    def fetch(
        self, located: Sequence[Located], overlap_s: float = 0.0, lease_s: float | None = READ_LEASE_S
    ) -> NodeFetch:
        """As `HomeNode.fetch`. `lease_s` None: until `close`, for a server that closes what a lost client leaves."""
        fresh: list[Load] = []
        with self._lock:
            sources, items, loads = self._attach([] if self._closed else located, fresh)
            fetch = NodeFetch(self, sources, items, loads, lease_s, self._clock)
            for load in loads:
                if load is not None:
                    load.watchers.append(fetch)
            self._fetches.add(fetch)
        self._loader.submit(fresh, overlap_s)
        self._announcer.publish()
        return fetch

    def _attach(
        self, located: Sequence[Located], fresh: list[Load]
    ) -> tuple[list[Located], list[HostObject], list[Load | None]]:
        """Leases the leading run of what is here or can be brought here. What is here comes first, so that making
        room for the rest does not evict it."""
        now = self._clock()
        here = [self._lease_here(place.key, now) for place in located]
        sources: list[Located] = []
        items: list[HostObject] = []
        loads: list[Load | None] = []
        for place, found in zip(located, here, strict=True):
            item = found or self._lease_here(place.key, now)  # twice in one fetch
            load = None
            if item is None:
                load = self._begin_load(place)
                if load is None:
                    break
                item = load.item
                self._host.lease(item)  # beside the loader's own
                fresh.append(load)
            elif item.phase is Phase.LOADING:
                load = self._loads[item]
            else:
                self._host.shelf.hit(item)
                self._count_hit(self._host.shelf.counters, item)
            self._hot.note(place.key)
            sources.append(load.source if load else item.place)
            items.append(item)
            loads.append(load)
        for found in here[len(items) :]:
            if found is not None:
                self._host.release(found)
        return sources, items, loads

    def _lease_here(self, key: ObjectKey, now: float) -> HostObject | None:
        item = self._host.get(key, now)
        if item is None:
            item = self._host.pending(key)
            if item is None or item.phase is Phase.WRITING:
                return None
        item.leases += 1
        return item

    def _begin_load(self, place: Located) -> Load | None:
        """A place in host memory for an object, and where to get it from; the loader holds one lease of it."""
        source, info = place, ObjectInfo(size=place.size, num_tokens=0, owner=_UNKNOWN_OWNER)
        disk = self._lower.get(TierName.DISK)
        resident = disk.peek(place.key) if disk is not None else None
        if resident is not None:
            info = resident.info
            source = Located(place.key, TierName.DISK, TierName.DISK.value, info.size)
        elif not (
            (place.tier is TierName.PEER and self._peers is not None)
            or (place.tier is TierName.REMOTE and TierName.REMOTE in self._lower)
        ):
            return None
        if source.size <= 0 or self._host.pending(place.key) is not None:
            return None
        self._drop_expired(place.key)
        item = self._host.reserve(place.key, info, Phase.LOADING)
        if isinstance(item, Refusal):
            return None
        item.origin = source.link
        if resident is not None:
            resident.leases += 1
        load = self._loads[item] = Load(item, source, resident)
        return load

    def end_fetch(self, fetch: NodeFetch) -> None:
        """Of `NodeFetch.close`."""
        with self._lock:
            if fetch not in self._fetches:
                return
            self._fetches.remove(fetch)
            for item in fetch.items:
                self._host.release(item)
                load = self._loads.get(item)
                if load is not None and fetch in load.watchers:
                    load.watchers.remove(fetch)
        fetch.end()

    # What loader threads call

    def view_of(self, item: HostObject) -> memoryview:
        return self._host.view(item)

    def read_ranges(self, source: Located, ranges: Sequence[Range]) -> list[bool]:
        lower = self._lower.get(source.tier)
        if lower is not None:
            return lower.read_many(ranges)
        if self._peers is None:
            return [False] * len(ranges)
        started = time.perf_counter()
        done = self._peers.read_many(peer_of(source.link), ranges)
        if all(done):
            num_bytes = sum(len(out) for _, _, out in ranges)
            self._link_codecs.links.observe(source.link, num_bytes, len(ranges), time.perf_counter() - started)
        if not any(done):
            with self._lock:
                self._avoided.add(source.link, b"", self._clock() + _AVOID_S)
        return done

    def link_codec(self, sources: Sequence[Located], overlap_s: float) -> str:
        return self._link_codecs.choose(sources, overlap_s)

    def read_encoded(self, source: Located, key: ObjectKey, codec: str) -> memoryview | None:
        if self._peers is None:
            return None
        started = time.perf_counter()
        answer = self._peers.read_encoded(peer_of(source.link), key, codec)
        if answer is None:
            return None
        seconds = time.perf_counter() - started - answer.encode_s
        self._link_codecs.links.observe(source.link, len(answer.content), 1, seconds)
        return content.decoded(memoryview(answer.content))

    def still_wanted(self, loads: Sequence[Load]) -> list[Load]:
        with self._lock:
            dropped = [load for load in loads if not load.watchers and not load.ended]
            for load in dropped:
                self._end_load(load)
                load.failed = True
                self._host.detach(load.item)
                self._host.release(load.item)
            return [load for load in loads if not load.ended]

    def finish_load(self, load: Load, info: ObjectInfo) -> None:
        with self._lock:
            if load.ended:
                return
            item = load.item
            known = load.resident.info if load.resident is not None else info
            self._end_load(load)
            lower = self._lower.get(load.source.tier)
            if lower is not None:
                self._count_hit(lower.shelf.counters, item)
            else:
                self._counters.peer_hits += 1
                self._counters.peer_hit_bytes += item.info.size
            if lower is not None and (resident := lower.shelf.get(item.key)) is not None:
                lower.shelf.hit(resident)
            if item.phase is Phase.LOADING and self._host.complete(item, known, self._clock()):
                self._announcer.note(item.key, TierName.HOST, item.info.size)
            load.complete = True
            self._host.release(item)
        tell_watchers([load])
        self._announcer.publish()

    def fail_load(self, load: Load, *, is_damaged: bool) -> None:
        with self._lock:
            if load.ended:
                return
            self._end_load(load)
            load.failed = True
            self._counters.failed_loads += 1
            key, source = load.item.key, load.source
            self._host.detach(load.item)
            self._host.release(load.item)
            if source.tier is TierName.PEER:
                self._avoided.add(source.link, key, self._clock() + (_AVOID_DAMAGED_S if is_damaged else _AVOID_S))
        tell_watchers([load])
        lower = self._lower.get(source.tier)
        if is_damaged:
            self.quarantine(key, f"no object of the store ({source.link})")
        elif lower is not None and lower.is_shared:
            with self._lock:
                lower.forget(key)
        elif lower is not None and not self._closed:
            lower.drop(key)  # it cannot be read: keeping it would fail the next fetch, too
        self._announcer.publish()

    def loaded(self, link: str, num_bytes: int, num_objects: int, seconds: float) -> None:
        if self._on_load is not None:
            self._on_load(link, num_bytes, num_objects, seconds)

    def _end_load(self, load: Load) -> None:
        del self._loads[load.item]
        if load.resident is not None:
            load.resident.leases -= 1

    # Reads for other nodes

    @contextlib.contextmanager
    def view(self, key: ObjectKey, *, counts: bool = True) -> Iterator[memoryview | None]:
        """Read-only bytes of an object in host memory, leased inside of the `with`; None if it is not there. `counts`:
        it is a use of the object, which the eviction policy and `hot` learn of."""
        with self._lock:
            item = None if self._closed else self._host.get(key, self._clock())
            if item is not None:
                self._lease_view(item)
                if counts:
                    self._host.shelf.hit(item)
                    self._hot.note(key)
        if item is None:
            yield None
            return
        try:
            yield self._host.view(item).toreadonly()
        finally:
            with self._lock:
                self._release_view(item)

    def read_range(self, key: ObjectKey, offset: int, out: memoryview) -> bool:
        """From host memory or disk. False: not there, too short, or a fault."""
        with self.view(key) as whole:
            if whole is not None:
                if offset < 0 or offset + len(out) > len(whole):
                    return False
                out[:] = whole[offset : offset + len(out)]
                return True
        disk = self._lower.get(TierName.DISK)
        if disk is None or offset < 0:
            return False
        with self._lock:
            resident = None if self._closed else disk.peek(key)
            if resident is None or offset + len(out) > resident.info.size:
                return False
            resident.leases += 1
            disk.shelf.hit(resident)
            self._hot.note(key)
        try:
            return disk.read(key, offset, out)
        finally:
            with self._lock:
                resident.leases -= 1

    def put_replica(self, key: ObjectKey, info: ObjectInfo, copy: memoryview) -> bool:
        """Takes a copy of another node's object. True if it is here afterwards."""
        if info.size <= 0 or len(copy) != info.size:
            return False
        ticket = self.begin_put(key, info)
        if isinstance(ticket, Refusal):
            return ticket is Refusal.EXISTS
        ticket.buffer[:] = copy
        return ticket.commit()

    def keep(self, start: int, stop: int) -> Callable[[], None]:
        """Objects with bytes between these offsets of the arena keep their memory until what this returns is called:
        somebody may still write there."""
        with self._lock:
            living = self._host.living()
            items = [item for item in living if item.offset < stop and start < item.offset + item.info.size]
            for item in items:
                self._lease_view(item)

        def let_go() -> None:
            with self._lock:
                for item in items:
                    self._release_view(item)

        return let_go

    # Wrong content

    def quarantine(self, key: ObjectKey, reason: str) -> None:
        with self._lock:
            if self._closed:
                return
            item = self._host.get(key, self._clock())
            if item is not None:
                self._host.detach(item)
                self._announcer.note(key, TierName.HOST, 0)
                if item.origin not in self._lower:
                    self._avoided.add(item.origin, key, self._clock() + _AVOID_DAMAGED_S)
            self._counters.quarantined += 1
        for lower in self._lower.values():
            lower.drop(key)
        logger.warning("object %s is quarantined: %s", key.hex()[:16], reason)
        self._announcer.publish()

    # Write-back

    def _queue_write(self, item: HostObject, index: int) -> None:
        """Under the lock. Takes a lease for the queue."""
        for write_back in self._write_backs[index:]:
            self._host.lease(item)
            if write_back.offer(item):
                return
            self._host.release(item)
            write_back.lower.shelf.counters.writes_dropped += 1

    def _write_back(self, queue: WriteBack, item: HostObject) -> None:
        """On the queue's thread, with a lease of `item`, which ends here."""
        lower = queue.lower
        written = False
        try:
            if item.phase is Phase.COMPLETE:
                written = self._write_down(item, lower)
        except Exception:
            logger.exception("write-back to the %s tier", lower.name)
        with self._lock:
            kept = item.phase is Phase.COMPLETE
            if written:
                item.dirty = False
            else:
                lower.shelf.counters.writes_dropped += 1
            if kept and not self._closed:
                self._queue_write(item, self._write_backs.index(queue) + 1)
            queue.done()
            self._host.release(item)
        if written and not kept and not item.moved:
            lower.drop(item.key)  # quarantined or cleared in the meantime
        self._announcer.publish()

    def _write_down(self, item: HostObject, lower: LowerTier) -> bool:
        whole = self._host.view(item).toreadonly()
        encoded = content.encoded(whole, lower.codec)
        if encoded is None:
            return False
        info = item.info if encoded is whole else replace(item.info, size=len(encoded))
        return lower.write(item.key, info, encoded)

    # Under the lock

    def _lease_view(self, item: HostObject) -> None:
        self._host.lease(item)
        self._views[item] += 1

    def _release_view(self, item: HostObject) -> None:
        self._views[item] -= 1
        if not self._views[item]:
            del self._views[item]
        self._host.release(item)

    def _evicted(self, item: HostObject) -> None:
        self._announcer.note(item.key, TierName.HOST, 0)
        if item.dirty and self._lower:
            self._counters.lost += 1

    def _drop_expired(self, key: ObjectKey) -> None:
        """Its time is up, and its place in the index is wanted."""
        stale = self._host.stale(key)
        if stale is not None:
            self._host.detach(stale)
            self._announcer.note(key, TierName.HOST, 0)
            self._counters.expired += 1

    def _count_hit(self, counters: TierCounters, item: HostObject) -> None:
        counters.hits += 1
        counters.hit_bytes += item.info.size
