"""Eviction by learned reuse: the object leaves whose next use is least to be expected, per byte and cost.

Hit density by age and class is LHD's idea (Beckmann, Chen and Cidon, NSDI 2018); to learn it from few observations, all
classes share one curve over age and differ by a factor, as in Cox's proportional hazards (1972).
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TypeAlias

from tandem.kvstore.eviction.ghosts import Ghosts
from tandem.kvstore.interfaces import ObjectInfo, ObjectKey

USE_CLASSES = (1, 2, 3, 4, 5, 7)
"""Uses from which on an object belongs to the next class."""
AGES = 64
AGES_PER_DOUBLING = 4
AGE_UNIT = 64
"""Ages are counted in bytes that were used meanwhile, from 1/64 of the capacity on in steps of a quarter of a doubling.
The last step begins at some 800 capacities."""
KEEP = 0.97
"""What is left of an observation whenever the rates are learned anew."""
LEAST_OBSERVATIONS = 256
"""The rates are learned anew after as many observations as a quarter of the objects, and no fewer than this."""
DOUBT = 20.0
"""A class counts as average until it has more uses than so many."""
GHOST_CAPACITIES = 2
LEAST_GHOSTS = 1 << 14
"""A small tier remembers more than it ever held: conversations take longer between turns than their KV stays."""
BATCH_SHARE = 32
"""A batch is at least 1/32 of the capacity in uses, and ends with a prompt: requests that are stored at the same time
mix their chunks. Within it, what lies deepest in its prompt leaves first, so that what is left of a chain is of use."""
CLIP = 4
"""No object is worth more than 2^4 times (or less than 2^-4 of) the average per byte: times are measured, and can be
off."""


class ReuseRates:
    """Uses to expect of an object in the next moment, by how often it was used and how long ago.

    Whoever is used again, or forgotten, is an observation: exposed for its age, with or without a use at its end.
    """

    def __init__(self, unit: float) -> None:
        """`unit`: ages are resolved down to this."""
        self._unit = unit
        self._reused = [[0.0] * AGES for _ in USE_CLASSES]
        self._ended = [[0.0] * AGES for _ in USE_CLASSES]
        """Weights of observations, used again or not, by age."""
        self._curve = [1.0] * AGES
        self._factors = [1.0] * len(USE_CLASSES)

    def observe(self, use_class: int, age: int, *, reused: bool) -> None:
        """Counts one that was used again, or forgotten, at `age`."""
        step = self._step(age)
        self._ended[use_class][step] += 1.0
        if reused:
            self._reused[use_class][step] += 1.0

    def rate(self, use_class: int, age: int) -> float:
        """Relative. Does not rise with age."""
        return self._factors[use_class] * self._curve[self._step(age)]

    def learn(self) -> None:
        """Fits curve and factors to what was observed, and lets that fade."""
        exposed = [exposure(ended) for ended in self._ended]
        uses_at = [sum(weights) for weights in zip(*self._reused, strict=True)]
        exposed_at = [sum(times) for times in zip(*exposed, strict=True)]
        self._curve = falling_rates(uses_at, exposed_at)
        usual = [uses / time if time > 0.0 else 0.0 for uses, time in zip(uses_at, exposed_at, strict=True)]
        for use_class, times in enumerate(exposed):
            expected = sum(rate * time for rate, time in zip(usual, times, strict=True))
            # The root: those who were used often are so partly by chance.
            self._factors[use_class] = math.sqrt((sum(self._reused[use_class]) + DOUBT) / (expected + DOUBT))
        for table in (*self._reused, *self._ended):
            table[:] = [KEEP * weight for weight in table]

    def _step(self, age: int) -> int:
        return min(int(AGES_PER_DOUBLING * math.log2(age / self._unit + 1.0)), AGES - 1)


def exposure(ended: Sequence[float]) -> list[float]:
    """Time spent at each age by those who reached it, given the weights of those whose time ended there (half-way)."""
    times = [0.0] * len(ended)
    older = 0.0
    for step in range(len(ended) - 1, -1, -1):
        width = 2.0 ** ((step + 1) / AGES_PER_DOUBLING) - 2.0 ** (step / AGES_PER_DOUBLING)
        times[step] = (older + ended[step] / 2) * width
        older += ended[step]
    return times


def falling_rates(uses: Sequence[float], times: Sequence[float]) -> list[float]:
    """Uses per time by age, averaged over neighbours so that they never rise: isotonic regression by pooling adjacent
    violators (Ayer et al., 1955). Something that is worth most later has to be kept until then."""
    pools: list[tuple[float, float, int]] = []
    for use, time in zip(uses, times, strict=True):
        pool = (use, time, 1)
        while pools and pools[-1][0] * pool[1] < pool[0] * pools[-1][1]:
            before = pools.pop()
            pool = (before[0] + pool[0], before[1] + pool[1], before[2] + pool[2])
        pools.append(pool)
    return [use / time if time > 0.0 else 0.0 for use, time, count in pools for _ in range(count)]


_Rank: TypeAlias = tuple[int, int, int, ObjectKey]
"""Batch, deepest first, oldest first. The least leaves first."""


@dataclass(slots=True)
class _Entry:
    size: int
    uses: int
    position: int
    worth: int
    """Binary logarithm of its recompute time per byte over that of an average object, rounded."""
    used_at: int
    rank: _Rank
    """Its live entry in its queue, as against outdated ones."""


class Reuse:
    """Objects of one class of uses and one worth queue by their last use. Of the heads of the queues the one with the
    least `worth * rate(class, age)` leaves. Uses survive in ghosts. O(log n) a use; eviction is O(queues + log n), plus
    as much per object that may not leave; there are as many queues as classes where all chunks are worth the same."""

    def __init__(self, capacity_bytes: int) -> None:
        self._entries: dict[ObjectKey, _Entry] = {}
        self._queues: dict[tuple[int, int], list[_Rank]] = {}
        """Heaps, by class and worth."""
        self._queued = 0
        self._ghosts: Ghosts[tuple[int, int]] = Ghosts(GHOST_CAPACITIES * capacity_bytes, self._forgotten, LEAST_GHOSTS)
        """Uses, and when the last one was."""
        self._rates = ReuseRates(max(capacity_bytes / AGE_UNIT, 1.0))
        self._fresh = 0
        self._clock = 0
        """Bytes used so far."""
        self._turn = 0
        self._least_batch = capacity_bytes // BATCH_SHARE
        self._batch = self._batch_bytes = 0
        self._last_position = 0
        self._usual_cost = 0.0
        """Seconds per byte, of recent inserts."""

    def insert(self, key: ObjectKey, info: ObjectInfo) -> None:
        """Takes in an object; its uses go on where its ghost is still there."""
        self.remove(key)
        self._clock += info.size
        uses = 1
        ghost = self._ghosts.pop(key)
        if ghost is not None:
            uses, used_at = ghost[1]
            self._observe(uses, used_at, reused=True)
            uses += 1
        self._queue(key, info.size, uses, info.start_position, self._worth(info))

    def hit(self, key: ObjectKey) -> None:
        """Counts a use. Unknown keys are ignored."""
        entry = self._entries.get(key)
        if entry is not None:
            self._clock += entry.size
            self._observe(entry.uses, entry.used_at, reused=True)
            self._queue(key, entry.size, entry.uses + 1, entry.position, entry.worth)

    def remove(self, key: ObjectKey) -> None:
        if self._entries.pop(key, None) is not None:
            self._compact()

    def evict(self, may_leave: Callable[[ObjectKey], bool]) -> ObjectKey | None:
        """The head of a queue whose next use is least to be expected."""
        stay: list[tuple[list[_Rank], _Rank]] = []
        queue = self._next(may_leave, stay)
        victim: ObjectKey | None = None
        if queue is not None:
            victim = heapq.heappop(queue)[-1]
            self._queued -= 1
            entry = self._entries.pop(victim)
            self._ghosts.add(victim, entry.size, (entry.uses, entry.used_at))
        for blocked, rank in stay:
            heapq.heappush(blocked, rank)
        return victim

    def remember(self, most: int) -> None:
        self._ghosts.bound(most)

    def __len__(self) -> int:
        return len(self._entries)

    def _next(
        self, may_leave: Callable[[ObjectKey], bool], stay: list[tuple[list[_Rank], _Rank]]
    ) -> list[_Rank] | None:
        """The queue whose head leaves; among equals, the one that was used longest ago. Heads that may not leave are
        moved to `stay`: a queue is judged by the first that may, as what lies behind can have been used earlier."""
        chosen: list[_Rank] | None = None
        least = (math.inf, 0)
        for (use_class, worth), queue in self._queues.items():
            while queue:
                rank = queue[0]
                live = self._is_live(rank)
                if live and may_leave(rank[-1]):
                    break
                heapq.heappop(queue)
                if live:
                    stay.append((queue, rank))
                else:
                    self._queued -= 1
            if queue:
                used_at = self._entries[queue[0][-1]].used_at
                value = 2.0**worth * self._rates.rate(use_class, self._clock - used_at), used_at
                if value < least:
                    chosen, least = queue, value
        return chosen

    def _queue(self, key: ObjectKey, size: int, uses: int, position: int, worth: int) -> None:
        self._turn += 1
        rank = (self._batch_of(size, position), -position, self._turn, key)
        self._entries[key] = _Entry(size, uses, position, worth, self._clock, rank)
        heapq.heappush(self._queues.setdefault((class_of(uses), worth), []), rank)
        self._queued += 1
        self._compact()

    def _batch_of(self, size: int, position: int) -> int:
        if position <= self._last_position and self._batch_bytes >= self._least_batch:
            self._batch += 1
            self._batch_bytes = 0
        self._batch_bytes += size
        self._last_position = position
        return self._batch

    def _is_live(self, rank: _Rank) -> bool:
        entry = self._entries.get(rank[-1])
        return entry is not None and entry.rank is rank

    def _compact(self) -> None:
        """Outdated entries never take more than half of the queues."""
        if self._queued > 2 * len(self._entries) + 64:
            self._queues.clear()
            for entry in self._entries.values():
                self._queues.setdefault((class_of(entry.uses), entry.worth), []).append(entry.rank)
            for queue in self._queues.values():
                heapq.heapify(queue)
            self._queued = len(self._entries)

    def _worth(self, info: ObjectInfo) -> int:
        """0 for an average object, and for one whose time is not known."""
        if info.recompute_s <= 0.0 or info.size <= 0:
            return 0
        cost = info.recompute_s / info.size
        self._usual_cost = cost if self._usual_cost == 0.0 else 0.99 * self._usual_cost + 0.01 * cost
        return min(max(round(math.log2(cost / self._usual_cost)), -CLIP), CLIP)

    def _forgotten(self, ghost: tuple[int, int]) -> None:
        self._observe(*ghost, reused=False)

    def _observe(self, uses: int, used_at: int, *, reused: bool) -> None:
        self._rates.observe(class_of(uses), self._clock - used_at, reused=reused)
        self._fresh += 1
        if self._fresh >= max(len(self._entries) // 4, LEAST_OBSERVATIONS):
            self._fresh = 0
            self._rates.learn()


_CLASSES = tuple(sum(uses >= least for least in USE_CLASSES) - 1 for uses in range(USE_CLASSES[-1] + 1))


def class_of(uses: int) -> int:
    """Index of the class of an object that was used so often, at least once."""
    return _CLASSES[min(uses, USE_CLASSES[-1])]
