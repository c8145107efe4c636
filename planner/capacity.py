"""What any mix of replicas carries within the SLO.

A replica carries more in a larger pool, where waits even out. In a mix of classes each replica is taken to carry what
it would in a pool of its own class whose size is that of the mix, a slower neighbour counting for as much as it is
slower. A class that cannot meet the SLO carries nothing and helps nobody.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from tandem.planner.objectives import Demand, Slo
from tandem.planner.pools import Option
from tandem.planner.queueing import Load, highest_rate

LEVELS = (1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64, 96, 128, 192, 256, 384, 512, 1024)
"""Pool sizes for which rates are worked out; a size between two counts as the smaller."""

Counts = NDArray[np.int64]
Rates = NDArray[np.float64]


class Capacity:
    """Requests per second of mixes of one role's options."""

    def __init__(self, options: Sequence[Option], demand: Demand, slo: Slo, largest: int) -> None:
        """`largest`: replicas in the largest pool that will be asked about."""
        sizes = [size for size in LEVELS if size <= max(largest, 1)]
        self._sizes = np.array(sizes)
        rates = [_rates(option, demand, slo, sizes) for option in options]
        self.rates: Rates = np.array(rates, dtype=np.float64).reshape(len(options), len(sizes))
        """Requests per second of one replica, by option and level."""
        best = self.rates.max(axis=1, initial=0.0)
        self._neighbour = np.minimum(best[None, :] / np.maximum(best, 1e-12)[:, None], 1.0)
        """What a replica of the second option adds to the pool as the first sees it."""

    def of(self, mixes: Counts) -> Rates:
        """Requests per second of each mix.

        Args:
            mixes: replicas, shape [mixes, options].
        """
        rates: Rates = self._of_options(mixes).sum(axis=1)
        return rates

    def of_each(self, mix: Sequence[int]) -> Rates:
        """Requests per second of each option's replicas in one mix."""
        rates: Rates = self._of_options(np.array([mix], dtype=np.int64))[0]
        return rates

    def pool_size(self, mix: Sequence[int], option: int) -> int:
        """The size of the pool that `mix` is for replicas of one option."""
        return max(int(np.array(mix) @ self._neighbour[option] + 1e-9), 1)

    def _of_options(self, mixes: Counts) -> Rates:
        rates = np.zeros(mixes.shape)
        for option in range(mixes.shape[1]):
            sizes = (mixes @ self._neighbour[option] + 1e-9).astype(np.int64)
            rates[:, option] = mixes[:, option] * self.rates[option][self._level(sizes)]
        return rates

    def at_most(self, replicas: int) -> Rates:
        """Requests per second of one replica of each option in a pool of not more than `replicas`."""
        return self.rates[:, self._level(np.int64(max(replicas, 1)))]

    def enough(self, option: int, rate: float, most: int) -> int:
        """The least replicas of one option alone that carry `rate`; `most` where those do not."""
        low, high = 0, most
        while low < high:
            middle = (low + high) // 2
            alone = middle * self.rates[option, self._level(np.int64(middle))] if middle else 0.0
            low, high = (middle + 1, high) if alone < rate else (low, middle)
        return low

    def _level(self, replicas: Counts | np.int64) -> NDArray[np.int64]:
        return np.clip(np.searchsorted(self._sizes, replicas, side="right") - 1, 0, None)


def _rates(option: Option, demand: Demand, slo: Slo, sizes: Sequence[int]) -> list[float]:
    rates: list[float] = []
    for size in sizes:
        pool = load(option, demand, slo, size)
        rates.append(highest_rate(option.role, pool, slo, (rates[-1] if rates else 0.0) * size) / size)
    return rates


def load(option: Option, demand: Demand, slo: Slo, replicas: int) -> Load:
    """A pool of `replicas` of one option, as the queueing model takes it."""
    return Load(option.replica, demand, slo.percentile, replicas, option.token_budget, option.max_batch)
