"""How long prompts and answers are, as shares of requests by length: what the routers' histograms say."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from tandem.common.errors import ConfigError


@dataclass(frozen=True, slots=True)
class Lengths:
    """A distribution of lengths in tokens. Shares add up to 1; without any points nothing is known, and all is 0."""

    points: tuple[tuple[float, float], ...] = ()
    """(tokens, share of the requests), by rising length."""

    @classmethod
    def of(cls, weighted: Iterable[tuple[float, float]]) -> Lengths:
        """From (tokens, weight) in any order and scale.

        Raises:
            ConfigError: a length or a weight that is negative or not finite.
        """
        merged: dict[float, float] = {}
        for tokens, weight in weighted:
            if not (0 <= tokens < math.inf and 0 <= weight < math.inf):
                raise ConfigError(
                    f"lengths: {tokens} tokens with weight {weight}: both must be finite and not negative"
                )
            if weight > 0:
                merged[tokens] = merged.get(tokens, 0.0) + weight
        total = sum(merged.values())
        return cls(tuple((tokens, weight / total) for tokens, weight in sorted(merged.items())))

    @classmethod
    def from_samples(cls, lengths: Sequence[float], max_points: int = 64) -> Lengths:
        """From single lengths; equal shares of them become one point, their mean, where there are many."""
        ordered = sorted(lengths)
        step = max(len(ordered) / max_points, 1.0)
        cuts = [round(i * step) for i in range(round(len(ordered) / step) + 1)]
        runs = [ordered[a:b] for a, b in itertools.pairwise(cuts) if b > a]
        return cls.of((sum(run) / len(run), len(run)) for run in runs)

    @property
    def mean(self) -> float:
        return sum(tokens * share for tokens, share in self.points)

    @property
    def mean_square(self) -> float:
        return sum(tokens * tokens * share for tokens, share in self.points)

    @property
    def longest(self) -> float:
        return self.points[-1][0] if self.points else 0.0

    def percentile(self, percent: float) -> float:
        """The least length that `percent` of the requests do not exceed."""
        covered = 0.0
        for tokens, share in self.points:
            covered += share
            if covered >= percent / 100 - 1e-12:
                return tokens
        return self.longest
