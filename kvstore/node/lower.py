"""A tier below host memory with its books: writes that make room first, reads that count faults."""

from __future__ import annotations

import gc
import itertools
import logging
import threading
import time
from collections.abc import Callable, Sequence
from typing import Protocol, runtime_checkable

from tandem.kvstore.eviction import Shares
from tandem.kvstore.interfaces import ObjectInfo, ObjectKey, StoreIntegrityError, Tier, TierName
from tandem.kvstore.node.index import PolicyFactory, Resident, Shelf

logger = logging.getLogger(__name__)

_EVICTIONS_PER_WRITE = 64
"""Most evictions for one object: a tier whose files still hold dead bytes may need more than the object's size."""
_DELETES_PER_WRITE = 4
_TOLD_TOGETHER = 1_000
_FULL_SHARE = 8
"""A write that fails while less than 1/8 of the tier is free failed for want of room; otherwise it is a fault."""


@runtime_checkable
class BatchedTier(Protocol):
    """What a tier may have beside `interfaces.Tier` when a round trip costs much and one serves many keys."""

    def infos(self, keys: Sequence[ObjectKey]) -> list[ObjectInfo | None]: ...

    def read_many(self, ranges: Sequence[tuple[ObjectKey, int, memoryview]]) -> list[bool]: ...


class LowerTier:
    """Safe from any thread. `lock` is the node's, taken for the books only, never while the tier works.

    Changes of the tier are made one at a time (`_writing`), so that books and tier agree; taken before `lock`.
    """

    def __init__(
        self,
        tier: Tier,
        *,
        codec: str,
        shares: Shares,
        policy_factory: PolicyFactory,
        lock: threading.Lock,
        on_change: Callable[[ObjectKey, TierName, int], None],
    ) -> None:
        """`on_change` is called under `lock` with the new size, 0 when the object left."""
        self.tier = tier
        self.name = tier.name
        self.codec = codec
        self.shelf = Shelf(tier.name, tier.capacity_bytes, shares, policy_factory)
        self._lock = lock
        self._on_change = on_change
        self._writing = threading.Lock()
        self._is_indexed = False
        self._cleared: set[tuple[str | None, str | None]] = set()
        """Owner and model of what was cleared before the index was there; None: any."""
        self._undeleted: set[ObjectKey] = set()
        """Keys that are out of the books, but which the tier could not delete; tried again with the next writes. Under
        `_writing`."""

    @property
    def is_shared(self) -> bool:
        """Other nodes change it too: the books are a hint."""
        return self.name is TierName.REMOTE

    @property
    def used_bytes(self) -> int:
        """0 if it cannot tell."""
        try:
            return self.tier.used_bytes
        except Exception:
            self._fault("measure", b"")
            return 0

    def load_index(self, stop: Callable[[], bool], tell: Callable[[], None]) -> None:
        """Takes up what the tier holds already, oldest first; nothing is written before. `tell` is called now and then,
        without the lock, with changes that were noted."""
        try:
            for number, (key, info) in enumerate(self.tier.objects(), 1):
                if stop():
                    return
                self._take_up(key, info)
                if number % _TOLD_TOGETHER == 0:
                    tell()
                    gc.freeze()  # full collections of what stays would stop all threads again and again
        except Exception:
            self._fault("list", b"")
        tell()
        with self._lock:
            self._is_indexed = True
            self._cleared.clear()
        if not self.is_shared:
            self.trim()
            tell()

    def _take_up(self, key: ObjectKey, info: ObjectInfo) -> None:
        with self._lock:
            cleared = any(owner in (None, info.owner) and model in (None, info.model) for owner, model in self._cleared)
            known = self.shelf.get(key)
            if known is not None and known.info.size != info.size and not self.is_shared:
                self.forget(key)  # a later record of the key, in another codec
                known = None
            if known is None and not cleared:
                self._enter(key, info)
        if cleared:
            self.drop(key)
            self._delete(key)

    def clear_later(self, owner: str | None, model: str | None) -> None:
        """What the index does not list yet is cleared as it comes to light. The caller holds the node's lock."""
        if not self._is_indexed:
            self._cleared.add((owner, model))

    def info(self, key: ObjectKey) -> ObjectInfo | None:
        """What the books say; for a shared tier then the tier itself, which the books remember."""
        return self.infos([key])[0]

    def infos(self, keys: Sequence[ObjectKey], limit_s: float = 1.0) -> list[ObjectInfo | None]:
        """`info` of each. A tier that has to be asked key by key is asked until the first that it does not have, or
        until `limit_s` is over; what follows counts as missing."""
        with self._lock:
            known = [self.shelf.get(key) for key in keys]
        found = [None if resident is None else resident.info for resident in known]
        unknown = [index for index, info in enumerate(found) if info is None]
        if not self.is_shared or not unknown:
            return found
        try:
            asked = self._ask([keys[index] for index in unknown], limit_s)
        except Exception:
            self._fault("look up", keys[unknown[0]])
            return found
        with self._lock:
            for index, info in zip(unknown, asked, strict=False):
                found[index] = info
                if info is not None and self.shelf.get(keys[index]) is None:
                    self._enter(keys[index], info)
        return found

    def _ask(self, keys: Sequence[ObjectKey], limit_s: float) -> list[ObjectInfo | None]:
        if isinstance(self.tier, BatchedTier):
            return self.tier.infos(keys)
        deadline = time.monotonic() + limit_s
        asked: list[ObjectInfo | None] = []
        for key in keys:
            asked.append(self.tier.info(key))
            if asked[-1] is None or time.monotonic() > deadline:
                break
        return asked

    def peek(self, key: ObjectKey) -> Resident | None:
        """What the books alone say; the caller holds the node's lock."""
        return self.shelf.get(key)

    def read(self, key: ObjectKey, offset: int, out: memoryview) -> bool:
        return self.read_many([(key, offset, out)])[0]

    def read_many(self, ranges: Sequence[tuple[ObjectKey, int, memoryview]]) -> list[bool]:
        """Fills the ranges (key, offset, out); for each, whether it was filled. Faults are counted."""
        if isinstance(self.tier, BatchedTier):
            try:
                done = self.tier.read_many(ranges)
            except Exception:
                self._fault("read", ranges[0][0])
                return [False] * len(ranges)
        else:
            done = [self._read_one(*each) for each in ranges]
        with self._lock:
            self.shelf.counters.faults += done.count(False)
        return done

    def _read_one(self, key: ObjectKey, offset: int, out: memoryview) -> bool:
        try:
            return self.tier.read(key, offset, out)
        except Exception:
            self._fault("read", key)
            return False

    def write(self, key: ObjectKey, info: ObjectInfo, content: memoryview) -> bool:
        """Evicts what has to leave. True if it is there afterwards."""
        with self._writing:
            if not self._is_indexed:
                return False
            self._delete_again()
            if self.info(key) is not None:
                return True
            if info.size > self.shelf.capacity_bytes or info.size > self.shelf.quotas.limit_bytes(info.owner):
                return False
            if not self._make_room(info) or not self._put(key, info, content):
                return False
            self._undeleted.discard(key)
            with self._lock:
                self.shelf.counters.writes += 1
                self.shelf.counters.written_bytes += info.size
                if self.shelf.get(key) is None:
                    self._enter(key, info)
            return True

    def drop(self, key: ObjectKey) -> bool:
        """It leaves the tier, pinned or not. False: it was not there."""
        with self._writing:
            with self._lock:
                known = self.forget(key)
            return (known or self.is_shared) and self._delete(key)

    def forget(self, key: ObjectKey) -> bool:
        """Takes it out of the books; the caller holds the node's lock. False: it was not in them."""
        resident = self.shelf.get(key)
        if resident is None:
            return False
        self.shelf.remove(resident)
        self._on_change(key, self.name, 0)
        return True

    def trim(self) -> None:
        """Evicts while more is there than may be: the capacity was lowered since the last run."""
        with self._writing:
            while True:
                with self._lock:
                    if self.shelf.bytes <= self.shelf.capacity_bytes:
                        return
                    victim = self._evict("", 0)
                if victim is None:
                    return
                self._delete(victim)

    def check_integrity(self) -> list[str]:
        """Everything that is wrong. A shared tier's content is not compared: others change it."""
        with self._writing:
            with self._lock:
                wrong = self.shelf.check_integrity()
                booked = {resident.key: resident.info.size for resident in self.shelf}
                if not self._is_indexed:
                    return wrong
            try:
                self.tier.check_integrity()
                held = {key: info.size for key, info in self.tier.objects()}
            except StoreIntegrityError as error:
                return [*wrong, str(error)]
            for key in self._undeleted - booked.keys():
                held.pop(key, None)
            if not self.is_shared and booked != held:
                wrong.append(f"{self.name}: the books list {len(booked)} objects, the tier holds {len(held)} or others")
            return wrong

    def _enter(self, key: ObjectKey, info: ObjectInfo) -> None:
        self.shelf.add(Resident(key, info))
        self._on_change(key, self.name, info.size)

    def _make_room(self, info: ObjectInfo) -> bool:
        while True:
            with self._lock:
                room = self.shelf.bytes + info.size <= self.shelf.capacity_bytes
                if room and self.shelf.quotas.fits(info.owner, info.size):
                    return True
                victim = self._evict(info.owner, info.size)
            if victim is None:
                return False
            self._delete(victim)

    def _put(self, key: ObjectKey, info: ObjectInfo, content: memoryview) -> bool:
        for _ in range(_EVICTIONS_PER_WRITE):
            try:
                if self.tier.put(key, info, content):
                    return True
                spare = self.tier.capacity_bytes - self.tier.used_bytes
            except Exception:
                self._fault("write", key)
                return False
            if spare > max(info.size, self.tier.capacity_bytes // _FULL_SHARE):
                break
            with self._lock:
                victim = self._evict(info.owner, info.size)
            if victim is None:
                return False
            self._delete(victim)
        with self._lock:
            self.shelf.counters.faults += 1
        return False

    def _evict(self, owner: str, size: int) -> ObjectKey | None:
        resident = self.shelf.evict_for(owner, size)
        if resident is None:
            return None
        self._on_change(resident.key, self.name, 0)
        return resident.key

    def _delete(self, key: ObjectKey) -> bool:
        try:
            if self.tier.delete(key):
                return True
            if not self.is_shared and self.tier.info(key) is not None:
                self._undeleted.add(key)
        except Exception:
            self._fault("delete", key)
            self._undeleted.add(key)
        return False

    def _delete_again(self) -> None:
        for key in list(itertools.islice(self._undeleted, _DELETES_PER_WRITE)):
            self._undeleted.discard(key)
            self._delete(key)

    def _fault(self, what: str, key: bytes) -> None:
        """A tier has to return its faults as values; one that raises must not take a thread of the node with it."""
        logger.exception("the %s tier failed to %s %s", self.name, what, key.hex()[:16])
        with self._lock:
            self.shelf.counters.faults += 1
