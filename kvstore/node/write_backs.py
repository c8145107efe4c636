"""The way down: what was committed goes to the lower tiers, nearest first, in the background."""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator
from dataclasses import replace

from tandem.kvstore.node import content
from tandem.kvstore.node.books import Books
from tandem.kvstore.node.host import HostObject, Phase
from tandem.kvstore.node.lower import LowerTier
from tandem.kvstore.node.write_back import WriteBack

logger = logging.getLogger(__name__)

_QUEUE_SHARE = 4
"""Each queue holds at most a quarter of host memory, because what is queued cannot leave."""


class WriteBacks:
    """Owns one queue, with its thread, for each lower tier. The queues have locks of their own, taken after the
    books'."""

    def __init__(self, books: Books) -> None:
        self._books = books
        most_bytes = books.host.arena.capacity_bytes // _QUEUE_SHARE
        self._queues = [
            WriteBack(lower, most_bytes, self._write_back, books.announcer.publish) for lower in books.lower.values()
        ]

    def start(self) -> None:
        for queue in self._queues:
            queue.start()

    def wait_indexed(self, timeout_s: float) -> bool:
        """Waits until it is known what the tiers hold that are this node's alone. False: time is up."""
        deadline = time.monotonic() + timeout_s
        own = [queue for queue in self._queues if not queue.lower.is_shared]
        return all(queue.indexed.wait(max(0.0, deadline - time.monotonic())) for queue in own)

    def flush(self, timeout_s: float) -> bool:
        """Waits until all that was offered is written or dropped. False: time is up."""
        deadline = time.monotonic() + timeout_s
        return all(queue.flush(deadline) for queue in self._queues)

    def close(self) -> None:
        """Stops the threads; what is still queued is dropped, and counted."""
        for queue in self._queues:
            left = queue.close()
            with self._books.lock:
                for item in left:
                    self._books.host.release(item)
                queue.lower.shelf.counters.writes_dropped += len(left)

    def write(self, item: HostObject, lower: LowerTier) -> bool:
        """Writes an object that the caller holds a lease of, in the tier's codec. True if it is there afterwards."""
        whole = self._books.host.view(item).toreadonly()
        encoded = content.encoded(whole, lower.codec)
        if encoded is None:
            return False
        info = item.info if encoded is whole else replace(item.info, size=len(encoded))
        return lower.write(item.key, info, encoded)

    def _write_back(self, queue: WriteBack, item: HostObject) -> None:
        """Runs on the queue's thread, without the lock, with a lease of `item` that ends here."""
        books, lower = self._books, queue.lower
        written = False
        try:
            if item.phase is Phase.COMPLETE:
                written = self.write(item, lower)
        except Exception:
            logger.exception("write-back to the %s tier", lower.name)
        with books.lock:
            kept = item.phase is Phase.COMPLETE
            if written:
                item.dirty = False
            else:
                lower.shelf.counters.writes_dropped += 1
            if kept and not books.closed:
                self.offer(item, self._queues.index(queue) + 1)
            queue.done()
            books.host.release(item)
        if written and not kept and not item.moved:
            lower.drop(item.key)  # quarantined or cleared in the meantime
        books.announcer.publish()

    # Under the lock

    def offer(self, item: HostObject, index: int = 0) -> None:
        """Queues it, with a lease, for the first tier from `index` on whose queue has room."""
        for queue in self._queues[index:]:
            self._books.host.lease(item)
            if queue.offer(item):
                return
            self._books.host.release(item)
            queue.lower.shelf.counters.writes_dropped += 1

    def held(self) -> Iterator[HostObject]:
        """What the queues have leases of."""
        return (item for queue in self._queues for item in queue.held())

    @property
    def queued_bytes(self) -> int:
        return sum(queue.queued_bytes for queue in self._queues)
