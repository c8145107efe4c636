"""What the directory is told, in the order in which it happened.

Changes are noted under the node's lock and published after it is given back: the directory may hold its own lock while
it asks for a snapshot, which takes the node's. A note that is published after a snapshot that contains it does no harm,
because a note says how things are, not how they changed, and the last one on each key is the latest.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence

from tandem.kvstore.interfaces import Directory, DirectoryEvent, NodeInfo, ObjectKey, TierName


class Announcer:
    """Collects changes of one node's tiers and publishes them to the directory, in order. Does nothing where there is
    no directory."""

    def __init__(self, directory: Directory | None, node_id: str, lock: threading.Lock) -> None:
        self._directory = directory
        self._node_id = node_id
        self._lock = lock
        self._publishing = threading.Lock()
        self._noted: list[DirectoryEvent] = []
        self._is_registered = False

    def register(self, node: NodeInfo, snapshot: Callable[[], Sequence[DirectoryEvent]]) -> None:
        """Changes before it are in the snapshot."""
        self._is_registered = True
        if self._directory is not None:
            self._directory.register(node, snapshot)

    def note(self, key: ObjectKey, tier: TierName, size: int) -> None:
        """Size 0: the object left the tier. The caller holds the node's lock. Shared tiers are not a node's to tell."""
        if self._is_registered and self._directory is not None and tier is not TierName.REMOTE:
            self._noted.append(DirectoryEvent(key, tier, size))

    def publish(self) -> None:
        """Tells the directory what was noted, without the node's lock; every change of the node ends with it."""
        if self._directory is None or not self._noted:
            return
        with self._publishing:
            with self._lock:
                events, self._noted = self._noted, []
            if events:
                self._directory.publish(self._node_id, events)
