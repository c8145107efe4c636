"""What a shared remote tier holds, as far as this process knows: other processes put and delete there, too.

A hint for `used_bytes` and for refusing what would not fit. It is right after `recount`, corrected by everything that
this process does or finds missing, and counted again (not too often) before a put is refused.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterable

from tandem.kvstore.interfaces import ObjectKey

RECOUNT_INTERVAL_S = 30.0
"""A count walks through everything that is stored."""


class Books:
    """Sizes of the objects in a shared tier, and whether more fit. For any thread."""

    def __init__(self, capacity_bytes: int, sizes: Callable[[], Iterable[tuple[ObjectKey, int]] | None]) -> None:
        """`sizes` lists every object with the bytes that it takes up; None if that cannot be known now."""
        self.capacity_bytes = capacity_bytes
        self._sizes = sizes
        self._lock = threading.Lock()
        self._known: dict[ObjectKey, int] = {}
        self._used = 0
        self._counted_at = float("-inf")

    @property
    def used_bytes(self) -> int:
        return self._used

    def stored(self, key: ObjectKey, size: int) -> None:
        with self._lock:
            self._used += size - self._known.get(key, 0)
            self._known[key] = size

    def missing(self, key: ObjectKey) -> None:
        with self._lock:
            self._used -= self._known.pop(key, 0)

    def has_room(self, key: ObjectKey, size: int) -> bool:
        """Whether `size` bytes fit in the place of what `key` may have now."""
        if size > self.capacity_bytes:
            return False
        if self._counted_at == float("-inf"):
            self.recount()
        if self._fits(key, size):
            return True
        if time.monotonic() < self._counted_at + RECOUNT_INTERVAL_S:
            return False
        self.recount()
        return self._fits(key, size)

    def recount(self) -> None:
        """Keys that come or go meanwhile may be missed until the next count."""
        listed = self._sizes()
        if listed is None:
            return
        known = dict(listed)
        with self._lock:
            self._known = known
            self._used = sum(known.values())
            self._counted_at = time.monotonic()

    def _fits(self, key: ObjectKey, size: int) -> bool:
        with self._lock:
            return self._used - self._known.get(key, 0) + size <= self.capacity_bytes
