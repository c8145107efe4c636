"""The host tier: the arena and the books of what lies in it.

An object's memory is handed out by `reserve` (with one lease for whoever fills it), becomes findable by `complete`, and
is given back when it is findable no more (`detach`, or eviction) **and** its last lease has ended. So nothing that
anybody reads or writes is ever overwritten. Not thread-safe: the node calls it under its lock.
"""

from __future__ import annotations

import enum
from collections.abc import Callable
from dataclasses import dataclass, field

from tandem.kvstore.eviction import Shares
from tandem.kvstore.interfaces import Located, ObjectInfo, ObjectKey, Refusal, StoreIntegrityError, TierName
from tandem.kvstore.node.arena import HostArena
from tandem.kvstore.node.index import PolicyFactory, Resident, Shelf


class Phase(enum.Enum):
    """Where an object of the host tier is in its life."""

    WRITING = enum.auto()
    """A put that is not committed: its key is taken, nobody finds it."""
    LOADING = enum.auto()
    """On its way from another tier: fetches share it."""
    COMPLETE = enum.auto()
    GONE = enum.auto()
    """Findable no more; the memory stays until the last lease ends."""


@dataclass(slots=True, eq=False)
class HostObject(Resident):
    """An object with memory in the arena."""

    offset: int = -1
    phase: Phase = Phase.WRITING
    origin: str = ""
    """Link it was loaded from; empty: put here."""
    dirty: bool = False
    """Put here, and in no lower tier so far."""
    moved: bool = False
    """Left for a lower tier, which keeps it."""
    place: Located = field(init=False)
    """Made once, as every look-up hands it out. While the object is on its way: where it comes from."""

    def __post_init__(self) -> None:
        self.place = _here(self.key, self.info)


class HostTier:
    """Memory and books of the host tier. Not thread-safe: the caller holds the node's lock."""

    def __init__(
        self,
        capacity_bytes: int,
        shares: Shares,
        policy_factory: PolicyFactory,
        on_evicted: Callable[[HostObject], None],
    ) -> None:
        """`on_evicted` is called under the node's lock."""
        self.arena = HostArena(capacity_bytes)
        self.shelf = Shelf(TierName.HOST, self.arena.capacity_bytes, shares, policy_factory)
        self._on_evicted = on_evicted
        self._complete: dict[ObjectKey, HostObject] = {}
        """What is on the shelf."""
        self._pending: dict[ObjectKey, HostObject] = {}
        """WRITING and LOADING."""
        self._gone: set[HostObject] = set()

    def get(self, key: ObjectKey) -> HostObject | None:
        """A complete object."""
        return self._complete.get(key)

    def pending(self, key: ObjectKey) -> HostObject | None:
        return self._pending.get(key)

    def view(self, item: HostObject) -> memoryview:
        return self.arena.view(item.offset, item.info.size)

    def reserve(self, key: ObjectKey, info: ObjectInfo, phase: Phase) -> HostObject | Refusal:
        """Memory for an object that is not there yet, with one lease; evicts what has to leave for it."""
        size, quotas = info.size, self.shelf.quotas
        if size > self.arena.capacity_bytes:
            return Refusal.NO_SPACE
        if size > quotas.limit_bytes(info.owner):
            return Refusal.QUOTA
        while not quotas.fits(info.owner, size):
            if not self._evict(info.owner, size):
                return Refusal.QUOTA
        while (offset := self.arena.allocate(size)) is None:
            if not self._evict(info.owner, size):
                return Refusal.NO_SPACE
        quotas.reserve(info.owner, size)
        item = HostObject(key, info, leases=1, offset=offset, phase=phase)
        self._pending[key] = item
        return item

    def rename(self, item: HostObject, key: ObjectKey, info: ObjectInfo) -> None:
        """What is being written becomes another object. `info` has the size and owner that `reserve` was told."""
        del self._pending[item.key]
        item.key, item.info = key, info
        item.place = _here(key, info)
        self._pending[key] = item

    def complete(self, item: HostObject, info: ObjectInfo) -> bool:
        """All bytes are there: it can be found from now on. `info` may name the owner that `reserve` did not know;
        False: that owner's quota has no room, and the object is detached."""
        quotas = self.shelf.quotas
        quotas.unreserve(item.info.owner, item.info.size)
        while not quotas.fits(info.owner, info.size):
            if not self._evict(info.owner, info.size):
                quotas.reserve(item.info.owner, item.info.size)
                self.detach(item)
                return False
        del self._pending[item.key]
        if item.phase is Phase.LOADING:
            item.place = _here(item.key, info)
        item.info, item.phase = info, Phase.COMPLETE
        self.shelf.add(item)
        self._complete[item.key] = item
        return True

    def detach(self, item: HostObject) -> None:
        """Nobody finds it any more; its memory is free when its last lease ends."""
        if item.phase is Phase.COMPLETE:
            self.shelf.remove(item)
            del self._complete[item.key]
            self.shelf.quotas.reserve(item.info.owner, item.info.size)
        elif item.phase is Phase.GONE:
            return
        else:
            del self._pending[item.key]
        item.phase = Phase.GONE
        self._gone.add(item)
        if item.leases == 0:
            self._give_back(item)

    def lease(self, item: HostObject) -> None:
        item.leases += 1

    def release(self, item: HostObject) -> None:
        """Ends one lease. Raises StoreIntegrityError if there is none."""
        if item.leases <= 0:
            raise StoreIntegrityError(f"{item.key.hex()}: a lease ended that nobody had")
        item.leases -= 1
        if item.leases == 0 and item.phase is Phase.GONE:
            self._give_back(item)

    def living(self) -> list[HostObject]:
        """Everything that has memory."""
        return [*self._complete.values(), *self._pending.values(), *self._gone]

    @property
    def num_gone(self) -> int:
        return len(self._gone)

    def check_integrity(self) -> list[str]:
        """Everything that is wrong."""
        self.arena.check_integrity()
        wrong = self.shelf.check_integrity()
        living, runs = self.living(), self.arena.runs()
        if set(self.shelf) != set(self._complete.values()):
            wrong.append("host: the shelf differs from the complete objects")
        if len({item.offset for item in living}) != len(living):
            wrong.append("host: two objects share memory")
        if {item.offset for item in living} != set(runs):
            wrong.append(f"host: {len(living)} objects have memory, {len(runs)} runs are handed out")
        for item in living:
            if runs.get(item.offset, 0) < item.info.size:
                wrong.append(f"host: {item.key.hex()} is longer than its memory")
            if item.phase is not Phase.COMPLETE and item.leases == 0:
                wrong.append(f"host: {item.key.hex()} is {item.phase.name} and nobody holds it")
        by_owner: dict[str, int] = {}
        for item in living:
            by_owner[item.info.owner] = by_owner.get(item.info.owner, 0) + item.info.size
        if by_owner != dict(self.shelf.quotas.used):
            wrong.append(f"host: owners hold {by_owner}, charged are {dict(self.shelf.quotas.used)}")
        return wrong

    def _evict(self, owner: str, size: int) -> bool:
        resident = self.shelf.evict_for(owner, size)
        if resident is None:
            return False
        victim = self._complete.pop(resident.key)
        victim.phase = Phase.GONE
        self.arena.free(victim.offset)
        self._on_evicted(victim)
        return True

    def _give_back(self, item: HostObject) -> None:
        self._gone.remove(item)
        self.shelf.quotas.unreserve(item.info.owner, item.info.size)
        self.arena.free(item.offset)


def _here(key: ObjectKey, info: ObjectInfo) -> Located:
    return Located(key, TierName.HOST, TierName.HOST.value, info.size)
