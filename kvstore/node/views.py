"""Reads of what this node has, by other nodes and by the node's own parts."""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Callable, Iterator

from tandem.kvstore.interfaces import ObjectKey, TierName
from tandem.kvstore.node.books import Books
from tandem.kvstore.node.host import HostObject


class Views:
    """Owns the leases of those who look at host memory without a fetch, under the books' lock."""

    def __init__(self, books: Books) -> None:
        self._books = books
        self._leases: Counter[HostObject] = Counter()

    @contextlib.contextmanager
    def view(self, key: ObjectKey, *, counts: bool = True) -> Iterator[memoryview | None]:
        """Read-only bytes of an object in host memory, leased inside of the `with`; None if it is not there. `counts`:
        it is a use of the object, which the eviction policy and `hot` learn of."""
        books = self._books
        with books.lock:
            item = None if books.closed else books.host.get(key)
            if item is not None:
                self._lease(item)
                if counts:
                    books.host.shelf.hit(item)
                    books.hot.note(key)
        if item is None:
            yield None
            return
        try:
            yield books.host.view(item).toreadonly()
        finally:
            with books.lock:
                self._release(item)

    def read_range(self, key: ObjectKey, offset: int, out: memoryview) -> bool:
        """Fills `out` from host memory or disk. False: not there, too short, or a fault."""
        books = self._books
        with self.view(key) as whole:
            if whole is not None:
                if offset < 0 or offset + len(out) > len(whole):
                    return False
                out[:] = whole[offset : offset + len(out)]
                return True
        disk = books.lower.get(TierName.DISK)
        if disk is None or offset < 0:
            return False
        with books.lock:
            resident = None if books.closed else disk.peek(key)
            if resident is None or offset + len(out) > resident.info.size:
                return False
            resident.leases += 1
            disk.shelf.hit(resident)
            books.hot.note(key)
        try:
            return disk.read(key, offset, out)
        finally:
            with books.lock:
                resident.leases -= 1

    def keep(self, start: int, stop: int) -> Callable[[], None]:
        """Objects with bytes between these offsets of the arena keep their memory until what this returns is called:
        somebody may still write there."""
        books = self._books
        with books.lock:
            living = books.host.living()
            items = [item for item in living if item.offset < stop and start < item.offset + item.info.size]
            for item in items:
                self._lease(item)

        def let_go() -> None:
            with books.lock:
                for item in items:
                    self._release(item)

        return let_go

    # Under the lock

    def held(self) -> Iterator[HostObject]:
        """What views have leases of, as often as they have."""
        return self._leases.elements()

    def _lease(self, item: HostObject) -> None:
        self._books.host.lease(item)
        self._leases[item] += 1

    def _release(self, item: HostObject) -> None:
        self._leases[item] -= 1
        if not self._leases[item]:
            del self._leases[item]
        self._books.host.release(item)
