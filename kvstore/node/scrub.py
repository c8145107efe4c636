"""Scrub: reads what the node has, a part at a time, and drops what is wrong."""

from __future__ import annotations

from tandem.kvstore.interfaces import ObjectKey, TierName
from tandem.kvstore.node import content
from tandem.kvstore.node.books import Books
from tandem.kvstore.node.stats import ScrubReport
from tandem.kvstore.node.views import Views


class Scrub:
    """Owns where the last pass stopped; one caller at a time."""

    def __init__(self, books: Books, views: Views) -> None:
        self._books = books
        self._views = views
        self._reached: tuple[bytes, str] = (b"", "")
        """Key and tier of the last object that was looked at."""

    def run(self, limit: int) -> ScrubReport:
        """Reads at most `limit` objects of host memory and disk, from where the last call stopped and around, and
        checks all checksums; what is wrong is quarantined."""
        books = self._books
        with books.lock:
            shelves = [shelf for shelf in books.shelves() if shelf.name is not TierName.REMOTE]
            todo = sorted((resident.key, shelf.name) for shelf in shelves for resident in shelf)
        later = [place for place in todo if place > self._reached]
        chosen = (later + todo[: len(todo) - len(later)])[:limit]
        bad: list[bytes] = []
        unread = checked_bytes = 0
        for key, tier in chosen:
            outcome = self._check_host(key) if tier is TierName.HOST else self._check_disk(key)
            if outcome is None:
                unread += 1
            elif outcome < 0:
                bad.append(key)
                books.quarantine(key, f"scrub of {tier}: a checksum is wrong")
            else:
                checked_bytes += outcome
            self._reached = (key, tier)
        return ScrubReport(checked=len(chosen) - unread, checked_bytes=checked_bytes, bad=tuple(bad), unread=unread)

    def _check_host(self, key: ObjectKey) -> int | None:
        """Bytes that are sound; -1: wrong; None: it left."""
        with self._views.view(key, counts=False) as whole:
            if whole is None:
                return None
            return len(whole) if content.is_sound(whole) else -1

    def _check_disk(self, key: ObjectKey) -> int | None:
        """Bytes that are sound; -1: wrong; None: it left, or could not be read and was dropped."""
        disk = self._books.lower[TierName.DISK]
        info = disk.info(key)
        if info is None:
            return None
        whole = memoryview(bytearray(info.size))
        if not disk.read(key, 0, whole):
            disk.drop(key)
            self._books.announcer.publish()
            return None
        return len(whole) if content.is_sound(whole) else -1
