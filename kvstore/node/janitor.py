"""The janitor: a thread that ends what time has ended, and takes memory from the system ahead of use."""

from __future__ import annotations

import threading
import time

from tandem.kvstore.node.books import Books
from tandem.kvstore.node.fetches import Fetches
from tandem.kvstore.node.puts import Puts

_ROUND_S = 0.5
_HOT_HALF_LIFE_S = 60.0


class Janitor:
    """Owns its thread; each part ends its own leases."""

    def __init__(self, books: Books, puts: Puts, fetches: Fetches) -> None:
        self._books = books
        self._puts = puts
        self._fetches = fetches
        self._stopping = threading.Event()
        self._thread = threading.Thread(target=self._run, name="kv-janitor", daemon=True)

    def start(self) -> None:
        self._thread.start()

    @property
    def is_running(self) -> bool:
        return self._thread.is_alive()

    def stop(self) -> None:
        """Ends the round it is at. Idempotent."""
        self._stopping.set()
        if self._thread.is_alive():
            self._thread.join()

    def reap(self) -> None:
        """Ends leases and pins whose time is up: one round, twice a second."""
        books = self._books
        with books.lock:
            if books.closed:
                return
            now = books.clock()
            self._puts.reap(now)
            for shelf in books.shelves():
                shelf.end_pins(now)
        self._fetches.reap(now)
        books.announcer.publish()

    def _run(self) -> None:
        decayed_at = time.monotonic()
        while not self._stopping.wait(_ROUND_S):
            while self._books.host.arena.pages.warm() and not self._stopping.is_set():
                pass
            self.reap()
            if time.monotonic() - decayed_at > _HOT_HALF_LIFE_S:
                decayed_at = time.monotonic()
                with self._books.lock:
                    self._books.hot.decay()
