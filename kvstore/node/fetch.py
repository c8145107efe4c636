"""One fetch, as its reader sees it, and the loadings that it waits for.

A `Loading` is one object; every fetch that wants it shares it. An object is filled front to back, so "how far" is one
number.
"""

from __future__ import annotations

import threading
import time
from bisect import bisect_right
from collections.abc import Callable, Iterable, Sequence
from typing import Protocol

from tandem.kvstore.interfaces import Located
from tandem.kvstore.node.host import HostObject
from tandem.kvstore.node.index import Resident


class Loading:
    """`filled` and `ends` are set by its loader thread, the rest under the node's lock."""

    def __init__(self, item: HostObject, source: Located, resident: Resident | None) -> None:
        self.item = item
        self.source = source
        self.resident = resident
        """The object on this node's disk; the loading has a lease of it."""
        self.filled = 0
        """Leading bytes that are there."""
        self.ends: tuple[int, ...] = ()
        """Ends of the layers in bytes; empty until the header is there."""
        self.complete = False
        self.failed = False
        """It has ended without the whole object: a fault, or nobody wanted it any more."""
        self.watchers: list[NodeFetch] = []

    @property
    def ended(self) -> bool:
        return self.complete or self.failed

    def layers(self) -> int:
        """Leading layers that are there; -1 before the header."""
        return bisect_right(self.ends, self.filled) if self.ends else -1


class FetchOffice(Protocol):
    """The node's part that fetches are opened and closed at."""

    def view_of(self, item: HostObject) -> memoryview: ...

    def end_fetch(self, fetch: NodeFetch) -> None: ...


class NodeFetch:
    """`interfaces.Fetch`. Leases lapse when nobody looks at it for `lease_s`."""

    def __init__(
        self,
        office: FetchOffice,
        sources: Sequence[Located],
        items: Sequence[HostObject],
        loadings: Sequence[Loading | None],
        lease_s: float | None,
        clock: Callable[[], float],
    ) -> None:
        """`loadings` has None for what is in host memory already."""
        self._office = office
        self._sources = tuple(sources)
        self.items = tuple(items)
        self._loadings = tuple(loadings)
        self._clock = clock
        self._progress = threading.Condition()
        self._ended = False
        self.lease_s = lease_s
        self.touched_at = clock()

    @property
    def sources(self) -> Sequence[Located]:
        return self._sources

    def wait(self, num_layers: int, timeout_s: float) -> bool:
        """All layers of objects that have fewer than `num_layers`."""
        deadline = time.monotonic() + timeout_s
        with self._progress:
            while True:
                if self._ended or self.failed:
                    return False
                self.touched_at = self._clock()
                if all(
                    loading is None or loading.complete or loading.layers() >= num_layers for loading in self._loadings
                ):
                    return True
                left = deadline - time.monotonic()
                if left <= 0:
                    return False
                self._progress.wait(left)

    def intact(self) -> int:
        """How many leading objects are complete now; 0 after `close`."""
        if self._ended:
            return 0
        self.touched_at = self._clock()
        for index, loading in enumerate(self._loadings):
            if loading is not None and not loading.complete:
                return index
        return len(self._loadings)

    @property
    def ended(self) -> bool:
        """Closed, or its lease has lapsed."""
        return self._ended

    @property
    def failed(self) -> bool:
        """One of the objects cannot be had any more."""
        return any(loading is not None and loading.failed for loading in self._loadings)

    def buffer(self, index: int) -> memoryview:
        """Raises ValueError after `close`, or when the lease has lapsed."""
        if self._ended:
            raise ValueError("the fetch is closed, or its lease has lapsed: its memory may hold other objects")
        self.touched_at = self._clock()
        return self._office.view_of(self.items[index]).toreadonly()

    def offset(self, index: int) -> int:
        """Where object `index` lies in the arena, for a reader in another process."""
        return self.items[index].offset

    def close(self) -> None:
        self._office.end_fetch(self)

    def end(self) -> None:
        """Ends it, as the node does: there is nothing to wait for any more."""
        with self._progress:
            self._ended = True
            self._progress.notify_all()

    def progressed(self) -> None:
        with self._progress:
            self._progress.notify_all()

    def __enter__(self) -> NodeFetch:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def tell_watchers(loadings: Iterable[Loading]) -> None:
    for fetch in {fetch for loading in loadings for fetch in tuple(loading.watchers)}:
        fetch.progressed()
