"""Who of a tenant came first, where its requests wait at several routers. Pure.

A router tells the others how long the oldest waiting request of each tenant has waited: a duration, so clocks need not
agree, and what is late on its way only looks younger than it is. Whoever would go before an older one of its own tenant
elsewhere, by more than `LEAD_S`, leaves it the room. So routers wait for each other in the order of arrival, never in a
circle, and what a tenant waits for through different routers differs by little more than `LEAD_S`.
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Callable, Iterable, Mapping

from tandem.common.fairness import AccountKey

LEAD_S = 1.2
"""A request may go so long before its turn among those of its tenant: a second, and the time that news take."""
MAX_OLDEST = 64
"""Tenants, counted by band, that a router tells of: those that have waited longest."""
PASSED_OVER_S = 2.0
"""Those who did not take the room that was left to them are not waited for so long."""


class Elders:
    """One router's view. `arrived` is always on `clock`, in seconds."""

    def __init__(self, oldest: Callable[[], Iterable[tuple[AccountKey, float]]], clock: Callable[[], float]) -> None:
        """`oldest`: when the oldest request of each tenant that waits here arrived."""
        self._oldest = oldest
        self._clock = clock
        self._elsewhere: Mapping[AccountKey, float] = {}
        self._passed_over_until = -math.inf

    def here(self) -> dict[AccountKey, float]:
        """When they arrived that others may have to let go first. Who waits for a moment only is not among them."""
        limit = self._clock() - LEAD_S
        late = ((key, at) for key, at in self._oldest() if at < limit)
        return dict(heapq.nsmallest(MAX_OLDEST, late, key=lambda each: each[1]))

    def hear(self, elsewhere: Mapping[AccountKey, float]) -> None:
        """Takes what all others say; nothing while there is nobody to hear."""
        self._elsewhere = elsewhere

    def go_first(self, key: AccountKey, arrived: float) -> bool:
        """Whether one of the same tenant waits elsewhere that came long before `arrived` and may take its turn."""
        elder = self._elsewhere.get(key)
        return elder is not None and elder < arrived - LEAD_S and self._clock() >= self._passed_over_until

    def pass_over(self) -> None:
        """There was room, and nobody took it."""
        self._passed_over_until = self._clock() + PASSED_OVER_S
