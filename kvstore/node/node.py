"""A node of the store: `interfaces.HomeNode` over host memory, lower tiers and other nodes.

    begin_put ── commit ──> host ──write-back──> disk ──write-back──> remote
    fetch <── host <──loaders── disk, peers, remote

The node puts its parts together, and starts and ends them in the right order. What they share are the `Books`, with one
lock; each part says what it owns beside them:

    Puts, Fetches, Views    leases of host memory: of writers, of readers, of other nodes
    WriteBacks              the queues to the lower tiers
    Lookups                 where an object can be had
    Commands                pins, moves and what else operators order
    Janitor, Scrub          what time has ended, and what is wrong
    Inspection              statistics, and whether the books balance
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import replace

from tandem.kvstore.interfaces import (
    Directory,
    DirectoryEvent,
    Located,
    NodeInfo,
    ObjectInfo,
    ObjectKey,
    PeerReader,
    Refusal,
    Tier,
    TierName,
)
from tandem.kvstore.node.arena import HostArena
from tandem.kvstore.node.books import Books
from tandem.kvstore.node.commands import Commands
from tandem.kvstore.node.fetch import NodeFetch
from tandem.kvstore.node.fetches import Fetches
from tandem.kvstore.node.inspection import Inspection
from tandem.kvstore.node.janitor import Janitor
from tandem.kvstore.node.link_codecs import LinkCodecs
from tandem.kvstore.node.lookups import Lookups
from tandem.kvstore.node.puts import Puts
from tandem.kvstore.node.scrub import Scrub
from tandem.kvstore.node.settings import READ_LEASE_S, NodeSettings
from tandem.kvstore.node.sources import Sources
from tandem.kvstore.node.stats import NodeStats
from tandem.kvstore.node.tickets import Ticket
from tandem.kvstore.node.views import Views
from tandem.kvstore.node.write_backs import WriteBacks

_FLUSH_S = 5.0


class KvNode:
    """Threads start with `start`; before that puts and reads of host memory work, loading and write-backs wait."""

    def __init__(
        self,
        settings: NodeSettings,
        *,
        tiers: Sequence[Tier] = (),
        directory: Directory | None = None,
        peers: PeerReader | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """The node closes `tiers`; directory and peers stay the caller's. Raises ConfigError for a policy that does not
        exist or memory that is not granted, ValueError for two tiers of one name or a tier that is not below host
        memory."""
        self.settings = settings
        self._books = Books(settings, tiers, directory, clock)
        self._info = NodeInfo(
            node_id=settings.node_id,
            epoch=settings.epoch,
            host_id=settings.host_id,
            capacity_bytes=self._books.host.arena.capacity_bytes,
        )
        link_codecs = LinkCodecs(settings.link_codec, near_allowed=settings.near_allowed)
        self._write_backs = WriteBacks(self._books)
        self._puts = Puts(self._books, self._write_backs)
        self._fetches = Fetches(self._books, Sources(self._books, peers, link_codecs), settings.loaders)
        self._views = Views(self._books)
        self.lookups = Lookups(self._books, directory if peers is not None else None, lambda: self._info)
        self.commands = Commands(self._books, self.lookups, self._fetches, self._write_backs)
        self.scrub = Scrub(self._books, self._views)
        self.janitor = Janitor(self._books, self._puts, self._fetches)
        self._inspection = Inspection(self._books, self._puts, self._fetches, self._views, self._write_backs)

    @property
    def arena(self) -> HostArena:
        """Host memory, for a server that passes its descriptor to other processes."""
        return self._books.host.arena

    # Life

    def start(self, *, unix_path: str = "", host: str = "", port: int = 0, grpc_address: str = "") -> None:
        """Announces what is here with where other nodes reach this one. What the lower tiers hold is taken up in the
        background and is a miss until then; writes to them wait for it. Call it once, when the servers listen."""
        self._info = replace(self._info, unix_path=unix_path, host=host, port=port, grpc_address=grpc_address)
        self._books.announcer.register(self._info, self.snapshot)
        self._fetches.start()
        self._write_backs.start()
        self.janitor.start()

    def wait_indexed(self, timeout_s: float) -> bool:
        """Waits until all that the disk holds can be found. False: time is up."""
        return self._write_backs.wait_indexed(timeout_s)

    def snapshot(self) -> list[DirectoryEvent]:
        """Everything that other nodes can read here: for the directory, which calls it from a thread of its own."""
        with self._books.lock:
            return [
                DirectoryEvent(resident.key, shelf.name, resident.info.size)
                for shelf in self._books.shelves()
                if shelf.name is not TierName.REMOTE
                for resident in shelf
            ]

    def flush(self, timeout_s: float) -> bool:
        """Waits until everything committed is in the lower tiers, or was dropped. False: time is up."""
        return self._write_backs.flush(timeout_s)

    def close(self, flush_s: float = _FLUSH_S) -> None:
        """Ends the node: no new puts or fetches; waits at most `flush_s` for the write-back, then ends all leases and
        closes the tiers. Fetches that are open fail. Idempotent."""
        books = self._books
        with books.lock:
            if books.closed:
                return
            books.closed = True
        if self.janitor.is_running:
            self.flush(flush_s)
            self.janitor.stop()
        self._fetches.stop_loading()
        self._write_backs.close()
        self._fetches.close()
        for lower in books.lower.values():
            lower.tier.close()
        books.host.arena.close()

    # What workers and the data plane use

    def begin_put(self, key: ObjectKey, info: ObjectInfo) -> Ticket | Refusal:
        """A ticket, as `HomeNode.begin_put`."""
        return self._puts.begin(key, info)

    def locate(self, keys: Sequence[ObjectKey]) -> list[Located]:
        """Places, as `HomeNode.locate`."""
        return self.lookups.locate(keys)

    def locate_here(self, keys: Sequence[ObjectKey]) -> list[Located] | None:
        """What `locate` says, if this node has all of them; None: others have to be asked. Never waits."""
        return self.lookups.locate_here(keys)

    def fetch(
        self, located: Sequence[Located], overlap_s: float = 0.0, lease_s: float | None = READ_LEASE_S
    ) -> NodeFetch:
        """A fetch, as `HomeNode.fetch`. `lease_s` None: until `close`, for a server that closes what a lost client
        leaves."""
        return self._fetches.fetch(located, overlap_s, lease_s)

    def quarantine(self, key: ObjectKey, reason: str) -> None:
        """Drops it everywhere, as `HomeNode.quarantine`."""
        self._books.quarantine(key, reason)

    def view(self, key: ObjectKey, *, counts: bool = True) -> AbstractContextManager[memoryview | None]:
        """Leased bytes of an object in host memory, as `Views.view`."""
        return self._views.view(key, counts=counts)

    def read_range(self, key: ObjectKey, offset: int, out: memoryview) -> bool:
        """Fills `out` from host memory or disk, as `Views.read_range`."""
        return self._views.read_range(key, offset, out)

    def keep(self, start: int, stop: int) -> Callable[[], None]:
        """Keeps what lies between two offsets of the arena, as `Views.keep`."""
        return self._views.keep(start, stop)

    # Books

    def stats(self) -> NodeStats:
        """Counters and the state of the moment, as `Inspection.stats`."""
        return self._inspection.stats()

    def check_integrity(self) -> None:
        """Raises StoreIntegrityError, as `Inspection.check_integrity`."""
        self._inspection.check_integrity()
