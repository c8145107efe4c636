"""The search for the cheapest mix, against trying every mix."""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping
from dataclasses import dataclass, replace

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from tandem.planner.objectives import Slo
from tandem.planner.pool_plan import Planner, Problem
from tandem.planner.pools import Limits, Option, OptionKey, PoolBounds
from tandem.planner.queueing import Role
from tests.planner.replicas import CHAT, SPEEDS, SPLIT, options, stock

SLO = Slo(0.8, 0.06, 95.0)


@dataclass(frozen=True)
class Best:
    """What trying everything finds: (cost, watts, replicas) of the best mix, and the most that any mix carries."""

    rank: tuple[float, float, int] | None
    most: float


def tried(problem: Problem, at_least: Mapping[OptionKey, int], at_most: Mapping[OptionKey, int] | None) -> Best:
    """Every mix within the inventory, one after the other."""
    planner, rate = Planner(problem), problem.demand.requests_per_s
    rank, most = None, 0.0
    for counts in itertools.product(*(range(_stock(problem, option) + 1) for option in problem.options)):
        mix = {option.key: n for option, n in zip(problem.options, counts, strict=True)}
        if not _allowed(problem, mix) or any(n < at_least.get(key, 0) for key, n in mix.items()):
            continue
        if at_most is not None and any(n > at_most.get(key, 0) for key, n in mix.items()):
            continue
        carried = planner.carried_by(mix)
        most = max(most, carried)
        if carried >= rate * (1 - 1e-9):
            mine = (round(_sum(problem, mix, "price_per_hour"), 6), round(_sum(problem, mix, "watts"), 6), sum(counts))
            rank = mine if rank is None else min(rank, mine)
    return Best(rank, most)


def _stock(problem: Problem, option: Option) -> int:
    return problem.limits.inventory.get((option.key.hardware, option.key.spot), 0) // option.devices


def _sum(problem: Problem, mix: Mapping[OptionKey, int], what: str) -> float:
    return sum(mix[option.key] * float(getattr(option, what)) for option in problem.options)


def _allowed(problem: Problem, mix: Mapping[OptionKey, int]) -> bool:
    used: dict[tuple[str, bool], int] = {}
    pools: dict[str, int] = {}
    for option in problem.options:
        n = mix[option.key]
        place = (option.key.hardware, option.key.spot)
        used[place] = used.get(place, 0) + n * option.devices
        pools[option.key.pool] = pools.get(option.key.pool, 0) + n
    return (
        all(n <= problem.limits.inventory.get(place, 0) for place, n in used.items())
        and all(b.min_replicas <= pools.get(name, 0) <= b.max_replicas for name, b in problem.bounds.items())
        and _sum(problem, mix, "price_per_hour") <= problem.limits.max_cost_per_hour + 1e-9
        and _sum(problem, mix, "watts") <= problem.limits.max_watts + 1e-9
    )


Case = tuple[Problem, dict[OptionKey, int], dict[OptionKey, int] | None]


@st.composite
def problems(draw: st.DrawFn) -> Case:
    roles = draw(st.sampled_from([SPLIT, (Role.UNIFIED,), tuple(Role)]))
    classes = draw(st.lists(st.sampled_from(sorted(SPEEDS)), min_size=1, max_size=2, unique=True))
    ways = options(classes, roles, devices=draw(st.sampled_from([1, 1, 2])))
    ways = [replace(way, price_per_hour=way.price_per_hour * draw(st.sampled_from([0.5, 1.0, 1.4]))) for way in ways]
    limits = Limits(
        {(name, False): draw(st.integers(0, 3 if len(ways) > 4 else 4)) for name in classes},
        draw(st.sampled_from([math.inf, math.inf, 7.0, 12.0])),
        draw(st.sampled_from([math.inf, math.inf, 1500.0])),
    )
    bounds = {
        role.lower(): PoolBounds(draw(st.sampled_from([0, 0, 0, 1])), draw(st.sampled_from([1, 2, 50])))
        for role in roles
    }
    demand = replace(CHAT, requests_per_s=draw(st.sampled_from([0.0, 0.5, 3.0, 10.0, 25.0])))
    slo = Slo(draw(st.sampled_from([0.3, 0.8, 3.0])), draw(st.sampled_from([0.02, 0.06, math.inf])))
    at_least = {way.key: 1 for way in ways if draw(st.integers(0, 9)) == 0}
    at_most = {way.key: draw(st.integers(1, 3)) for way in ways} if draw(st.integers(0, 4)) == 0 else None
    return Problem(ways, demand, slo, limits, bounds), at_least, at_most


@given(case=problems())
@example(
    case=(Problem(options(["small"], SPLIT), replace(CHAT, requests_per_s=3.0), SLO, stock(["small"], 2)), {}, None)
)
@settings(max_examples=40)
def test_the_search_finds_what_trying_every_mix_finds(case: Case) -> None:
    problem, at_least, at_most = case
    plan, best = Planner(problem).cheapest(at_least=at_least, at_most=at_most), tried(problem, at_least, at_most)
    assert plan.exact
    if best.rank is not None:
        assert plan.feasible
        assert (round(plan.cost_per_hour, 6), round(plan.watts, 6), plan.replicas) == best.rank
    else:
        assert not plan.feasible
        assert plan.served == pytest.approx(min(best.most, problem.demand.requests_per_s), rel=2e-3, abs=1e-5)


@pytest.mark.parametrize("rate", [30.0, 300.0, 3000.0])
def test_large_fleets_are_planned_exactly(rate: float) -> None:
    """Nine counts up to hundreds of replicas; nothing that is a replica less carries the rate."""
    classes = sorted(SPEEDS)
    problem = Problem(options(classes, Role), replace(CHAT, requests_per_s=rate), SLO, stock(classes, 400))
    planner = Planner(problem)
    plan = planner.cheapest()
    assert plan.feasible
    assert plan.exact
    for key, n in plan.counts.items():
        assert planner.carried_by({**plan.counts, key: n - 1}) < rate


def test_a_replica_that_cannot_meet_the_slo_is_of_no_use_to_its_pool() -> None:
    slo = Slo(0.3, 0.06)
    both = options(["large", "small"], SPLIT)
    problem = Problem(both, replace(CHAT, requests_per_s=20.0), slo, stock(["large", "small"], 50))
    planner = Planner(problem)
    plan = planner.cheapest()
    assert not any(key.hardware == "small" for key in plan.counts if key.pool == "prefill")
    with_one = {**plan.counts, OptionKey("prefill", "small"): 1}
    assert planner.carried_by(with_one) == planner.carried_by(plan.counts)
