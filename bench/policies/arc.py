"""ARC, adaptive replacement cache (Megiddo and Modha, FAST 2003), counted in bytes."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable

from tandem.kvstore.eviction.ghosts import Ghosts
from tandem.kvstore.interfaces import ObjectInfo, ObjectKey


class _Sizes:
    """Residents in order of last use, with their bytes."""

    def __init__(self) -> None:
        self.sizes: OrderedDict[ObjectKey, int] = OrderedDict()
        self.total = 0

    def add(self, key: ObjectKey, size: int) -> None:
        self.sizes[key] = size
        self.total += size

    def pop(self, key: ObjectKey) -> int:
        size = self.sizes.pop(key)
        self.total -= size
        return size


class Arc:
    """Objects seen once and objects seen again each have a list in order of last use. A target divides the tier
    between the lists and follows what comes back shortly after it has left. All O(1), plus one step per object that
    may not leave.

    The paper adapts the target before it makes room for the object that caused it; here an object is inserted when
    there is room already, so the target takes effect one eviction later.
    """

    def __init__(self, capacity_bytes: int) -> None:
        self._capacity = capacity_bytes
        self._once = _Sizes()
        self._often = _Sizes()
        self._once_ghosts: Ghosts[None] = Ghosts(capacity_bytes)
        self._often_ghosts: Ghosts[None] = Ghosts(capacity_bytes)
        self._once_wanted = 0.0

    def insert(self, key: ObjectKey, info: ObjectInfo) -> None:
        self.remove(key)
        size = info.size
        once_ghosts, often_ghosts = self._once_ghosts.used_bytes, self._often_ghosts.used_bytes
        if self._once_ghosts.pop(key) is not None:
            step = size * max(1.0, often_ghosts / once_ghosts)
            self._once_wanted = min(self._once_wanted + step, float(self._capacity))
            self._often.add(key, size)
        elif self._often_ghosts.pop(key) is not None:
            step = size * max(1.0, once_ghosts / often_ghosts)
            self._once_wanted = max(self._once_wanted - step, 0.0)
            self._often.add(key, size)
        else:
            self._once.add(key, size)
        self._trim_ghosts()

    def hit(self, key: ObjectKey) -> None:
        if key in self._often.sizes:
            self._often.sizes.move_to_end(key)
        elif key in self._once.sizes:
            self._often.add(key, self._once.pop(key))

    def remove(self, key: ObjectKey) -> None:
        for part in (self._once, self._often):
            if key in part.sizes:
                part.pop(key)

    def evict(self, may_leave: Callable[[ObjectKey], bool]) -> ObjectKey | None:
        parts = [(self._once, self._once_ghosts), (self._often, self._often_ghosts)]
        if self._once.total <= self._once_wanted:
            parts.reverse()
        for part, ghosts in parts:
            victim = next((key for key in part.sizes if may_leave(key)), None)
            if victim is not None:
                ghosts.add(victim, part.pop(victim), None)
                self._trim_ghosts()
                return victim
        return None

    def remember(self, most: int) -> None:
        self._once_ghosts.bound(most // 2)
        self._often_ghosts.bound(most // 2)

    def __len__(self) -> int:
        return len(self._once.sizes) + len(self._often.sizes)

    def _trim_ghosts(self) -> None:
        """The paper's bounds: what was seen once, with its ghosts, fills one tier; everything fills two."""
        self._once_ghosts.trim(max(self._capacity - self._once.total, 0))
        residents = self._once.total + self._often.total
        self._often_ghosts.trim(max(2 * self._capacity - residents - self._once_ghosts.used_bytes, 0))
