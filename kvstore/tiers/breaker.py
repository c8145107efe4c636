"""A circuit breaker: a remote service that is down costs one time-out now and then, not one per call."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable

FIRST_PAUSE_S = 0.5
LONGEST_PAUSE_S = 10.0


class Breaker:
    """Closed until a call fails; then open for a pause that doubles with each failure; after a pause one caller may
    try, and its outcome decides."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._lock = threading.Lock()
        self._pause_s = 0.0
        """0: closed."""
        self._try_at = 0.0
        self._trying = False

    def allows(self) -> bool:
        """Whether to call now. Whoever is let through says how it went."""
        if self._pause_s == 0:
            return True
        with self._lock:
            now = self._clock()
            if now < self._try_at:
                return False
            self._try_at = now + self._pause_s
            self._trying = True
            return True

    def succeeded(self) -> None:
        """Closes it."""
        if self._pause_s:
            with self._lock:
                self._pause_s = 0.0
                self._trying = False

    def failed(self) -> None:
        """Opens it, or doubles the pause."""
        with self._lock:
            if self._pause_s and not self._trying:
                return  # a call from before the breaker opened
            self._trying = False
            self._pause_s = min(max(FIRST_PAUSE_S, 2 * self._pause_s), LONGEST_PAUSE_S)
            self._try_at = self._clock() + self._pause_s
