"""Committed objects on their way to one lower tier: a queue of bounded bytes and one thread."""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable

from tandem.kvstore.node.host import HostObject
from tandem.kvstore.node.lower import LowerTier


class WriteBack:
    """The queue to one lower tier, and the thread that writes what is in it. For any thread."""

    def __init__(
        self,
        lower: LowerTier,
        max_bytes: int,
        write: Callable[[WriteBack, HostObject], None],
        tell: Callable[[], None],
    ) -> None:
        """`write` gets an object off the queue, with the lease of its memory that came with it, and calls `done` when
        it ends that lease. `tell`: see `LowerTier.load_index`, which the thread calls before it writes."""
        self.lower = lower
        self._max_bytes = max_bytes
        self._write = write
        self._tell = tell
        self.indexed = threading.Event()
        """What the tier holds is known."""
        self._changed = threading.Condition()
        self._queue: deque[HostObject] = deque()
        self._current: HostObject | None = None
        self._closed = False
        self.queued_bytes = 0
        self._thread = threading.Thread(target=self._run, name=f"kv-write-{lower.name}", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def offer(self, item: HostObject) -> bool:
        """Takes over a lease of `item`; False: the queue is full, and the lease stays the caller's. Never blocks."""
        with self._changed:
            is_full = self.queued_bytes + item.info.size > self._max_bytes
            if self._closed or (is_full and self.queued_bytes):  # an object larger than the queue goes alone
                return False
            self._queue.append(item)
            self.queued_bytes += item.info.size
            self._changed.notify_all()
            return True

    def done(self) -> None:
        """Called by `write` under the node's lock: the lease of the object has ended."""
        with self._changed:
            if self._current is not None:
                self.queued_bytes -= self._current.info.size
            self._current = None
            self._changed.notify_all()

    def held(self) -> list[HostObject]:
        """What the queue has leases of, the one that is being written included."""
        with self._changed:
            return [*self._queue, *([self._current] if self._current is not None else [])]

    def flush(self, deadline: float) -> bool:
        """Waits until all is written. False: not by `deadline` (of time.monotonic)."""
        with self._changed:
            return self._changed.wait_for(
                lambda: not self._queue and self._current is None, max(0.0, deadline - time.monotonic())
            )

    def close(self) -> list[HostObject]:
        """Stops the thread after the object it is at; returns what was not written, with its leases."""
        with self._changed:
            self._closed = True
            left = list(self._queue)
            self._queue.clear()
            self.queued_bytes = self._current.info.size if self._current is not None else 0
            self._changed.notify_all()
        if self._thread.is_alive():
            self._thread.join()
        return left

    def _run(self) -> None:
        self.lower.load_index(lambda: self._closed, self._tell)
        self.indexed.set()
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._queue or self._closed)
                if self._closed:
                    return
                item = self._current = self._queue.popleft()
            self._write(self, item)
