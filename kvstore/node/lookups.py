"""Look-ups: where an object can be had, and what is here."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from tandem.kvstore.interfaces import Directory, Located, NodeInfo, ObjectInfo, ObjectKey, TierName
from tandem.kvstore.node.books import Books
from tandem.kvstore.node.finding import choose_peer
from tandem.kvstore.node.host import Phase

_REMOTE_LOOKUP_S = 0.05
"""Longest that `locate` asks a remote tier; what it learns is remembered, so that the next look-up gets further."""


@dataclass(frozen=True, slots=True)
class StoredObject:
    """One object of a node, and the tiers that have it."""

    key: ObjectKey
    info: ObjectInfo
    """Description from the copy in the first of `tiers`; codecs may make the others smaller."""
    tiers: tuple[TierName, ...]


class Lookups:
    """Owns nothing; reads the books under their lock, and asks directory and remote tier without it."""

    def __init__(self, books: Books, directory: Directory | None, own: Callable[[], NodeInfo]) -> None:
        """`directory` None: other nodes cannot be read. `own` is this node as others know it."""
        self._books = books
        self._directory = directory
        self._own = own

    def locate_here(self, keys: Sequence[ObjectKey]) -> list[Located] | None:
        """What `locate` says, if this node has all of them; None: others have to be asked. Never waits."""
        books = self._books
        with books.lock:
            places = [] if books.closed else [self._here(key) for key in keys]
        found = [place for place in places if place is not None]
        return found if len(found) == len(places) else None

    def locate(self, keys: Sequence[ObjectKey]) -> list[Located]:
        """The leading run of `keys` that can be had, cheapest place each: as `HomeNode.locate`."""
        books = self._books
        places: list[Located | None]
        with books.lock:
            if books.closed:
                return []
            places = [self._here(key) for key in keys]
        missing = [index for index, place in enumerate(places) if place is None]
        if missing and self._directory is not None:
            answers = self._directory.lookup([keys[index] for index in missing])
            nodes = self._directory.nodes() if any(answers) else {}
            with books.lock:
                now = books.clock()
                for index, locations in zip(missing, answers, strict=True):
                    places[index] = choose_peer(keys[index], locations, nodes, self._own(), books.avoided, now)
        missing = [index for index, place in enumerate(places) if place is None]
        remote = books.lower.get(TierName.REMOTE)
        if missing and remote is not None:
            infos = remote.infos([keys[index] for index in missing], _REMOTE_LOOKUP_S)
            for index, info in zip(missing, infos, strict=True):
                if info is not None:
                    places[index] = Located(keys[index], TierName.REMOTE, TierName.REMOTE.value, info.size)
        run = [place for place in itertools.takewhile(lambda place: place is not None, places) if place is not None]
        if len(run) < len(keys):
            with books.lock:
                books.counters.misses += len(keys) - len(run)
        return run

    def contains(self, key: ObjectKey) -> list[TierName]:
        """The tiers of this node that have it."""
        books = self._books
        with books.lock:
            here = [TierName.HOST] if books.host.get(key) is not None else []
            return here + [name for name, lower in books.lower.items() if lower.peek(key) is not None]

    def info(self, key: ObjectKey) -> ObjectInfo | None:
        """What the first tier that has the object says of it."""
        books = self._books
        with books.lock:
            item = books.host.get(key)
            if item is not None:
                return item.info
            found = (lower.peek(key) for lower in books.lower.values())
            return next((resident.info for resident in found if resident is not None), None)

    def objects(self) -> list[StoredObject]:
        """Everything this node knows of, in no order."""
        infos: dict[ObjectKey, ObjectInfo] = {}
        tiers: dict[ObjectKey, list[TierName]] = {}
        with self._books.lock:
            for shelf in self._books.shelves():
                for resident in shelf:
                    infos.setdefault(resident.key, resident.info)
                    tiers.setdefault(resident.key, []).append(shelf.name)
        return [StoredObject(key, info, tuple(tiers[key])) for key, info in infos.items()]

    def hot(self, threshold: int) -> dict[ObjectKey, int]:
        """Objects that were fetched or read at least so often of late (counts are halved every minute), and how often;
        most first. They need not be here any more."""
        with self._books.lock:
            return self._books.hot.above(threshold)

    def _here(self, key: ObjectKey) -> Located | None:
        """Host memory, what is on its way there, or the disk. Under the lock."""
        books = self._books
        item = books.host.get(key)
        if item is not None:
            return item.place
        pending = books.host.pending(key)
        if pending is not None and pending.phase is Phase.LOADING:
            return pending.place
        disk = books.lower.get(TierName.DISK)
        resident = disk.peek(key) if disk is not None else None
        if resident is None:
            return None
        return Located(key, TierName.DISK, TierName.DISK.value, resident.info.size)
