"""What was put in latest, up to a weight, of which no owner takes more than half: nobody's entries go because of one
other who brings many."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator
from typing import Generic, TypeVar

K = TypeVar("K")
V = TypeVar("V")


class FairCache(Generic[K, V]):
    """Not thread-safe."""

    def __init__(self, capacity: int) -> None:
        """`capacity`: the weight of all entries together."""
        self._capacity = capacity
        self._entries: OrderedDict[tuple[str, K], tuple[V, int]] = OrderedDict()
        """The oldest first."""
        self._weight = 0
        self._keys: dict[str, OrderedDict[K, None]] = {}
        """Keys of each owner, in the same order."""
        self._weights: dict[str, int] = {}
        """Weight of each owner's entries."""

    def __len__(self) -> int:
        return len(self._entries)

    def get(self, owner: str, key: K) -> V | None:
        entry = self._entries.get((owner, key))
        return entry[0] if entry is not None else None

    def newest(self) -> Iterator[tuple[K, V]]:
        """Entries of all owners, the newest first."""
        return ((key, value) for (_, key), (value, _) in reversed(self._entries.items()))

    def put(self, owner: str, key: K, value: V, weight: int = 1) -> None:
        """Replaces what is there. An entry of more than half the capacity is not kept."""
        self.pop(owner, key)
        self._entries[owner, key] = value, weight
        self._weight += weight
        self._keys.setdefault(owner, OrderedDict())[key] = None
        self._weights[owner] = self._weights.get(owner, 0) + weight
        while self._weights.get(owner, 0) > self._capacity // 2:
            self.pop(owner, next(iter(self._keys[owner])))
        while self._weight > self._capacity:
            self.pop(*next(iter(self._entries)))

    def pop(self, owner: str, key: K) -> None:
        """Nothing happens where it is not there."""
        entry = self._entries.pop((owner, key), None)
        if entry is None:
            return
        self._weight -= entry[1]
        self._weights[owner] -= entry[1]
        del self._keys[owner][key]
        if not self._keys[owner]:
            del self._keys[owner], self._weights[owner]
