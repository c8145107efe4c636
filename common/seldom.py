"""A log line that somebody outside can cause as often as he likes: written at most once in a while, with a count."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable

INTERVAL_S = 10.0


class Seldom:
    """Thread-safe. One for each kind of line."""

    def __init__(self, logger: logging.Logger, level: int, clock: Callable[[], float] = time.monotonic) -> None:
        self._logger = logger
        self._level = level
        self._clock = clock
        self._lock = threading.Lock()
        self._silent_until = -float("inf")
        self._left_out = 0

    def log(self, message: str, *arguments: object) -> None:
        """The first in INTERVAL_S is written; it says how many were not before it."""
        with self._lock:
            now = self._clock()
            if now < self._silent_until:
                self._left_out += 1
                return
            self._silent_until = now + INTERVAL_S
            left_out, self._left_out = self._left_out, 0
        if left_out:
            message, arguments = message + " (and %d more since the last such line)", (*arguments, left_out)
        self._logger.log(self._level, message, *arguments)
