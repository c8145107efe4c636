"""S3-FIFO (Yang et al., "FIFO queues are all you need for cache eviction", SOSP 2023), counted in bytes."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable

from tandem.kvstore.eviction.ghosts import Ghosts
from tandem.kvstore.interfaces import ObjectInfo, ObjectKey

SMALL_SHARE = 0.1
MAX_READS = 3
READS_TO_STAY = 2
"""An object that leaves the small queue after this many reads moves to the main queue."""


class _Entry:
    __slots__ = ("reads", "size")

    def __init__(self, size: int) -> None:
        self.size = size
        self.reads = 0


class S3Fifo:
    """New objects pass through a small queue; those that were read there, or that come back soon after, move to the
    main one, where each read buys another round. A read costs O(1) and moves nothing; `evict` is O(1) amortised, plus
    one step per object that may not leave: it goes to the back of its queue, as one that is being read."""

    def __init__(self, capacity_bytes: int) -> None:
        self._small_bytes_wanted = int(capacity_bytes * SMALL_SHARE)
        self._small: OrderedDict[ObjectKey, _Entry] = OrderedDict()
        self._main: OrderedDict[ObjectKey, _Entry] = OrderedDict()
        self._small_bytes = 0
        self._ghosts: Ghosts[None] = Ghosts(capacity_bytes - self._small_bytes_wanted)

    def insert(self, key: ObjectKey, info: ObjectInfo) -> None:
        self.remove(key)
        if self._ghosts.pop(key) is not None:
            self._main[key] = _Entry(info.size)
        else:
            self._small[key] = _Entry(info.size)
            self._small_bytes += info.size

    def hit(self, key: ObjectKey) -> None:
        entry = self._small.get(key) or self._main.get(key)
        if entry is not None and entry.reads < MAX_READS:
            entry.reads += 1

    def remove(self, key: ObjectKey) -> None:
        if key in self._small:
            self._small_bytes -= self._small.pop(key).size
        else:
            self._main.pop(key, None)

    def evict(self, may_leave: Callable[[ObjectKey], bool]) -> ObjectKey | None:
        victim = None
        if self._small_bytes < self._small_bytes_wanted:
            victim = self._evict_main(may_leave)
        # The main queue comes last again: the search of the small one may have moved objects there.
        return victim or self._evict_small(may_leave) or self._evict_main(may_leave)

    def remember(self, most: int) -> None:
        self._ghosts.bound(most)

    def __len__(self) -> int:
        return len(self._small) + len(self._main)

    def _evict_small(self, may_leave: Callable[[ObjectKey], bool]) -> ObjectKey | None:
        for _ in range(len(self._small)):
            key, entry = next(iter(self._small.items()))
            if entry.reads >= READS_TO_STAY:
                self.remove(key)
                entry.reads = 0
                self._main[key] = entry
            elif may_leave(key):
                self.remove(key)
                self._ghosts.add(key, entry.size, None)
                return key
            else:
                self._small.move_to_end(key)
        return None

    def _evict_main(self, may_leave: Callable[[ObjectKey], bool]) -> ObjectKey | None:
        stuck = 0
        while stuck < len(self._main):
            key, entry = next(iter(self._main.items()))
            if entry.reads > 0:
                entry.reads -= 1
                stuck = 0
            elif may_leave(key):
                del self._main[key]
                return key
            else:
                stuck += 1
            self._main.move_to_end(key)
        return None
