"""The cheapest pools that keep an SLO for a demand; where there are none, the most that can be served, and why.

plan = plan_pools(Problem(options, demand, slo, limits, bounds))
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

from tandem.planner.capacity import Capacity, load
from tandem.planner.objectives import Demand, Slo
from tandem.planner.pools import Limit, LimitKind, Limits, Option, OptionKey, PoolBounds, PoolPlan, PoolShare
from tandem.planner.queueing import Latency, Role, latency
from tandem.planner.search import Search

_NEARLY = 0.98


@dataclass(frozen=True, slots=True)
class Problem:
    """Everything that a plan depends on."""

    options: Sequence[Option]
    demand: Demand
    slo: Slo
    limits: Limits
    bounds: Mapping[str, PoolBounds] = field(default_factory=dict)


class Planner:
    """Plans for one problem, and for other rates of the same kind of requests. What mixes carry is worked out once."""

    def __init__(self, problem: Problem) -> None:
        self.problem = problem
        devices = {option.key: problem.limits.inventory.get(option.stock, 0) for option in problem.options}
        self._capacities = {
            role: Capacity(mine, problem.demand, problem.slo, sum(devices[option.key] for option in mine))
            for role, mine in ((role, [o for o in problem.options if o.role is role]) for role in Role)
        }

        self._whole = self._search(problem.limits, problem.bounds, None, None)

    def cheapest(
        self,
        rate: float | None = None,
        at_least: Mapping[OptionKey, int] | None = None,
        at_most: Mapping[OptionKey, int] | None = None,
    ) -> PoolPlan:
        """The cheapest plan; the one that serves most, with what limits it, where none serves everything.

        Args:
            rate: requests per second, where they are not the demand's.
            at_least: replicas that are kept.
            at_most: replicas of which the plan is a part; None: any.
        """
        wanted = self.problem.demand.requests_per_s if rate is None else rate
        search = self._search(self.problem.limits, self.problem.bounds, at_least, at_most)
        found = search.cheapest(wanted)
        if found is not None:
            return self._plan(found.counts, wanted, wanted, (), found.exact)
        served = search.highest_rate(wanted)
        found = search.cheapest(served)
        if found is None:
            counts = tuple((at_least or {}).get(option.key, 0) for option in self.problem.options)
            return self._plan(counts, 0.0, wanted, self._limits(wanted, 0.0, at_least, at_most), exact=True)
        return self._plan(found.counts, served, wanted, self._limits(wanted, served, at_least, at_most), found.exact)

    def carried_by(self, counts: Mapping[OptionKey, int]) -> float:
        """Requests per second within the SLO that these replicas carry."""
        return self._whole.carries(self._in_order(counts))

    def describe(self, counts: Mapping[OptionKey, int], rate: float | None = None) -> PoolPlan:
        """The prediction for given replicas, whatever they cost."""
        wanted = self.problem.demand.requests_per_s if rate is None else rate
        return self._plan(self._in_order(counts), min(self.carried_by(counts), wanted), wanted, (), exact=True)

    def _in_order(self, counts: Mapping[OptionKey, int]) -> list[int]:
        return [counts.get(option.key, 0) for option in self.problem.options]

    def _search(
        self,
        limits: Limits,
        bounds: Mapping[str, PoolBounds],
        at_least: Mapping[OptionKey, int] | None,
        at_most: Mapping[OptionKey, int] | None,
    ) -> Search:
        return Search(self.problem.options, self._capacities, bounds, limits, at_least, at_most)

    def _plan(
        self, counts: Sequence[int], served: float, requested: float, limited_by: tuple[Limit, ...], exact: bool
    ) -> PoolPlan:
        options = self.problem.options
        shares = self._shares(counts, served)
        return PoolPlan(
            counts={option.key: n for option, n in zip(options, counts, strict=True) if n},
            requested=requested,
            served=served,
            cost_per_hour=sum(n * option.price_per_hour for option, n in zip(options, counts, strict=True)),
            watts=sum(n * option.watts for option, n in zip(options, counts, strict=True)),
            ttft_s=max((share.latency.ttft_s for share in shares), default=0.0),
            tpot_s=max((share.latency.tpot_s for share in shares), default=0.0),
            shares=shares,
            limited_by=limited_by,
            exact=exact,
        )

    def _shares(self, counts: Sequence[int], served: float) -> tuple[PoolShare, ...]:
        """The traffic goes to unified and separate pools, and within a role to its options, by what they carry."""
        options = self.problem.options
        of_role = {role: [i for i, option in enumerate(options) if option.role is role] for role in Role}
        carried: dict[Role, list[float]] = {
            role: list(self._capacities[role].of_each([counts[i] for i in members])) if members else []
            for role, members in of_role.items()
        }
        total = {role: float(sum(rates)) for role, rates in carried.items()}
        separate = min(total[Role.PREFILL], total[Role.DECODE])
        everything = separate + total[Role.UNIFIED]
        shares = []
        for role, members in of_role.items():
            mine = separate if role is not Role.UNIFIED else total[role]
            rate = served * mine / everything if everything > 0 else 0.0
            mix = [counts[i] for i in members]
            for place, (i, capacity) in enumerate(zip(members, carried[role], strict=True)):
                if counts[i]:
                    part = rate * float(capacity) / total[role] if total[role] > 0 else 0.0
                    size = self._capacities[role].pool_size(mix, place)
                    shares.append(self._share(options[i], counts[i], size, part, float(capacity)))
        return tuple(shares)

    def _share(self, option: Option, count: int, pool_size: int, rate: float, capacity: float) -> PoolShare:
        pool = load(option, self.problem.demand, self.problem.slo, pool_size)
        scale = pool_size / count
        seen = latency(option.role, pool, rate * scale)
        binds = self._binds(latency(option.role, pool, capacity * scale))
        return PoolShare(option.key, option.role, count, rate, capacity, seen, binds)

    def _binds(self, at_capacity: Latency) -> str:
        slo = self.problem.slo
        near = {
            "ttft": at_capacity.ttft_s / slo.ttft_s,
            "tpot": at_capacity.tpot_s / slo.tpot_s,
            "kv": at_capacity.kv_share,
        }
        name, closeness = max(near.items(), key=lambda item: item[1])
        return name if closeness >= _NEARLY else "batch" if at_capacity.running > 0 else "compute"

    # Why not more.

    def _limits(
        self,
        wanted: float,
        served: float,
        at_least: Mapping[OptionKey, int] | None,
        at_most: Mapping[OptionKey, int] | None,
    ) -> tuple[Limit, ...]:
        """What stands in the way: each limit whose absence would let more be served."""
        missing = self._missing_roles()
        if missing:
            return missing
        reasons = []
        more = min(wanted, served * 1.02 + 1e-6)
        for kind, subject, text, limits, bounds in self._relaxed():
            if self._search(limits, bounds, at_least, at_most).feasible(more):
                reasons.append(Limit(kind, subject, text))
        return tuple(reasons) or (
            Limit(LimitKind.INVENTORY, "all", "several limits bind together: inventory, replicas, cost or power"),
        )

    def _missing_roles(self) -> tuple[Limit, ...]:
        options = self.problem.options
        able = {role: self._capacities[role].rates.max(initial=0.0) > 0 for role in Role}
        if able[Role.UNIFIED] or (able[Role.PREFILL] and able[Role.DECODE]):
            return ()
        reasons = []
        roles = {option.role for option in options}
        if Role.UNIFIED not in roles and not {Role.PREFILL, Role.DECODE} <= roles:
            return (Limit(LimitKind.NO_POOL, "pools", "a Unified pool, or a Prefill and a Decode pool, is needed"),)
        for role in sorted(roles):
            if not able[role]:
                reasons.append(self._out_of_reach(role))
        return tuple(reasons)

    def _out_of_reach(self, role: Role) -> Limit:
        """No replica meets the SLO, even alone with one request."""
        problem = self.problem
        best: tuple[float, str] = (math.inf, "")
        for option in problem.options:
            if option.role is role:
                alone = latency(role, load(option, problem.demand, problem.slo, 1024), 1e-9)
                misses = {
                    "TTFT": (
                        alone.ttft_s / problem.slo.ttft_s,
                        f"{alone.ttft_s:.3g} s, wanted {problem.slo.ttft_s:g} s",
                    ),
                    "TPOT": (
                        alone.tpot_s / problem.slo.tpot_s,
                        f"{alone.tpot_s:.3g} s, wanted {problem.slo.tpot_s:g} s",
                    ),
                    "KV memory": (alone.kv_share, f"{alone.kv_share:.3g} times what a replica holds"),
                }
                name, (excess, text) = max(misses.items(), key=lambda item: item[1][0])
                best = min(best, (excess, f"{name} on {option.key.hardware} is {text}"))
        return Limit(LimitKind.SLO, role, f"{role}: no class meets the SLO even when idle; nearest: {best[1]}")

    def _relaxed(self) -> list[tuple[LimitKind, str, str, Limits, Mapping[str, PoolBounds]]]:
        problem, limits = self.problem, self.problem.limits
        relaxed: list[tuple[LimitKind, str, str, Limits, Mapping[str, PoolBounds]]] = []
        for hardware, spot in sorted({o.stock for o in problem.options}):
            stock = limits.inventory.get((hardware, spot), 0)
            more = replace(limits, inventory={**limits.inventory, (hardware, spot): 10 * stock + 1000})
            name = f"{hardware}{' (spot)' if spot else ''}"
            text = f"all {stock} devices of {name} are in use" if stock else f"there is no {name}"
            relaxed.append((LimitKind.INVENTORY, name, text, more, problem.bounds))
        if math.isfinite(limits.max_cost_per_hour):
            text = f"the cost limit of {limits.max_cost_per_hour:g} per hour"
            more = replace(limits, max_cost_per_hour=math.inf)
            relaxed.append((LimitKind.COST, "maxCostPerHour", text, more, problem.bounds))
        if math.isfinite(limits.max_watts):
            text = f"the power limit of {limits.max_watts:g} W"
            relaxed.append(
                (LimitKind.POWER, "maxPowerWatts", text, replace(limits, max_watts=math.inf), problem.bounds)
            )
        for pool in sorted({option.key.pool for option in problem.options}):
            bound = problem.bounds.get(pool, PoolBounds())
            text = f"pool {pool} may have {bound.max_replicas} replicas (maxReplicas)"
            wider = {**problem.bounds, pool: replace(bound, max_replicas=10 * bound.max_replicas + 1000)}
            relaxed.append((LimitKind.REPLICAS, pool, text, limits, wider))
        return relaxed


def plan_pools(problem: Problem) -> PoolPlan:
    """The cheapest plan for a problem; see `Planner.cheapest`."""
    return Planner(problem).cheapest()
