"""What a plan says of itself: what it predicts, what binds, and why it cannot serve more."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest

from tandem.common.errors import ConfigError
from tandem.planner.lengths import Lengths
from tandem.planner.objectives import Demand, Slo
from tandem.planner.pool_plan import Planner, Problem, plan_pools
from tandem.planner.pools import LimitKind, Limits, Option, OptionKey, PoolBounds
from tandem.planner.queueing import Role
from tests.planner.replicas import CHAT, SPLIT, PlainReplica, options, stock

SLO = Slo(0.8, 0.06, 95.0)
BUSY = replace(CHAT, requests_per_s=40.0)


def test_predictions_keep_the_slo_and_the_shares_add_up() -> None:
    plan = plan_pools(Problem(options(["large", "medium"], Role), BUSY, SLO, stock(["large", "medium"], 100)))
    assert plan.feasible
    assert plan.ttft_s <= SLO.ttft_s
    assert plan.tpot_s <= SLO.tpot_s
    by_role = {role: sum(s.rate for s in plan.shares if s.role is role) for role in Role}
    assert by_role[Role.PREFILL] == pytest.approx(by_role[Role.DECODE])
    assert by_role[Role.UNIFIED] + by_role[Role.PREFILL] == pytest.approx(40.0)
    assert all(share.rate <= share.capacity * (1 + 1e-9) for share in plan.shares)


@pytest.mark.parametrize(
    ("slo", "role", "binds"),
    [
        (Slo(0.3, 10.0), Role.PREFILL, "ttft"),
        (Slo(10.0, 0.02), Role.DECODE, "tpot"),
        (Slo(10.0, 10.0), Role.DECODE, "kv"),
    ],
)
def test_a_plan_names_the_goal_that_binds(slo: Slo, role: Role, binds: str) -> None:
    ways = options(["large"], SPLIT)
    if binds == "kv":
        ways = [replace(way, replica=PlainReplica(kv_tokens=30_000.0)) for way in ways]
    plan = plan_pools(Problem(ways, BUSY, slo, stock(["large"], 100)))
    assert {share.binds for share in plan.shares if share.role is role} == {binds}


@pytest.mark.parametrize(
    ("limits", "bounds", "kind", "subject"),
    [
        (stock(["large"], 3), {}, LimitKind.INVENTORY, "large"),
        (stock(["large"], 0), {}, LimitKind.INVENTORY, "large"),
        (Limits({("large", False): 99}, max_cost_per_hour=16.0), {}, LimitKind.COST, "maxCostPerHour"),
        (Limits({("large", False): 99}, max_watts=2200.0), {}, LimitKind.POWER, "maxPowerWatts"),
        (stock(["large"], 99), {"prefill": PoolBounds(0, 2)}, LimitKind.REPLICAS, "prefill"),
    ],
)
def test_what_cannot_be_served_names_the_limit(
    limits: Limits, bounds: dict[str, PoolBounds], kind: LimitKind, subject: str
) -> None:
    plan = plan_pools(Problem(options(["large"], SPLIT), BUSY, SLO, limits, bounds))
    assert not plan.feasible
    assert [(limit.kind, limit.subject) for limit in plan.limited_by] == [(kind, subject)]
    assert 0 <= plan.served < 40.0
    assert (plan.served > 0) == (limits.inventory[("large", False)] > 0)
    assert "of 40 requests/s" in plan.message


def test_goals_out_of_reach_say_how_near_the_nearest_class_comes() -> None:
    plan = plan_pools(Problem(options(["large", "small"], SPLIT), BUSY, Slo(0.05, 0.06), stock(["large", "small"], 9)))
    assert plan.served == 0
    assert [(limit.kind, limit.subject) for limit in plan.limited_by] == [(LimitKind.SLO, "Prefill")]
    assert "TTFT on large" in plan.limited_by[0].text
    assert "wanted 0.05 s" in plan.limited_by[0].text


def test_half_of_a_split_is_no_deployment() -> None:
    plan = plan_pools(Problem(options(["large"], [Role.PREFILL]), BUSY, SLO, stock(["large"], 9)))
    assert [limit.kind for limit in plan.limited_by] == [LimitKind.NO_POOL]


def test_without_traffic_only_the_least_replicas_are_kept() -> None:
    ways, limits = options(["large", "small"], SPLIT), stock(["large", "small"], 9)
    nothing = Problem(ways, Demand(), SLO, limits)
    assert plan_pools(nothing).counts == {}
    kept = plan_pools(replace(nothing, bounds={"prefill": PoolBounds(1), "decode": PoolBounds(2)}))
    assert kept.counts == {OptionKey("prefill", "small"): 1, OptionKey("decode", "small"): 2}


def test_cheap_spot_devices_are_taken_first_and_the_rest_on_demand() -> None:
    ways = options(["large"], SPLIT)
    spot = [replace(w, key=replace(w.key, spot=True), price_per_hour=w.price_per_hour / 3) for w in ways]
    plan = plan_pools(Problem([*ways, *spot], BUSY, SLO, Limits({("large", False): 50, ("large", True): 2})))
    assert plan.feasible
    assert sum(n for key, n in plan.counts.items() if key.spot) == 2
    assert sum(n for key, n in plan.counts.items() if not key.spot) > 0


def test_the_description_of_given_replicas_says_what_they_serve() -> None:
    problem = Problem(options(["large"], SPLIT), BUSY, SLO, stock(["large"], 99))
    few = {OptionKey("prefill", "large"): 1, OptionKey("decode", "large"): 1}
    described = Planner(problem).describe(few)
    assert described.counts == few
    assert not described.feasible
    assert 0 < described.served < 40.0


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda: Slo(ttft_s=0.0), "slo.ttft"),
        (lambda: Slo(tpot_s=math.nan), "slo.tpot"),
        (lambda: Slo(percentile=100.0), "slo.percentile"),
        (lambda: replace(CHAT, requests_per_s=math.nan), "requestsPerSecond"),
        (lambda: replace(CHAT, requests_per_s=-1.0), "requestsPerSecond"),
        (lambda: replace(CHAT, cached_share=1.5), "cachedShare"),
        (lambda: replace(CHAT, burstiness=math.inf), "burstiness"),
        (lambda: Demand(1.0), "lengths"),
        (lambda: Lengths.of([(math.nan, 1.0)]), "lengths"),
        (lambda: Lengths.of([(5.0, -1.0)]), "lengths"),
        (lambda: PoolBounds(3, 2), "minReplicas"),
        (lambda: Option(OptionKey("p", "g"), Role.PREFILL, PlainReplica(), math.nan, 1.0), "price"),
        (lambda: Option(OptionKey("p", "g"), Role.PREFILL, PlainReplica(), 1.0, 1.0, 0), "device"),
    ],
)
def test_nonsense_is_refused_by_name(make: object, says: str) -> None:
    assert callable(make)
    with pytest.raises(ConfigError, match=says):
        make()


def test_equal_lengths_become_one_point_and_many_keep_their_mean() -> None:
    assert Lengths.of([(5, 1), (5, 3), (1, 4)]).points == ((1, 0.5), (5, 0.5))
    lengths = [float(i * i % 977) for i in range(5000)]
    known = Lengths.from_samples(lengths)
    assert len(known.points) <= 64
    assert known.mean == pytest.approx(sum(lengths) / 5000)
    assert known.percentile(50) == pytest.approx(sorted(lengths)[2500], rel=0.05)
    assert Lengths().mean == Lengths().percentile(99) == 0
