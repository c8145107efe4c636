"""The cheapest mix of replicas that carries a rate: enumeration with pruning, over all roles at once.

A deployment serves `unified + min(prefill, decode)` requests per second. Within a bound on the cost the search lists,
for each role, every mix that could be part of a plan: its cost and the least that the rest must then cost stay within
the bound. It joins the lists, and raises the bound until a plan is found. Only what no such plan needs is left out, so
the result is exact, unless a list would grow beyond `MAX_MIXES`: then its least promising mixes are dropped, and the
result says so.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from tandem.planner.capacity import Capacity, Counts, Rates
from tandem.planner.pools import Limits, Option, OptionKey, PoolBounds
from tandem.planner.queueing import Role

MAX_MIXES = 20_000
_GROWTH = (1.0, 1.002, 1.004, 1.008, 1.016, 1.03, 1.06, 1.12, 1.25, 1.6, 2.5, 6.0, 20.0, math.inf)
"""Bounds on the cost that are tried, as multiples of the least that the rate must cost."""
_FEW = 1000
"""So many mixes of a role are all listed at once."""
_ROUNDING = 1e-9


@dataclass(frozen=True, slots=True)
class Found:
    """The result of a search."""

    counts: tuple[int, ...]
    """Replicas by option, in the order of the search's options."""
    exact: bool


@dataclass(frozen=True, slots=True)
class _Mixes:
    """Mixes of one role, by rising cost."""

    counts: Counts
    """Shape [mixes, options of the role]."""
    rates: Rates
    cost: Rates

    def least_cost(self, rates: Rates) -> Rates:
        """The cost of the cheapest mix that carries each of `rates`; infinite where none does. Shape as `rates`."""
        order = np.argsort(self.rates, kind="stable")
        cheapest = np.append(np.minimum.accumulate(self.cost[order][::-1])[::-1], np.inf)
        return cheapest[np.searchsorted(self.rates[order], rates)]


class Search:
    """Every mix of the options under the limits.

    Args:
        options: the ways to run replicas, of any role.
        capacities: what mixes of each role carry, in the order of `options`.
        bounds: replicas by pool; a pool that is not named is bounded by the inventory only.
        at_least: replicas that every mix has, by option.
        at_most: replicas of which every mix is a part.
    """

    def __init__(
        self,
        options: Sequence[Option],
        capacities: Mapping[Role, Capacity],
        bounds: Mapping[str, PoolBounds],
        limits: Limits,
        at_least: Mapping[OptionKey, int] | None = None,
        at_most: Mapping[OptionKey, int] | None = None,
    ) -> None:
        self._capacities = capacities
        self._limits = limits
        self._members = {role: [i for i, option in enumerate(options) if option.role is role] for role in Role}
        self._least = np.array([(at_least or {}).get(option.key, 0) for option in options], dtype=np.int64)
        self._cost = np.array([option.price_per_hour for option in options], dtype=np.float64)
        self._watts = np.array([option.watts for option in options], dtype=np.float64)
        self._devices = np.array([option.devices for option in options], dtype=np.int64)
        stocks = sorted({option.stock for option in options})
        pools = sorted({option.key.pool for option in options})
        self._of_stock = _membership(stocks, [option.stock for option in options])
        self._of_pool = _membership(pools, [option.key.pool for option in options])
        self._in_stock = np.array([limits.inventory.get(stock, 0) for stock in stocks], dtype=np.int64)
        pool_bounds = [bounds.get(pool, PoolBounds()) for pool in pools]
        self._pool_least = np.array([bound.min_replicas for bound in pool_bounds], dtype=np.int64)
        self._pool_most = np.array([bound.max_replicas for bound in pool_bounds], dtype=np.int64)
        by_stock = (self._in_stock @ self._of_stock) // np.maximum(self._devices, 1)
        self._most = np.minimum(by_stock, self._pool_most @ self._of_pool).astype(np.int64)
        if at_most is not None:
            self._most = np.minimum(self._most, [at_most.get(option.key, 0) for option in options])

    def cheapest(self, rate: float) -> Found | None:
        """The cheapest mix that carries `rate` requests per second; among equals the one that takes less power, then
        fewer replicas. None where the limits allow none."""
        return self._search(rate, _GROWTH)

    def feasible(self, rate: float) -> bool:
        """Whether the limits allow a mix that carries `rate`."""
        return self._search(rate, _GROWTH[-1:]) is not None

    def _search(self, rate: float, growths: Sequence[float]) -> Found | None:
        if np.any(self._least > self._most):
            return None
        capped = {role: self._cap(role, rate) for role in Role}
        least_cost = self._least_cost(rate, capped)
        if not math.isfinite(least_cost):
            return None
        exact, found, known = True, None, self._limits.max_cost_per_hour
        few = max(np.prod(most + 1.0 - self._least[self._members[role]]) for role, most in capped.items()) <= _FEW
        for growth in growths[-1:] if few else growths:
            bound = min(max(least_cost, 1e-6) * growth, known)
            lists = {}
            for role in Role:
                lists[role], whole = self._mixes(role, rate, bound, capped)
                exact = exact and whole
            found = self._join(lists, rate)
            known = min(known, float(self._cost @ found)) if found is not None else known
            if bound >= known * (1 - _ROUNDING) or bound >= self._cost @ self._most:
                break
        return None if found is None else Found(tuple(int(n) for n in found), exact)

    def highest_rate(self, wanted: float) -> float:
        """The most requests per second, up to `wanted`, that some mix carries, to one part in a thousand."""
        low, high = 0.0, wanted
        if self.feasible(wanted):
            return wanted
        while high - low > 1e-3 * high and high > 1e-6:
            middle = (low + high) / 2
            low, high = (middle, high) if self.feasible(middle) else (low, middle)
        return low

    def carries(self, counts: Sequence[int]) -> float:
        """Requests per second that a mix of all options carries."""
        mix = np.array(counts, dtype=np.int64)
        rates = {role: self._rate(role, mix) for role in Role}
        return rates[Role.UNIFIED] + min(rates[Role.PREFILL], rates[Role.DECODE])

    def _rate(self, role: Role, mix: Counts) -> float:
        members = self._members[role]
        return float(self._capacities[role].of(mix[None, members])[0]) if members else 0.0

    def _cap(self, role: Role, rate: float) -> Counts:
        """The most replicas of each of the role's options that any plan for `rate` has a use for."""
        useful = [
            max(self._capacities[role].enough(i, rate, int(self._most[option])), self._pool_need(option))
            for i, option in enumerate(self._members[role])
        ]
        most = self._most[self._members[role]]
        caps: Counts = np.maximum(np.minimum(np.array(useful, dtype=np.int64), most), self._least[self._members[role]])
        return caps

    def _pool_need(self, option: int) -> int:
        return int(self._pool_least @ self._of_pool[:, option])

    def _mixes(self, role: Role, rate: float, bound: float, capped: Mapping[Role, Counts]) -> tuple[_Mixes, bool]:
        """Every mix of a role that a plan within `bound` can have; and whether none was dropped."""
        members, most = self._members[role], capped[role]
        best = self._capacities[role].at_most(int(most.sum())) if members else np.zeros(0)
        order = sorted(range(len(members)), key=lambda i: _price(float(self._cost[members[i]]), float(best[i])))
        counts, exact = np.zeros((1, len(members)), dtype=np.int64), True
        for place, i in enumerate(order):
            steps = np.arange(self._least[members[i]], most[i] + 1)
            grown = np.repeat(counts, len(steps), axis=0)
            grown[:, i] = np.tile(steps, len(counts))
            rest = self._fill(role, capped, order[place + 1 :])
            least = self._least_with(role, grown @ self._cost[members], grown @ best, rest, rate, capped)
            kept = (least <= bound * (1 + _ROUNDING)) & self._within(role, grown)
            counts, least = grown[kept], least[kept]
            if len(counts) > MAX_MIXES:
                exact = False
                counts = counts[np.argsort(least, kind="stable")[:MAX_MIXES]]
        needed = (
            self._of_pool[:, members] @ counts.T
            >= np.where(self._of_pool[:, members].any(axis=1), self._pool_least, 0)[:, None]
        )
        counts = counts[needed.all(axis=0)]
        cost, watts = counts @ self._cost[members], counts @ self._watts[members]
        by_cost = np.lexsort((counts.sum(axis=1), watts, cost))
        counts = counts[by_cost]
        rates = self._capacities[role].of(counts) if members else np.zeros(len(counts))
        return _Mixes(counts, rates, cost[by_cost]), exact

    def _within(self, role: Role, counts: Counts) -> NDArray[np.bool_]:
        """Which mixes of one role keep to the limits by themselves."""
        members = self._members[role]
        replicas = counts @ self._of_pool[:, members].T
        return (
            (self._used(role, counts) <= self._in_stock).all(axis=1)
            & (replicas <= self._pool_most).all(axis=1)
            & (counts @ self._watts[members] <= self._limits.max_watts * (1 + _ROUNDING))
        )

    # The least that a rate costs when replicas could be cut into pieces.

    def _least_cost(self, rate: float, capped: Mapping[Role, Counts]) -> float:
        none = np.zeros(1)
        everything = self._fill(Role.UNIFIED, capped)
        return float(self._least_with(Role.UNIFIED, none, none, everything, rate, capped)[0])

    def _least_with(
        self, role: Role, cost: Rates, carried: Rates, rest: _Fill, rate: float, capped: Mapping[Role, Counts]
    ) -> Rates:
        """The least cost of plans that contain mixes of `role`.

        The cost is a convex, piecewise linear function of how much goes to separate pools: its least value lies at one
        of its kinks.

        Args:
            cost, carried: of each mix, shape [mixes].
            rest: what the role's options that are not in the mixes yet would cost.
        """
        fills = {other: rest if other is role else self._fill(other, capped) for other in Role}
        prefill, decode, unified = fills[Role.PREFILL], fills[Role.DECODE], fills[Role.UNIFIED]
        have = {other: carried if other is role else 0.0 for other in Role}
        kinks = [have[Role.PREFILL] + prefill.rates[:, None], have[Role.DECODE] + decode.rates[:, None]]
        kinks += [rate - have[Role.UNIFIED] - unified.rates[:, None], np.array([[0.0], [rate]])]
        least = np.full(len(cost), np.inf)
        for kink in kinks:
            for row in kink:
                separate = np.clip(row, 0.0, rate)
                total = cost + prefill.costs(np.maximum(separate - have[Role.PREFILL], 0.0))
                total += decode.costs(np.maximum(separate - have[Role.DECODE], 0.0))
                total += unified.costs(np.maximum(rate - separate - have[Role.UNIFIED], 0.0))
                np.minimum(least, total, out=least)
        return least

    def _fill(self, role: Role, capped: Mapping[Role, Counts], options: Sequence[int] | None = None) -> _Fill:
        """What the role's `options` cost in pieces; all of them where not said."""
        members, most = self._members[role], capped[role]
        best = self._capacities[role].at_most(int(most.sum())) if members else np.zeros(0)
        chosen = range(len(members)) if options is None else options
        return _Fill([(self._cost[members[i]], best[i], most[i]) for i in chosen])

    def _join(self, lists: Mapping[Role, _Mixes], rate: float) -> Counts | None:
        """The best plan made of one mix of each role."""
        prefill, decode, unified = (lists[role] for role in (Role.PREFILL, Role.DECODE, Role.UNIFIED))
        needs = np.maximum(rate - unified.rates, 0.0) * (1 - _ROUNDING)
        left = self._in_stock - self._used(Role.UNIFIED, unified.counts)
        least = unified.cost + prefill.least_cost(needs) + decode.least_cost(needs)
        least[self._separate_at_most(left) < needs] = np.inf
        prefill_used, per_device = self._used(Role.PREFILL, prefill.counts), self._rate_per_device(Role.DECODE)
        best: tuple[float, float, int] = (math.inf, math.inf, 0)
        found: Counts | None = None
        for u in np.argsort(least, kind="stable"):
            if not math.isfinite(least[u]) or least[u] > best[0]:
                break
            enough = np.flatnonzero(decode.rates >= needs[u])
            left_over = left[u] - prefill_used
            fits = (prefill.rates >= needs[u]) & (left_over >= 0).all(axis=1) & (left_over @ per_device >= needs[u])
            for p in np.flatnonzero(fits):
                if unified.cost[u] + prefill.cost[p] + decode.cost[enough[0]] > best[0]:
                    break
                plan = self._completed(self._whole(unified.counts[u], prefill.counts[p]), decode.counts, enough)
                if plan is not None:
                    rank = (float(self._cost @ plan), float(self._watts @ plan), int(plan.sum()))
                    if rank < best:
                        best, found = rank, plan
        return found

    def _separate_at_most(self, left: Counts) -> Rates:
        """Requests per second that no prefill and decode replicas on the devices `left` can exceed.

        By duality: whatever weight the two roles get, the lesser rate is at most the weighted mean of both, and each
        device does best in one of them. Shape: left [mixes, stocks] -> [mixes].
        """
        prefill, decode = self._rate_per_device(Role.PREFILL), self._rate_per_device(Role.DECODE)
        most = np.full(len(left), np.inf)
        for weight in np.linspace(0.0, 1.0, 33):
            np.minimum(most, left @ np.maximum(weight * prefill, (1 - weight) * decode), out=most)
        return most * (1 + _ROUNDING)

    def _rate_per_device(self, role: Role) -> Rates:
        """The most requests per second that a device can carry in a role. Shape [stocks]."""
        members = self._members[role]
        if not members:
            return np.zeros(len(self._in_stock))
        rates = self._capacities[role].rates.max(axis=1) / self._devices[members]
        most: Rates = (self._of_stock[:, members] * rates).max(axis=1)
        return most

    def _used(self, role: Role, counts: Counts) -> Counts:
        """Devices that mixes of a role take. Shape: counts [mixes, options of the role] -> [mixes, stocks]."""
        members = self._members[role]
        used: Counts = (counts * self._devices[members]) @ self._of_stock[:, members].T
        return used

    def _completed(self, mix: Counts, decode: Counts, enough: NDArray[np.int64]) -> Counts | None:
        """`mix` with the cheapest of the `enough` mixes of decode replicas that the limits allow beside it."""
        fits = self._fitting(mix, decode[enough[:1]])
        if not fits[0]:
            fits = self._fitting(mix, decode[enough])
            if not fits.any():
                return None
        plan = mix.copy()
        plan[self._members[Role.DECODE]] = decode[enough[int(np.argmax(fits))]]
        return plan

    def _whole(self, unified: Counts, prefill: Counts) -> Counts:
        mix = np.zeros(len(self._cost), dtype=np.int64)
        mix[self._members[Role.UNIFIED]] = unified
        mix[self._members[Role.PREFILL]] = prefill
        return mix

    def _fitting(self, mix: Counts, decode: Counts) -> NDArray[np.bool_]:
        """Which mixes of decode replicas keep to the limits beside `mix`."""
        members = self._members[Role.DECODE]
        left = self._in_stock - self._of_stock @ (mix * self._devices)
        used = self._used(Role.DECODE, decode)
        replicas = decode @ self._of_pool[:, members].T + self._of_pool @ mix
        return (
            (used <= left).all(axis=1)
            & (replicas <= self._pool_most).all(axis=1)
            & (self._watts @ mix + decode @ self._watts[members] <= self._limits.max_watts * (1 + _ROUNDING))
            & (self._cost @ mix + decode @ self._cost[members] <= self._limits.max_cost_per_hour * (1 + _ROUNDING))
        )


class _Fill:
    """The least cost of a rate when each option can be bought in pieces: cheapest requests first."""

    def __init__(self, options: list[tuple[float, float, int]]) -> None:
        """Options as (price, requests per second of a replica, replicas at most)."""
        useful = sorted(
            ((price / rate, rate * most, price * most) for price, rate, most in options if rate > 0 and most > 0)
        )
        self.rates = np.concatenate(([0.0], np.cumsum([rate for _, rate, _ in useful])))
        """Where the price of a further request changes, from 0 to all that the options carry. Shape [kinks]."""
        self._costs = np.concatenate(([0.0], np.cumsum([cost for _, _, cost in useful])))

    def costs(self, rates: Rates) -> Rates:
        """Infinite where all options together do not carry the rate. Shape [rates]."""
        costs = np.interp(rates, self.rates, self._costs)
        return np.where(rates > self.rates[-1] * (1 + _ROUNDING), np.inf, costs)


def _membership(groups: Sequence[object], of_options: Sequence[object]) -> Counts:
    """1 where an option belongs to a group. Shape [groups, options]."""
    cells = [[group == mine for mine in of_options] for group in groups]
    return np.array(cells, dtype=np.int64).reshape(len(groups), len(of_options))


def _price(cost: float, rate: float) -> float:
    return cost / rate if rate > 0 else math.inf
