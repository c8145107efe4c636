"""The latest updates of all nodes in order, for watchers: bounded, so a slow watcher may miss some and resyncs."""

from __future__ import annotations

import threading
import uuid
from collections import deque
from itertools import islice

from tandem.kvstore.directory.messages import Page, Update

MAX_EVENTS = 50_000
"""About 10 MB. An update without events counts as one."""
PAGE_EVENTS = 16_384
"""Most events of one answer, which is then about 1 MB on the wire."""


class UpdateLog:
    """Safe from any thread."""

    def __init__(self, max_events: int = MAX_EVENTS) -> None:
        self._max_events = max_events
        self._id = uuid.uuid4().hex
        self._lock = threading.Lock()
        self._updates: deque[Update] = deque()
        self._events = 0
        self._end = 0

    def append(self, update: Update) -> None:
        """Adds an update; the oldest ones go when they tell of too many changes in all."""
        with self._lock:
            self._updates.append(update)
            self._events += _weight(update)
            self._end += 1
            while self._events > self._max_events:
                self._events -= _weight(self._updates.popleft())

    def read(self, cursor: str) -> Page:
        """Updates from `cursor` on, or from as far back as is left; the oldest for a cursor of another log."""
        name, _, place = cursor.partition(":")
        with self._lock:
            start = self._end - len(self._updates)
            if not cursor:
                start = self._end
            elif name == self._id and place.isdecimal():
                start = min(max(start, int(place)), self._end)
            first = start - (self._end - len(self._updates))
            updates: list[Update] = []
            events = 0
            for update in islice(self._updates, first, None):
                updates.append(update)
                events += _weight(update)
                if events >= PAGE_EVENTS:
                    break
            return Page(tuple(updates), f"{self._id}:{start + len(updates)}")


def _weight(update: Update) -> int:
    return max(1, len(update.batch.events))
