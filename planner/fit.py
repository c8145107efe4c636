"""What a linear law of times costs per unit of each of its terms: learned from measured times, within bounds of a first
guess. No clock, no I/O."""

from __future__ import annotations

import math
from operator import mul

MAX_FACTOR = 100.0
"""A term is never believed to cost more than this many times its first guess, nor less than one part in as many."""


class Fit:
    """Recency-weighted least squares of `seconds = sum(term * amount)`, in units of the first guess.

    With f_i the share of term i in the guessed time, measured over guessed time is the ratio `sum(x_i * f_i)`:
    x_i says how many times slower than guessed term i is. Where all observations look alike the x_i cannot be told
    apart; a small ridge then gives all of them the mean ratio. Coordinate descent keeps every x_i within its bounds.
    """

    DECAY = 0.97
    """Share of the weight of old data that each observation leaves: some 33 observations are remembered."""
    RIDGE = 0.01
    GUESS_WEIGHT = 0.1
    """Weight of the first guess, in observations."""
    CLIP = 3.0
    """One outlier moves a settled estimate no more than a time 3 times as long (or as short) as expected."""
    SETTLED_WEIGHT = 4.0
    SWEEPS = 8
    STILL = 1e-3
    """Share of the mean ratio: a sweep of coordinate descent that moves no factor further is the last. Each begins
    where the last observation's ended, so one is mostly enough."""

    __slots__ = ("_guess", "_moment", "_ratio_sum", "_square", "_weight", "_x", "terms")

    def __init__(self, guess: tuple[float, ...]) -> None:
        size = len(guess)
        self.terms = guess
        """Seconds per unit of each term, as believed now."""
        self._guess = guess
        self._x = [1.0] * size
        self._square = [[0.0] * size for _ in guess]
        self._moment = [0.0] * size
        self._weight = self._ratio_sum = 0.0

    def observe(self, amounts: tuple[float, ...], seconds: float) -> None:
        """Corrects the terms by one measured time. Times that are not positive and finite are dropped; outliers are
        cut."""
        if not 0.0 < seconds < math.inf:
            return
        parts = [term * amount for term, amount in zip(self._guess, amounts, strict=True)]
        guessed = sum(parts)
        ratio = min(max(seconds / guessed, 1.0 / MAX_FACTOR), MAX_FACTOR)
        shares = [part / guessed for part in parts]
        if self._weight >= self.SETTLED_WEIGHT:
            believed = sum(x * share for x, share in zip(self._x, shares, strict=True))
            ratio = min(max(ratio, believed / self.CLIP), believed * self.CLIP)
        self._weight = self._weight * self.DECAY + 1.0
        self._ratio_sum = self._ratio_sum * self.DECAY + ratio
        for i, share in enumerate(shares):
            row = self._square[i]
            for j, other in enumerate(shares):
                row[j] = row[j] * self.DECAY + share * other
            self._moment[i] = self._moment[i] * self.DECAY + share * ratio
        self._solve()

    def _solve(self) -> None:
        mean = (self._ratio_sum + self.GUESS_WEIGHT) / (self._weight + self.GUESS_WEIGHT)
        least, most = max(0.02 * mean, 1.0 / MAX_FACTOR), MAX_FACTOR
        x = self._x
        for _ in range(self.SWEEPS):
            moved = 0.0
            for i, row in enumerate(self._square):
                was = x[i]
                rest = sum(map(mul, row, x)) - row[i] * was
                best = (self._moment[i] + self.RIDGE * mean - rest) / (row[i] + self.RIDGE)
                x[i] = min(max(best, least), most)
                moved = max(moved, abs(x[i] - was))
            if moved < self.STILL * mean:
                break
        self.terms = tuple(guess * factor for guess, factor in zip(self._guess, x, strict=True))
