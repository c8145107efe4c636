"""Says in the log that a tier has trouble: every fault is counted, at most one in ten seconds is written down."""

from __future__ import annotations

import logging
import time

_logger = logging.getLogger("tandem.kvstore.tiers")
INTERVAL_S = 10.0


class FaultLog:
    """Counts the faults of one tier and logs a few of them."""

    def __init__(self, tier: str) -> None:
        self._tier = tier
        self._silent_until = 0.0
        self.count = 0

    def report(self, action: str, error: Exception) -> None:
        """Counts a fault, and logs one in `INTERVAL_S`."""
        self.count += 1
        now = time.monotonic()
        if now >= self._silent_until:
            self._silent_until = now + INTERVAL_S
            _logger.warning("%s: cannot %s: %s (%d faults so far)", self._tier, action, error, self.count)
