"""How many decode rows of a step each tenant has while several compete. Part of the scheduler: pure.

A step ends for all its rows at once, so one tenant's many rows make every token of the others late. Where a step's time
grows with its rows, those with many take turns with their own: an equal number for each tenant, and beyond that as many
as make such a step longer by `STRETCH`. A tenant alone has all its rows in every step, and so has everybody where more
rows cost nothing. A later band never makes an earlier one rest. The last band has an account of its own
(`last_band.py`).
"""

from __future__ import annotations

import math
from bisect import bisect_right
from collections import Counter
from collections.abc import Iterable
from collections.abc import Sequence as Seq
from dataclasses import dataclass

from tandem.common.fairness import LAST_BAND
from tandem.engine.schedule.sequence import Sequence

STRETCH = 1.25
"""A step may take so many times what it would if nobody had more rows than the one with fewest."""
LEAST_SHARE = 2
"""Nobody has to rest who has no more than so many times the rows (per weight) of the one with fewest."""
PROBE = 256
"""One step in so many has all rows, to see what they cost now: too few to be seen among 1 % of the gaps."""
SEEN = 8
"""Steps of about one size before their time counts."""
_NEW = 0.1
"""Share of a new step in the time of its size, once there were enough."""

Competitor = tuple[int, str]
"""Band and tenant."""


@dataclass(frozen=True, slots=True)
class StepCost:
    """Seconds of a step that only decodes: `base_s + row_s * rows`."""

    base_s: float = 0.0
    row_s: float = 0.0


class StepTimes:
    """What steps took, by their size in powers of two: a size that is seldom met is not forgotten."""

    def __init__(self) -> None:
        self._sizes: dict[int, tuple[int, float, float]] = {}
        """Steps, mean rows and mean seconds."""

    def add(self, rows: int, seconds: float) -> None:
        size = rows.bit_length()
        count, mean_rows, mean_s = self._sizes.get(size, (0, 0.0, seconds))
        share = max(_NEW, 1 / (count + 1))
        seconds = min(seconds, 2 * mean_s)  # the machine may have stood still
        self._sizes[size] = (
            min(count + 1, SEEN),
            mean_rows + (rows - mean_rows) * share,
            mean_s + (seconds - mean_s) * share,
        )

    def cost(self) -> StepCost:
        """The line through them by least squares; no cost of a row before steps of different sizes were seen."""
        points = [(rows, seconds) for count, rows, seconds in self._sizes.values() if count >= SEEN]
        if len(points) < 2:
            return StepCost()
        mean_rows = sum(rows for rows, _ in points) / len(points)
        mean_s = sum(seconds for _, seconds in points) / len(points)
        spread = sum((rows - mean_rows) ** 2 for rows, _ in points)
        row_s = sum((rows - mean_rows) * (seconds - mean_s) for rows, seconds in points) / spread
        row_s = min(max(row_s, 0.0), mean_s / mean_rows)
        return StepCost(mean_s - row_s * mean_rows, row_s)


@dataclass(frozen=True, slots=True)
class Claim:
    """What one competitor would have in a step."""

    band: int
    rows: int
    weight: float


def shares(claims: Seq[Claim], cost: StepCost) -> list[int]:
    """Rows of each in the next step: at least one, and all of them where that makes it too little longer."""
    granted = [claim.rows for claim in claims]
    if cost.row_s <= 0.0:
        return granted
    base = cost.base_s / cost.row_s  # in rows, as all that follows
    least = math.inf
    for band in sorted({claim.band for claim in claims}):
        members = [index for index, claim in enumerate(claims) if claim.band == band]
        least = min(least, *(claims[index].rows / claims[index].weight for index in members))
        equal = sum(min(claims[index].rows, least * claims[index].weight) for index in members)
        room = STRETCH * (base + equal) - base
        level = max(_level([claims[index] for index in members], room), LEAST_SHARE * least)
        for index in members:
            claim = claims[index]
            granted[index] = max(1, math.floor(min(claim.rows, level * claim.weight + 1e-9)))
        base += sum(granted[index] for index in members)
    return granted


def _level(claims: Seq[Claim], room: float) -> float:
    """Rows per weight that fill `room` where nobody gets more than it claims."""
    weights = sum(claim.weight for claim in claims)
    for claim in sorted(claims, key=lambda claim: claim.rows / claim.weight):
        if claim.rows / claim.weight * weights > room:
            return max(room, 0.0) / weights
        room -= claim.rows
        weights -= claim.weight
    return math.inf


class RowShares:
    """Says which rows rest in a step, and learns what rows cost. Rows of a tenant take turns in their order."""

    def __init__(self) -> None:
        self._times = StepTimes()
        self._last: dict[Competitor, tuple[int, int]] = {}
        """The order of the row that had the last turn, of those whose rows take turns."""
        self._steps = 0
        """With rows that rest, since all had a turn."""

    def took(self, rows: int, seconds: float) -> None:
        """A step of `rows` that decode, and of no prompts, took `seconds`."""
        self._times.add(rows, seconds)

    def resting(self, running: Iterable[Sequence]) -> set[Sequence]:
        """Those of `running`, which are in order, that decode and are not in the next step."""
        live = [each for each in running if each.priority < LAST_BAND and not each.waits_for_mask]
        if not live or all(each.request.tenant == live[0].request.tenant for each in live):
            self._last.clear()
            return set()
        rows = Counter(_competitor(each) for each in live)
        weights = {_competitor(each): each.request.weight for each in live}
        claims = [Claim(band, count, weights[band, tenant]) for (band, tenant), count in rows.items()]
        limits = dict(zip(rows, shares(claims, self._times.cost()), strict=True))
        limited = {competitor for competitor, limit in limits.items() if limit < rows[competitor]}
        self._last = {competitor: last for competitor, last in self._last.items() if competitor in limited}
        if not limited:
            return set()
        self._steps += 1
        if self._steps % PROBE == 0:
            return set()
        resting: set[Sequence] = set()
        for competitor in limited:
            decodes = [each for each in live if not each.prefills and _competitor(each) == competitor]
            resting |= self._rest(competitor, decodes, limits[competitor])
        return resting

    def _rest(self, competitor: Competitor, rows: list[Sequence], limit: int) -> set[Sequence]:
        in_turn = turns(rows, self._last.get(competitor, (competitor[0], -1)))
        if len(rows) > limit:
            self._last[competitor] = in_turn[limit - 1].order
        return set(in_turn[limit:])


def turns(rows: list[Sequence], last: tuple[int, int]) -> list[Sequence]:
    """`rows`, which are in order, from the one that follows `last` on."""
    start = bisect_right(rows, last, key=lambda row: row.order)
    return rows[start:] + rows[:start]


def _competitor(sequence: Sequence) -> Competitor:
    return sequence.priority, sequence.request.tenant
