"""Marking with one predicted bit per access, robust however wrong the bits are.

After Antoniadis et al., "Paging with Succinct Predictions" (ICML 2023): their algorithm for one-bit predictions keeps
the phases of the marking algorithm, so that wrong bits cost no more than marking without any. (Evicting whatever is
predicted to be useless, without phases, is worse than LRU once a third of the bits are wrong.)
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable

from tandem.kvstore.eviction.ghosts import Ghosts
from tandem.kvstore.interfaces import ObjectInfo, ObjectKey


class Marking:
    """An access marks an object. A victim is an unmarked object: one predicted not to come back if there is any, else
    any other; the least recently used of its kind. When all are marked a phase ends, and all marks are taken off.

    The predictor: an object comes back if it has been used more than once, counting its last stay in the tier if
    that was not long ago. It knows nothing else, and is right for most KV: text that two requests share is mostly
    shared by more, and most answers are never read again. O(1), plus one step per object that may not leave.
    """

    def __init__(self, capacity_bytes: int) -> None:
        self._sizes: dict[ObjectKey, int] = {}
        self._returning: set[ObjectKey] = set()
        self._marked: OrderedDict[ObjectKey, None] = OrderedDict()
        self._unmarked: tuple[OrderedDict[ObjectKey, None], OrderedDict[ObjectKey, None]] = (
            OrderedDict(),
            OrderedDict(),
        )
        """By predicted bit."""
        self._ghosts: Ghosts[None] = Ghosts(capacity_bytes)

    def insert(self, key: ObjectKey, info: ObjectInfo) -> None:
        self.remove(key)
        self._sizes[key] = info.size
        if self._ghosts.pop(key) is not None:
            self._returning.add(key)
        self._marked[key] = None

    def hit(self, key: ObjectKey) -> None:
        if key not in self._sizes:
            return
        self._leave_queue(key)
        self._returning.add(key)
        self._marked[key] = None

    def remove(self, key: ObjectKey) -> None:
        if key in self._sizes:
            self._leave_queue(key)
            del self._sizes[key]
            self._returning.discard(key)

    def evict(self, may_leave: Callable[[ObjectKey], bool]) -> ObjectKey | None:
        for _phase in range(2):
            for queue in self._unmarked:
                victim = next((key for key in queue if may_leave(key)), None)
                if victim is not None:
                    self._ghosts.add(victim, self._sizes[victim], None)
                    self.remove(victim)
                    return victim
            for key in self._marked:
                self._unmarked[key in self._returning][key] = None
            self._marked.clear()
        return None

    def remember(self, most: int) -> None:
        self._ghosts.bound(most)

    def __len__(self) -> int:
        return len(self._sizes)

    def _leave_queue(self, key: ObjectKey) -> None:
        for queue in (self._marked, *self._unmarked):
            queue.pop(key, None)
