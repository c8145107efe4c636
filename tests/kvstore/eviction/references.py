"""The policies once more, in the most obvious way: lists, searched from end to end."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

from tandem.kvstore.eviction import reuse
from tandem.kvstore.interfaces import ObjectInfo, ObjectKey

MayLeave = Callable[[ObjectKey], bool]


class SlowGhosts:
    def __init__(self, limit: int) -> None:
        self.limit = limit
        self.items: list[tuple[ObjectKey, int, int]] = []
        """Key, size, uses; oldest first."""

    def total(self) -> int:
        return sum(size for _, size, _ in self.items)

    def add(self, key: ObjectKey, size: int, uses: int = 0) -> list[int]:
        self.items = [item for item in self.items if item[0] != key]
        self.items.append((key, size, uses))
        return self.trim(self.limit)

    def trim(self, limit: int) -> list[int]:
        dropped = []
        while self.total() > limit:
            dropped.append(self.items.pop(0)[2])
        return dropped

    def take(self, key: ObjectKey) -> int | None:
        found = [item for item in self.items if item[0] == key]
        self.items = [item for item in self.items if item[0] != key]
        return found[0][2] if found else None


class SlowLru:
    def __init__(self, capacity: int) -> None:
        self.order: list[ObjectKey] = []

    def insert(self, key: ObjectKey, info: ObjectInfo) -> None:
        self.remove(key)
        self.order.append(key)

    def hit(self, key: ObjectKey) -> None:
        if key in self.order:
            self.order.remove(key)
            self.order.append(key)

    def remove(self, key: ObjectKey) -> None:
        if key in self.order:
            self.order.remove(key)

    def evict(self, may_leave: MayLeave) -> ObjectKey | None:
        for key in self.order:
            if may_leave(key):
                self.order.remove(key)
                return key
        return None

    def __len__(self) -> int:
        return len(self.order)


@dataclass
class Item:
    key: ObjectKey
    size: int
    reads: int = 0


def without(items: list[Item], key: ObjectKey) -> list[Item]:
    return [item for item in items if item.key != key]


class SlowS3Fifo:
    def __init__(self, capacity: int) -> None:
        self.wanted = int(capacity * 0.1)
        self.small: list[Item] = []
        self.main: list[Item] = []
        self.ghosts = SlowGhosts(capacity - self.wanted)

    def insert(self, key: ObjectKey, info: ObjectInfo) -> None:
        self.remove(key)
        queue = self.small if self.ghosts.take(key) is None else self.main
        queue.append(Item(key, info.size))

    def hit(self, key: ObjectKey) -> None:
        for item in self.small + self.main:
            if item.key == key:
                item.reads = min(item.reads + 1, 3)

    def remove(self, key: ObjectKey) -> None:
        self.small = without(self.small, key)
        self.main = without(self.main, key)

    def evict(self, may_leave: MayLeave) -> ObjectKey | None:
        small_first = sum(item.size for item in self.small) >= self.wanted
        order = [self.from_small, self.from_main] if small_first else [self.from_main, self.from_small, self.from_main]
        return next((victim for search in order if (victim := search(may_leave)) is not None), None)

    def from_small(self, may_leave: MayLeave) -> ObjectKey | None:
        for item in list(self.small):
            self.small.remove(item)
            if item.reads >= 2:
                self.main.append(Item(item.key, item.size))
            elif may_leave(item.key):
                self.ghosts.add(item.key, item.size)
                return item.key
            else:
                self.small.append(item)
        return None

    def from_main(self, may_leave: MayLeave) -> ObjectKey | None:
        stuck = 0
        while stuck < len(self.main):
            item = self.main.pop(0)
            if item.reads == 0 and may_leave(item.key):
                return item.key
            stuck = 0 if item.reads else stuck + 1
            self.main.append(Item(item.key, item.size, max(item.reads - 1, 0)))
        return None

    def __len__(self) -> int:
        return len(self.small) + len(self.main)


class SlowArc:
    def __init__(self, capacity: int) -> None:
        self.capacity = capacity
        self.once: list[Item] = []
        self.often: list[Item] = []
        self.once_ghosts = SlowGhosts(capacity)
        self.often_ghosts = SlowGhosts(capacity)
        self.wanted = 0.0

    def insert(self, key: ObjectKey, info: ObjectInfo) -> None:
        self.remove(key)
        b1, b2 = self.once_ghosts.total(), self.often_ghosts.total()
        item = Item(key, info.size)
        if self.once_ghosts.take(key) is not None:
            self.wanted = min(self.wanted + info.size * max(1.0, b2 / b1), float(self.capacity))
            self.often.append(item)
        elif self.often_ghosts.take(key) is not None:
            self.wanted = max(self.wanted - info.size * max(1.0, b1 / b2), 0.0)
            self.often.append(item)
        else:
            self.once.append(item)
        self.trim()

    def hit(self, key: ObjectKey) -> None:
        found = [item for item in self.once + self.often if item.key == key]
        self.remove(key)
        self.often += found

    def remove(self, key: ObjectKey) -> None:
        self.once = without(self.once, key)
        self.often = without(self.often, key)

    def evict(self, may_leave: MayLeave) -> ObjectKey | None:
        once_first = sum(item.size for item in self.once) > self.wanted
        for item in self.once + self.often if once_first else self.often + self.once:
            if may_leave(item.key):
                (self.once_ghosts if item in self.once else self.often_ghosts).add(item.key, item.size)
                self.remove(item.key)
                self.trim()
                return item.key
        return None

    def trim(self) -> None:
        t1 = sum(item.size for item in self.once)
        t2 = sum(item.size for item in self.often)
        self.once_ghosts.trim(max(self.capacity - t1, 0))
        self.often_ghosts.trim(max(2 * self.capacity - t1 - t2 - self.once_ghosts.total(), 0))

    def __len__(self) -> int:
        return len(self.once) + len(self.often)


class SlowMarking:
    """`reads` 1: predicted to return. Order: least recently used first."""

    def __init__(self, capacity: int) -> None:
        self.items: list[Item] = []
        self.marked: set[ObjectKey] = set()
        self.ghosts = SlowGhosts(capacity)

    def insert(self, key: ObjectKey, info: ObjectInfo) -> None:
        self.remove(key)
        self.items.append(Item(key, info.size, int(self.ghosts.take(key) is not None)))
        self.marked.add(key)

    def hit(self, key: ObjectKey) -> None:
        for item in [item for item in self.items if item.key == key]:
            self.remove(key)
            self.items.append(Item(key, item.size, 1))
            self.marked.add(key)

    def remove(self, key: ObjectKey) -> None:
        self.items = without(self.items, key)
        self.marked.discard(key)

    def evict(self, may_leave: MayLeave) -> ObjectKey | None:
        for phase_ended in (False, True):
            if phase_ended:
                self.marked.clear()
            for predicted in (0, 1):
                for item in self.items:
                    if item.reads == predicted and item.key not in self.marked and may_leave(item.key):
                        self.ghosts.add(item.key, item.size)
                        self.remove(item.key)
                        return item.key
        return None

    def __len__(self) -> int:
        return len(self.items)


@dataclass
class Valued:
    key: ObjectKey
    size: int
    worth: float
    uses: int
    position: int
    rank: tuple[float, int, int, int] = (0.0, 0, 0, 0)


class SlowCost:
    def __init__(self, capacity: int) -> None:
        self.capacity = capacity
        self.items: list[Valued] = []
        self.ghosts = SlowGhosts(4 * capacity)
        self.returned = dict.fromkeys(range(1, 11), 0.0)
        self.observed = dict.fromkeys(range(1, 11), 0.0)
        self.since_halving = 0
        self.age = 0.0
        self.turn = 0
        self.batch = 0
        self.sizes_of_batch: list[int] = []
        self.usual = 0.0

    def observe(self, uses: int, returned: bool, residents: int) -> None:
        self.returned[uses] += returned
        self.observed[uses] += 1
        self.since_halving += 1
        if self.since_halving >= max(2 * residents, 512):
            self.since_halving = 0
            for count in self.returned:
                self.returned[count] /= 2
                self.observed[count] /= 2

    def insert(self, key: ObjectKey, info: ObjectInfo) -> None:
        self.remove(key)
        uses = self.ghosts.take(key)
        if uses is not None:
            self.observe(uses, True, len(self.items))
        worth = 1.0
        if info.recompute_s > 0:
            cost = info.recompute_s / info.size
            self.usual = 0.99 * self.usual + 0.01 * cost if self.usual else cost
            worth = min(max(cost / self.usual, 1 / 16), 16.0)
        uses = 1 if uses is None else min(uses + 1, 10)
        self.items.append(Valued(key, info.size, worth, uses, info.start_position))
        self.use(self.items[-1])

    def use(self, item: Valued) -> None:
        likely = (self.returned[item.uses] + 1.5) / (self.observed[item.uses] + 3.0)
        self.turn += 1
        self.sizes_of_batch.append(item.size)
        used = sum(self.sizes_of_batch)
        if used > self.capacity // 2 or (used > self.capacity // 8 and len(self.sizes_of_batch) > 512):
            self.batch += 1
            self.sizes_of_batch = [item.size]
        step = int((self.age + item.worth * item.uses * likely) * 8) / 8
        item.rank = (step, self.batch, -item.position, self.turn)

    def hit(self, key: ObjectKey) -> None:
        for item in self.items:
            if item.key == key:
                self.observe(item.uses, True, len(self.items))
                item.uses = min(item.uses + 1, 10)
                self.use(item)

    def remove(self, key: ObjectKey) -> None:
        self.items = [item for item in self.items if item.key != key]

    def evict(self, may_leave: MayLeave) -> ObjectKey | None:
        for item in sorted(self.items, key=lambda each: each.rank):
            if may_leave(item.key):
                self.remove(item.key)
                self.age = max(self.age, item.rank[0])
                for uses in self.ghosts.add(item.key, item.size, item.uses):
                    self.observe(uses, False, len(self.items))
                return item.key
        return None

    def __len__(self) -> int:
        return len(self.items)


@dataclass
class Chunk:
    key: ObjectKey
    size: int
    uses: int
    used_at: int
    worth: int
    order: tuple[int, int, int]


@dataclass
class Observation:
    use_class: int
    step: int
    reused: bool
    weight: float = 1.0


class SlowReuse:
    """Keeps every observation and sums over all of them. The constants are those of the module, so that a test can
    make them small."""

    def __init__(self, capacity: int) -> None:
        self.capacity = capacity
        self.items: list[Chunk] = []
        self.ghosts: list[Chunk] = []
        self.clock = self.turn = self.fresh = 0
        self.batch = self.in_batch = self.last_position = 0
        self.usual = 0.0
        self.seen: list[Observation] = []
        self.learned: list[Observation] = []

    def use_class(self, uses: int) -> int:
        return max(index for index, least in enumerate(reuse.USE_CLASSES) if uses >= least)

    def step(self, age: int) -> int:
        return min(int(4 * math.log2(age / max(self.capacity / 64, 1.0) + 1.0)), 63)

    def observe(self, chunk: Chunk, reused: bool) -> None:
        self.seen.append(Observation(self.use_class(chunk.uses), self.step(self.clock - chunk.used_at), reused))
        self.fresh += 1
        if self.fresh >= max(len(self.items) // 4, reuse.LEAST_OBSERVATIONS):
            self.fresh = 0
            self.learned = [Observation(o.use_class, o.step, o.reused, o.weight) for o in self.seen]
            for each in self.seen:
                each.weight *= 0.97

    def uses(self, step: int, use_class: int | None = None) -> float:
        return sum(o.weight for o in self.learned if o.reused and o.step == step and use_class in (None, o.use_class))

    def time(self, step: int, use_class: int | None = None) -> float:
        width = 2 ** ((step + 1) / 4) - 2 ** (step / 4)
        return sum(
            o.weight * width * (1.0 if o.step > step else 0.5)
            for o in self.learned
            if o.step >= step and use_class in (None, o.use_class)
        )

    def tables(self) -> tuple[list[float], list[float]]:
        """Rates by age, from the definition of isotonic regression, and factors by class."""
        if not self.learned:
            return [1.0] * 64, [1.0] * len(reuse.USE_CLASSES)
        uses, times = [self.uses(step) for step in range(64)], [self.time(step) for step in range(64)]

        def average(first: int, last: int) -> float:
            time = sum(times[first : last + 1])
            return sum(uses[first : last + 1]) / time if time else 0.0

        oldest = max(o.step for o in self.learned)
        curve = [
            min(max(average(first, last) for last in range(step, oldest + 1)) for first in range(step + 1))
            for step in range(oldest + 1)
        ]
        factors = []
        for use_class in range(len(reuse.USE_CLASSES)):
            own = sum(self.uses(step, use_class) for step in range(64))
            expected = sum(
                uses[step] / times[step] * self.time(step, use_class) for step in range(64) if times[step] > 0
            )
            factors.append(math.sqrt((own + reuse.DOUBT) / (expected + reuse.DOUBT)))
        return curve + [0.0] * (63 - oldest), factors

    def insert(self, key: ObjectKey, info: ObjectInfo) -> None:
        self.remove(key)
        self.clock += info.size
        uses = 1
        for ghost in [ghost for ghost in self.ghosts if ghost.key == key]:
            self.ghosts.remove(ghost)
            self.observe(ghost, True)
            uses = ghost.uses + 1
        worth = 0
        if info.recompute_s > 0:
            cost = info.recompute_s / info.size
            self.usual = 0.99 * self.usual + 0.01 * cost if self.usual else cost
            worth = min(max(round(math.log2(cost / self.usual)), -4), 4)
        self.use(Chunk(key, info.size, uses, 0, worth, (0, -info.start_position, 0)))

    def use(self, chunk: Chunk) -> None:
        self.turn += 1
        position = -chunk.order[1]
        if position <= self.last_position and self.in_batch >= self.capacity // 32:
            self.batch += 1
            self.in_batch = 0
        self.in_batch += chunk.size
        self.last_position = position
        chunk.used_at, chunk.order = self.clock, (self.batch, -position, self.turn)
        self.items.append(chunk)

    def hit(self, key: ObjectKey) -> None:
        for chunk in [chunk for chunk in self.items if chunk.key == key]:
            self.clock += chunk.size
            self.observe(chunk, True)
            self.items.remove(chunk)
            chunk.uses += 1
            self.use(chunk)

    def remove(self, key: ObjectKey) -> None:
        self.items = [chunk for chunk in self.items if chunk.key != key]

    def values(self, may_leave: MayLeave) -> dict[ObjectKey, tuple[float, int]]:
        """Of the first that may leave in each queue: value and last use. The least leaves."""
        curve, factors = self.tables()
        heads: dict[tuple[int, int], Chunk] = {}
        for chunk in sorted(self.items, key=lambda each: each.order):
            if may_leave(chunk.key):
                heads.setdefault((self.use_class(chunk.uses), chunk.worth), chunk)
        return {
            chunk.key: (2.0**worth * factors[use_class] * curve[self.step(self.clock - chunk.used_at)], chunk.used_at)
            for (use_class, worth), chunk in heads.items()
        }

    def left(self, key: ObjectKey) -> None:
        chunk = next(chunk for chunk in self.items if chunk.key == key)
        self.items.remove(chunk)
        self.ghosts.append(chunk)
        while len(self.ghosts) > reuse.LEAST_GHOSTS and sum(each.size for each in self.ghosts) > 2 * self.capacity:
            self.observe(self.ghosts.pop(0), False)

    def evict(self, may_leave: MayLeave) -> ObjectKey | None:
        values = self.values(may_leave)
        if not values:
            return None
        victim = min(values, key=lambda key: values[key])
        self.left(victim)
        return victim

    def __len__(self) -> int:
        return len(self.items)


REFERENCES = {
    "lru": SlowLru,
    "s3fifo": SlowS3Fifo,
    "arc": SlowArc,
    "marking": SlowMarking,
    "cost": SlowCost,
    "reuse": SlowReuse,
}
