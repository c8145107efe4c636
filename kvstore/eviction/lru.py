"""Least recently used."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable

from tandem.kvstore.interfaces import ObjectInfo, ObjectKey


class Lru:
    """The object that was inserted or read longest ago leaves. O(1), plus one step per object that may not leave."""

    def __init__(self) -> None:
        self._order: OrderedDict[ObjectKey, None] = OrderedDict()

    def insert(self, key: ObjectKey, info: ObjectInfo) -> None:
        self._order[key] = None
        self._order.move_to_end(key)

    def hit(self, key: ObjectKey) -> None:
        if key in self._order:
            self._order.move_to_end(key)

    def remove(self, key: ObjectKey) -> None:
        self._order.pop(key, None)

    def evict(self, may_leave: Callable[[ObjectKey], bool]) -> ObjectKey | None:
        """The one that was used longest ago of those that may leave."""
        victim = next((key for key in self._order if may_leave(key)), None)
        if victim is not None:
            del self._order[victim]
        return victim

    def remember(self, most: int) -> None:
        """It remembers none."""

    def __len__(self) -> int:
        return len(self._order)
