"""Cost-aware eviction: recompute time x expected reuse / bytes, with ageing.

A descendant of GreedyDual-Size-Frequency (Cherkasova, HP Labs 1998) that learns how likely reuse is instead of
taking frequency at its word.
"""

from __future__ import annotations

import heapq
from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeAlias

from tandem.kvstore.eviction.ghosts import Ghosts
from tandem.kvstore.interfaces import ObjectInfo, ObjectKey

MAX_USES = 10
"""Uses are counted up to here."""
STEPS = 8
"""Priorities are rounded down to 1/8 of the value of an average object. Within a step an older batch leaves before a
newer one, and within a batch what lies deepest in its prompt: a chain loses its tail, and what is left is of use."""
BATCH_USES = 512
"""A batch is so many uses, the chunks of some ten prompts. It is no less than an eighth of the capacity, which would
order a large tier by age alone, and no more than half of it."""
GHOST_CAPACITIES = 4
CLIP = 16.0
"""No object is worth more than 16 times (or less than a 16th of) the average per byte: times are measured, and can be
off."""


class ReuseOdds:
    """How often objects that had been used n times were used again before they were forgotten. Halves what it knows
    now and then, so that it follows the load."""

    def __init__(self) -> None:
        self._returned = [0.0] * MAX_USES
        self._observed = [0.0] * MAX_USES
        self._fresh = 0

    def observe(self, uses: int, returned: bool, window: int) -> None:
        self._returned[uses - 1] += returned
        self._observed[uses - 1] += 1.0
        self._fresh += 1
        if self._fresh >= window:
            self._fresh = 0
            self._returned = [count / 2 for count in self._returned]
            self._observed = [count / 2 for count in self._observed]

    def probability(self, uses: int) -> float:
        """One half where nothing is known."""
        return (self._returned[uses - 1] + 1.5) / (self._observed[uses - 1] + 3.0)


_Rank: TypeAlias = tuple[float, int, int, int, ObjectKey]
"""Priority, batch, deepest first, oldest first. The least leaves."""


@dataclass(slots=True)
class _Entry:
    size: int
    worth: float
    """Recompute time per byte, over that of an average object."""
    uses: int
    position: int
    rank: _Rank | None = None
    """Its live entry in the heap, as against outdated ones."""


class CostAware:
    """The least priority leaves: `age + worth * uses * P(reuse | uses)` as it was at the last use, where age is the
    priority of the last object that left. Uses survive in ghosts. O(log n), plus O(log n) per object that may not
    leave."""

    def __init__(self, capacity_bytes: int) -> None:
        self._entries: dict[ObjectKey, _Entry] = {}
        self._heap: list[_Rank] = []
        self._ghosts: Ghosts[int] = Ghosts(GHOST_CAPACITIES * capacity_bytes, self._forgotten)
        self._odds = ReuseOdds()
        self._age = 0.0
        self._turn = 0
        self._capacity = capacity_bytes
        self._batch = self._batch_uses = self._batch_bytes = 0
        self._usual_cost = 0.0
        """Seconds per byte, of recent inserts."""

    def insert(self, key: ObjectKey, info: ObjectInfo) -> None:
        self.remove(key)
        uses = 1
        ghost = self._ghosts.pop(key)
        if ghost is not None:
            self._observe(ghost[1], returned=True)
            uses = min(ghost[1] + 1, MAX_USES)
        self._entries[key] = _Entry(info.size, self._worth(info), uses, info.start_position)
        self._used(key)

    def hit(self, key: ObjectKey) -> None:
        entry = self._entries.get(key)
        if entry is not None:
            self._observe(entry.uses, returned=True)
            entry.uses = min(entry.uses + 1, MAX_USES)
            self._used(key)

    def remove(self, key: ObjectKey) -> None:
        if self._entries.pop(key, None) is not None:
            self._compact()

    def evict(self, may_leave: Callable[[ObjectKey], bool]) -> ObjectKey | None:
        stay: list[_Rank] = []
        victim: ObjectKey | None = None
        while self._heap and victim is None:
            item = heapq.heappop(self._heap)
            priority, key = item[0], item[-1]
            entry = self._entries.get(key)
            if entry is None or entry.rank is not item:
                continue
            if may_leave(key):
                victim = key
                self._age = max(self._age, priority)
                del self._entries[key]
                self._ghosts.add(key, entry.size, entry.uses)
            else:
                stay.append(item)
        for item in stay:
            heapq.heappush(self._heap, item)
        return victim

    def remember(self, most: int) -> None:
        self._ghosts.bound(most)

    def __len__(self) -> int:
        return len(self._entries)

    def _used(self, key: ObjectKey) -> None:
        entry = self._entries[key]
        value = entry.worth * entry.uses * self._odds.probability(entry.uses)
        priority = int((self._age + value) * STEPS) / STEPS
        self._turn += 1
        entry.rank = (priority, self._batch_of(entry.size), -entry.position, self._turn, key)
        heapq.heappush(self._heap, entry.rank)
        self._compact()

    def _batch_of(self, size: int) -> int:
        """Of a use of an object of `size` bytes."""
        self._batch_uses += 1
        self._batch_bytes += size
        least, most = self._capacity // 8, self._capacity // 2
        if self._batch_bytes > most or (self._batch_uses > BATCH_USES and self._batch_bytes > least):
            self._batch += 1
            self._batch_uses, self._batch_bytes = 1, size
        return self._batch

    def _compact(self) -> None:
        """Outdated entries never take more than half of the heap."""
        if len(self._heap) > 2 * len(self._entries) + 64:
            self._heap = [entry.rank for entry in self._entries.values() if entry.rank is not None]
            heapq.heapify(self._heap)

    def _worth(self, info: ObjectInfo) -> float:
        """1 for an average object, and for one whose time is not known."""
        if info.recompute_s <= 0.0 or info.size <= 0:
            return 1.0
        cost = info.recompute_s / info.size
        self._usual_cost = cost if self._usual_cost == 0.0 else 0.99 * self._usual_cost + 0.01 * cost
        return min(max(cost / self._usual_cost, 1 / CLIP), CLIP)

    def _forgotten(self, uses: int) -> None:
        self._observe(uses, returned=False)

    def _observe(self, uses: int, returned: bool) -> None:
        self._odds.observe(uses, returned, window=max(2 * len(self._entries), 512))
