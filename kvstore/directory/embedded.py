"""The directory inside one process: alone for a single node, or served to others by `served.py`."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Sequence

from tandem.kvstore.directory.log import UpdateLog
from tandem.kvstore.directory.messages import NODE_TTL_S, Dump, NodeState, Page, Reply, Update
from tandem.kvstore.directory.publisher import Publisher
from tandem.kvstore.directory.table import MAX_KEYS, LocationTable
from tandem.kvstore.interfaces import DirectoryEvent, Location, NodeInfo, ObjectKey

log = logging.getLogger(__name__)

_TICK_S = 0.25
_SWEEP_KEYS = 2_000
"""Void entries that are taken back at a time: look-ups may wait for a thread switch, not longer."""


class EmbeddedDirectory:
    """`interfaces.Directory`, and the `Uplink` and `Feed` of those that are served by it."""

    def __init__(self, *, max_keys: int = MAX_KEYS, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._log = UpdateLog()
        self._table = LocationTable(max_keys=max_keys, log=self._log)
        self._closing = threading.Event()
        self._publisher = Publisher(self, "kv-directory-publish", clock)
        self._keeper = threading.Thread(target=self._keep, name="kv-directory-keep", daemon=True)
        self._publisher.start()
        self._keeper.start()

    # interfaces.Directory

    def register(self, node: NodeInfo, snapshot: Callable[[], Sequence[DirectoryEvent]]) -> None:
        self._publisher.register(node, snapshot)

    def publish(self, node_id: str, events: Sequence[DirectoryEvent]) -> None:
        self._publisher.publish(node_id, events)

    def lookup(self, keys: Sequence[ObjectKey]) -> list[tuple[Location, ...]]:
        return self._table.lookup(keys)

    def nodes(self) -> dict[str, NodeInfo]:
        return {name: state.info for name, state in self._table.states().items()}

    def close(self) -> None:
        self._publisher.close()
        self._closing.set()
        self._keeper.join()

    def flush(self, timeout_s: float) -> bool:
        """Waits until what this process has published can be found. False: time is up."""
        return self._publisher.flush(timeout_s)

    def check_integrity(self) -> None:
        """Raises StoreIntegrityError with everything that is wrong."""
        self._table.check_integrity()

    def __len__(self) -> int:
        """Keys on record."""
        return len(self._table)

    # Uplink: called by the publisher here and for those of other processes

    def announce(self, node: NodeInfo, seq: int) -> Reply:
        return self._table.announce(node, seq, self._clock() + NODE_TTL_S)

    def apply(self, update: Update) -> Reply:
        return self._table.apply(update, self._clock() + NODE_TTL_S)

    def withdraw(self, node_id: str, epoch: int) -> None:
        self._table.withdraw(node_id, epoch)

    # Feed

    def states(self) -> dict[str, NodeState]:
        return self._table.states()

    def read(self, cursor: str) -> Page:
        return self._log.read(cursor)

    def dump(self, node_id: str) -> Dump | None:
        return self._table.dump(node_id)

    def _keep(self) -> None:
        warned = False
        while not self._closing.wait(_TICK_S):
            for name in self._table.expire(self._clock()):
                log.warning("node %s is silent: its entries are hidden until it is heard again", name)
            while self._table.sweep(_SWEEP_KEYS) and not self._closing.wait(0.001):
                pass
            if self._table.not_recorded and not warned:
                warned = True
                log.warning("the directory is full: what comes now is not recorded until something leaves")
