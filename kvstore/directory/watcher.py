"""A local copy of the directory that follows its stream: for those who look up more than they announce (routers).

Two sources, checked against each other: the stream of updates, which may lose, double and reorder, and the list of live
nodes with the number of their last update. Whatever the stream has not brought is fetched node by node.
"""

from __future__ import annotations

import logging
import math
import threading
import time
from collections.abc import Callable, Sequence

from tandem.kvstore.directory.messages import Feed, Update, Verdict
from tandem.kvstore.directory.table import LocationTable
from tandem.kvstore.interfaces import EventBatch, Location, NodeInfo, ObjectKey

log = logging.getLogger(__name__)

MAX_KEYS = 1_000_000
"""About 250 MB. What does not fit is not seen, and so counts as not cached."""
READ_S = 0.05
"""Pause between two looks at the stream: no call waits at the directory, so watchers cost it no threads."""
STATES_S = 0.5
"""Pause between two looks at who lives."""
MAX_PAGES = 64
"""Read at a time; a watcher that is further behind catches up later."""


class DirectoryWatcher:
    """Safe from any thread. While the directory cannot be reached, what was last known stays."""

    def __init__(
        self, feed: Feed, *, max_keys: int = MAX_KEYS, on_close: Callable[[], None] | None = None, start: bool = True
    ) -> None:
        """`start=False`: nothing runs in the background, the caller calls `poll`."""
        self._feed = feed
        self._on_close = on_close
        self._table = LocationTable(max_keys=max_keys)
        self._cursor = ""
        self._behind = True
        self.resyncs = 0
        """Nodes fetched as a whole, the first time included."""
        self._closing = threading.Event()
        self._thread = threading.Thread(target=self._run, name="kv-directory-watch", daemon=True)
        if start:
            self._thread.start()

    def lookup(self, keys: Sequence[ObjectKey]) -> list[tuple[Location, ...]]:
        """Locations on live nodes as far as is known here, one tuple per key; microseconds, no I/O."""
        return self._table.lookup(keys)

    def nodes(self) -> dict[str, NodeInfo]:
        return {name: state.info for name, state in self._table.states().items()}

    def __len__(self) -> int:
        """Keys on record."""
        return len(self._table)

    def close(self) -> None:
        """Ends the thread. Idempotent."""
        self._closing.set()
        if self._thread.ident is not None:
            self._thread.join()
        if self._on_close is not None:
            self._on_close()

    def check_integrity(self) -> None:
        """Raises StoreIntegrityError with everything that is wrong."""
        self._table.check_integrity()

    def poll(self, *, states: bool = True) -> bool:
        """Catches up. With `states`, or when something is missing, asks who lives, too. False: out of reach."""
        if not self._cursor and not self._read():
            return False
        if not states and not self._behind:
            return self._read()
        live = self._feed.states()
        if live is None:
            return False
        self._table.adopt(live)
        if not self._read():
            return False
        known = self._table.states()
        missing = [name for name, state in live.items() if name not in known or known[name].seq < state.seq]
        fetched = [self._fetch(name) for name in missing]
        self._behind = not all(fetched)
        return True

    def _read(self) -> bool:
        """Takes in what the stream has brought."""
        for _ in range(MAX_PAGES):
            page = self._feed.read(self._cursor)
            if page is None:
                return False
            self._cursor = page.cursor
            for update in page.updates:
                self._behind |= self._table.apply(update, math.inf).verdict is Verdict.RESYNC
            if not page.updates:
                break
        return True

    def _fetch(self, node_id: str) -> bool:
        dump = self._feed.dump(node_id)
        if dump is None:
            return False
        self.resyncs += 1
        batch = EventBatch(node_id, dump.epoch, dump.seq, tuple(dump.events))
        return self._table.apply(Update(batch, reset=True), math.inf).verdict is Verdict.OK

    def _run(self) -> None:
        reached, states_at = True, 0.0
        wait_s = 0.0
        while not self._closing.wait(wait_s):
            now = time.monotonic()
            due = now >= states_at
            if due:
                states_at = now + STATES_S
            before, reached = reached, self.poll(states=due)
            if reached is not before:
                log.info(
                    "the directory %s", "is followed" if reached else "is out of reach: its last state stays in use"
                )
            while self._table.sweep(2_000) and not self._closing.wait(0.001):
                pass
            wait_s = READ_S if reached else STATES_S
