"""Objects that have left a tier, remembered for a while: shared by the policies."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from typing import Generic, TypeVar

from tandem.kvstore.interfaces import ObjectKey

Note = TypeVar("Note")

MAX_GHOSTS = 1 << 18
"""Some 50 MB of keys at worst, however small the objects are."""


class Ghosts(Generic[Note]):
    """Keys with their sizes and a note each, oldest first. Bounded in the bytes that the objects had, and in number."""

    def __init__(self, limit_bytes: int, forgotten: Callable[[Note], None] | None = None, least: int = 0) -> None:
        """`forgotten` is told the note of a key that is dropped for want of room. `least` keys are kept, whatever their
        bytes."""
        self.limit_bytes = limit_bytes
        self._least = least
        self._most = MAX_GHOSTS
        self.used_bytes = 0
        self._forgotten = forgotten
        self._entries: OrderedDict[ObjectKey, tuple[int, Note]] = OrderedDict()

    def add(self, key: ObjectKey, size: int, note: Note) -> None:
        """Remembers an object that left, as the latest."""
        self.pop(key)
        self._entries[key] = (size, note)
        self.used_bytes += size
        self.trim(self.limit_bytes)

    def pop(self, key: ObjectKey) -> tuple[int, Note] | None:
        """Size and note."""
        entry = self._entries.pop(key, None)
        if entry is not None:
            self.used_bytes -= entry[0]
        return entry

    def trim(self, limit_bytes: int) -> None:
        """Drops the oldest until they are within `limit_bytes`, but for the `least` latest."""
        least = min(self._least, self._most)
        while len(self._entries) > (least if self.used_bytes > limit_bytes else self._most):
            _, (size, note) = self._entries.popitem(last=False)
            self.used_bytes -= size
            if self._forgotten is not None:
                self._forgotten(note)

    def bound(self, most: int) -> None:
        """Keeps no more than `most` from now on; that may be raised again."""
        self._most = most
        self.trim(self.limit_bytes)

    def __contains__(self, key: ObjectKey) -> bool:
        return key in self._entries

    def __len__(self) -> int:
        return len(self._entries)
