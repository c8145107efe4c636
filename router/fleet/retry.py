"""Whether, where and how soon lost work is done again. Pure: clock and chance are passed in.

The budget is one for the whole router. A request that lost its worker costs as much again as a new one; without a bound
a fleet that breaks down under its load would get a multiple of that load.
"""

from __future__ import annotations

SHARE = 0.2
"""Retries per new request in the long run."""
FLOOR_PER_S = 10.0
"""Retries per second that a router with little traffic has, too."""
BURST = 1024.0
"""One worker may take a thousand sequences with it; all of them go on at once."""
FIRST_PAUSE_S = 0.05
LONGEST_PAUSE_S = 2.0
MAX_LOSSES = 3
"""Workers lost, one after the other, before any of them gave the next token: then the sequence is taken for what kills
them."""

WorkerStart = tuple[str, int]
"""Id and epoch of a worker."""


class RetryBudget:
    """A bucket that requests and time fill. In any span of t seconds with n requests it grants at most
    `BURST + SHARE * n + FLOOR_PER_S * t` retries. As in Finagle, an empty one delays retries and ends none by itself.
    """

    def __init__(self) -> None:
        self._left = BURST
        self._filled_at: float | None = None

    def request(self) -> None:
        """A new request has come."""
        self._left = min(self._left + SHARE, BURST)

    def take(self, now: float) -> bool:
        """Whether one retry may start at time `now` (s, monotonic)."""
        if self._filled_at is not None:
            self._left = min(self._left + FLOOR_PER_S * max(now - self._filled_at, 0.0), BURST)
        self._filled_at = now
        if self._left < 1.0:
            return False
        self._left -= 1.0
        return True


def pause_s(retries: int, chance: float) -> float:
    """Seconds before the retry that follows `retries` others; `chance` is uniform in [0, 1). Full jitter: those who
    lost the same worker come back spread over the whole pause."""
    return chance * min(FIRST_PAUSE_S * 2.0 ** min(retries, 16), LONGEST_PAUSE_S)


class Setbacks:
    """What one sequence has met with since its last token."""

    def __init__(self) -> None:
        self.since: float | None = None
        """When its worker was lost or refused it; None while all goes well."""
        self.losses = 0
        self._retries = 0
        self._left: set[WorkerStart] = set()
        """They take nothing more, or failed with it. Not forgotten."""
        self._full: set[WorkerStart] = set()

    @property
    def avoid(self) -> set[WorkerStart]:
        """Workers to which it is not sent."""
        return self._left | self._full

    def begin(self, now: float) -> None:
        if self.since is None:
            self.since = now

    def lost(self) -> bool:
        """A worker was lost with it, or failed. False: it has been so often enough."""
        self.losses += 1
        return self.losses < MAX_LOSSES

    def left(self, worker: WorkerStart) -> None:
        """`worker` will not take it any more."""
        self._left.add(worker)

    def full(self, worker: WorkerStart) -> None:
        """`worker` has no room now."""
        self._full.add(worker)

    def ask_all_again(self) -> None:
        self._full.clear()

    def next_pause_s(self, chance: float) -> float:
        """Seconds before the next retry."""
        self._retries += 1
        return pause_s(self._retries - 1, chance)

    def over(self) -> None:
        """There is a token again."""
        self.since = None
        self.losses = self._retries = 0
        self._full.clear()
