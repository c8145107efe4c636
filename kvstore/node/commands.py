"""What operators and named contexts order: pins, moves, and forgetting."""

from __future__ import annotations

from tandem.kvstore.interfaces import ObjectKey, TierName
from tandem.kvstore.node.books import LOWER_TIERS, Books
from tandem.kvstore.node.fetch import NodeFetch
from tandem.kvstore.node.fetches import Fetches
from tandem.kvstore.node.index import Pin
from tandem.kvstore.node.lookups import Lookups
from tandem.kvstore.node.settings import READ_LEASE_S
from tandem.kvstore.node.write_backs import WriteBacks

_MOVE_S = 30.0
_ALL_LAYERS = 1 << 30


class Commands:
    """Owns nothing; changes the books under their lock, and tiers without it."""

    def __init__(self, books: Books, lookups: Lookups, fetches: Fetches, write_backs: WriteBacks) -> None:
        self._books = books
        self._lookups = lookups
        self._fetches = fetches
        self._write_backs = write_backs

    def pin(self, key: ObjectKey, owner: str, ttl_s: float | None, hard: bool) -> bool:
        """Keeps the object in the highest tier of this node that has it: softly pinned objects leave last, hard pinned
        ones never, until `unpin`, `ttl_s`, `clear` or quarantine. One pin for each owner, which
        a second call replaces. False: it is not here, or hard pins would take more than half of the tier."""
        books = self._books
        with books.lock:
            now = books.clock()
            shelf = books.highest(key)
            resident = shelf.get(key) if shelf is not None else None
            if books.closed or shelf is None or resident is None:
                return False
            return shelf.pin(resident, owner, Pin(hard, None if ttl_s is None else now + ttl_s))

    def unpin(self, key: ObjectKey, owner: str) -> bool:
        """Ends the owner's pin, in whichever tier it is. False: `owner` has no pin on it."""
        with self._books.lock:
            found = [(shelf, shelf.get(key)) for shelf in self._books.shelves()]
            return sum(shelf.unpin(resident, owner) for shelf, resident in found if resident is not None) > 0

    def clear(self, owner: str | None = None, model: str | None = None) -> int:
        """Drops all objects of an owner, of a model, of both at once, or all; pins do not save them, and readers finish
        reading. How many. Puts that are not committed stay."""
        with self._books.lock:
            for lower in self._books.lower.values():
                lower.clear_later(owner, model)
        chosen = [
            stored.key
            for stored in self._lookups.objects()
            if owner in (None, stored.info.owner) and model in (None, stored.info.model)
        ]
        for key in chosen:
            self._books.drop(key, list(self._books.lower))
        return len(chosen)

    def move(self, key: ObjectKey, tier: TierName) -> bool:
        """HOST: brings it up, and lower tiers keep it. DISK, REMOTE: writes it there now, and it leaves the tiers
        above. False: not here, no such tier, no room, a fault, or pinned in a tier that it would leave; then nothing
        leaves."""
        if tier is TierName.HOST:
            with self._bring(key) as fetch:
                return _arrives(fetch)
        books = self._books
        lower = books.lower.get(tier)
        if lower is None:
            return False
        above = [name for name in books.lower if LOWER_TIERS.index(name) < LOWER_TIERS.index(tier)]
        with books.lock:
            leaving = [books.host.shelf, *(books.lower[name].shelf for name in above)]
            if any(shelf.pins(key) for shelf in leaving):
                return False
            is_there = lower.peek(key) is not None
        if not is_there:
            with self._bring(key) as fetch:
                if not _arrives(fetch) or not self._write_backs.write(fetch.items[0], lower):
                    return False
        books.drop(key, above, moved=True)
        return True

    def _bring(self, key: ObjectKey) -> NodeFetch:
        return self._fetches.fetch(self._lookups.locate([key]), 0.0, READ_LEASE_S)


def _arrives(fetch: NodeFetch) -> bool:
    return len(fetch.sources) == 1 and fetch.wait(_ALL_LAYERS, _MOVE_S)
