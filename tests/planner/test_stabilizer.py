"""Steps towards plans: up at once, down late, nothing to and fro."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass, field, replace

import pytest

from tandem.planner.objectives import Demand, Slo
from tandem.planner.pool_plan import Planner, Problem
from tandem.planner.pools import Limits, OptionKey, PoolBounds
from tandem.planner.queueing import Role
from tandem.planner.stabilizer import Decision, Replicas, Stabilizer, StabilizerSettings, StepKind
from tests.planner.replicas import CHAT, SPLIT, options, stock

SLO = Slo(0.8, 0.06, 95.0)
P, D = OptionKey("prefill", "large"), OptionKey("decode", "large")
PROBLEM = Problem(options(["large"], SPLIT), CHAT, SLO, stock(["large"], 50))


PLANNER = Planner(PROBLEM)


@dataclass
class Cluster:
    """Does what it is told: replicas take `start_s` to start."""

    start_s: float = 60.0
    ready: dict[OptionKey, int] = field(default_factory=dict)
    starting: list[tuple[float, OptionKey]] = field(default_factory=list)
    changes: int = 0

    def fleet(self, now_s: float) -> dict[OptionKey, Replicas]:
        for asked, key in [one for one in self.starting if now_s - one[0] >= self.start_s]:
            self.starting.remove((asked, key))
            self.ready[key] = self.ready.get(key, 0) + 1
        keys = {*self.ready, *(key for _, key in self.starting)}
        return {
            key: Replicas(self.ready.get(key, 0), tuple(asked for asked, k in self.starting if k == key))
            for key in keys
        }

    def do(self, now_s: float, decision: Decision) -> None:
        for step in decision.steps:
            self.changes += 1
            for _ in range(step.replicas):
                if step.kind is StepKind.START:
                    self.starting.append((now_s, step.key))
                elif step.kind is StepKind.WITHDRAW:
                    self.starting.remove(max(one for one in self.starting if one[1] == step.key))
                else:
                    self.ready[step.key] -= 1
                    if step.to is not None:
                        self.ready[step.to] = self.ready.get(step.to, 0) + 1
        assert all(n >= 0 for n in self.ready.values())

    def counts(self) -> dict[OptionKey, int]:
        counts = dict(self.ready)
        for _, key in self.starting:
            counts[key] = counts.get(key, 0) + 1
        return {key: n for key, n in counts.items() if n}


def live(
    cluster: Cluster, stabilizer: Stabilizer, rate: Callable[[float], float], seconds: float, planner: Planner = PLANNER
) -> None:
    now = 0.0
    while now <= seconds:
        fleet = cluster.fleet(now)
        cluster.do(now, stabilizer.decide(now, planner, rate(now), fleet, stale=False))
        now += 15.0


def settled(rate: float) -> Cluster:
    cluster = Cluster()
    live(cluster, Stabilizer(), lambda _: rate, 900.0)
    return cluster


def test_what_is_missing_is_started_at_once_and_counts_as_arriving() -> None:
    stabilizer = Stabilizer()
    first = stabilizer.decide(0.0, PLANNER, 30.0, {}, stale=False)
    assert {step.kind for step in first.steps} == {StepKind.START}
    assert PLANNER.carried_by(first.target.counts) >= 30.0
    starting = {step.key: Replicas(0, (0.0,) * step.replicas) for step in first.steps}
    assert stabilizer.decide(10.0, PLANNER, 30.0, starting, stale=False).steps == ()


def test_replicas_go_only_after_the_window_and_leave_room() -> None:
    stabilizer, cluster = Stabilizer(StabilizerSettings(window_s=300.0)), settled(60.0)
    before = cluster.counts()
    for now in range(0, 300, 10):
        rate = 60.0 if now == 0 else 10.0
        assert stabilizer.decide(now, PLANNER, rate, cluster.fleet(now), stale=False).steps == ()
    steps = stabilizer.decide(310.0, PLANNER, 10.0, cluster.fleet(310.0), stale=False)
    assert {step.kind for step in steps.steps} == {StepKind.DRAIN}
    assert sum(steps.target.counts.values()) < sum(before.values())
    assert PLANNER.carried_by(steps.target.counts) >= 11.0


def test_what_starts_is_withdrawn_before_what_is_ready_is_drained() -> None:
    cluster = settled(10.0)
    stabilizer = Stabilizer(StabilizerSettings(window_s=20.0))
    cluster.do(0.0, stabilizer.decide(0.0, PLANNER, 80.0, cluster.fleet(0.0), stale=False))
    assert cluster.starting
    later = [stabilizer.decide(now, PLANNER, 10.0, cluster.fleet(now), stale=False) for now in (10.0, 30.0)]
    steps = [step for decision in later for step in decision.steps]
    assert {step.kind for step in steps} == {StepKind.WITHDRAW}


@pytest.mark.parametrize("rate", [3.0, 17.0, 29.0, 61.0])
def test_a_steady_noisy_load_changes_nothing_after_a_while(rate: float) -> None:
    """Noise of 5 %: fewer than one change in ten minutes."""
    draw = random.Random(11)
    cluster, stabilizer = Cluster(), Stabilizer()
    live(cluster, stabilizer, lambda _: rate * draw.gauss(1.0, 0.05), 600.0)
    cluster.changes = 0
    live(cluster, stabilizer, lambda _: rate * draw.gauss(1.0, 0.05), 6000.0)
    assert cluster.changes < 10


def test_a_day_ends_with_what_it_began_with() -> None:
    cluster = settled(10.0)
    before = cluster.counts()
    live(cluster, Stabilizer(), lambda now: 60.0 if 600 < now < 1200 else 10.0, 3000.0)
    after = cluster.counts()
    assert sum(after.values()) <= sum(before.values()) + 1


def test_a_replica_that_never_starts_is_replaced() -> None:
    stabilizer = Stabilizer()
    for _ in range(5):
        stabilizer.observe_start("large", 50.0)
    fleet = {P: Replicas(0, (0.0, 0.0)), D: Replicas(1)}
    assert stabilizer.decide(150.0, PLANNER, 15.0, fleet, stale=False).steps == ()
    late = stabilizer.decide(250.0, PLANNER, 15.0, fleet, stale=False)
    assert late.stuck == {P: 2}
    assert [(step.kind, step.key) for step in late.steps if step.kind is StepKind.START] == [(StepKind.START, P)]


def test_start_up_times_are_learned_by_class() -> None:
    stabilizer = Stabilizer(StabilizerSettings(start_s=120.0))
    for seconds in (30.0, 31.0, 32.0, 33.0, 300.0):
        stabilizer.observe_start("large", seconds)
    assert 30.0 <= stabilizer.start_s("large") <= 33.0
    assert stabilizer.start_s("small") == 120.0


def test_a_spare_replica_changes_its_role_where_that_is_faster() -> None:
    """Long answers turned into long prompts: decode replicas are spare, prefill replicas are missing."""
    limits = stock(["large"], 8)
    problem = replace(PROBLEM, limits=limits)
    fleet = {P: Replicas(1), D: Replicas(6)}
    quick = Stabilizer(StabilizerSettings(role_change_s=5.0, start_s=120.0))
    steps = quick.decide(0.0, Planner(problem), 30.0, fleet, stale=False).steps
    assert {step.kind for step in steps} >= {StepKind.CHANGE_ROLE}
    assert all((step.key, step.to) == (D, P) for step in steps if step.kind is StepKind.CHANGE_ROLE)
    slow = Stabilizer(StabilizerSettings(role_change_s=500.0, start_s=120.0))
    roomy = Planner(replace(problem, limits=stock(["large"], 20)))
    kinds = {step.kind for step in slow.decide(0.0, roomy, 30.0, fleet, stale=False).steps}
    assert StepKind.CHANGE_ROLE not in kinds


def test_while_the_demand_is_stale_only_losses_are_made_good() -> None:
    cluster, stabilizer = settled(30.0), Stabilizer()
    stabilizer.decide(0.0, PLANNER, 30.0, cluster.fleet(0.0), stale=False)
    for rate in (0.0, 500.0):
        assert stabilizer.decide(5000.0, PLANNER, rate, cluster.fleet(5000.0), stale=True).steps == ()
    cluster.ready[P] -= 1
    decision = stabilizer.decide(5010.0, PLANNER, 0.0, cluster.fleet(5010.0), stale=True)
    assert [(step.kind, step.key, step.replicas) for step in decision.steps] == [(StepKind.START, P, 1)]
    assert decision.held


def test_ready_replicas_are_not_drained_for_ones_that_only_start() -> None:
    """More of another class is on its way than is needed; until it is ready all that is ready stays."""
    ways = options(["large", "medium"], SPLIT)
    planner = Planner(replace(PROBLEM, options=ways, limits=stock(["large", "medium"], 50)))
    ready = {P: 3, D: 1}
    rate = planner.carried_by(ready) / 1.1
    fleet = {P: Replicas(3), D: Replicas(1), OptionKey("prefill", "medium"): Replicas(0, (0.0,) * 12)}
    steps = Stabilizer().decide(10.0, planner, rate, fleet, stale=False).steps
    assert {step.kind for step in steps} <= {StepKind.WITHDRAW}
    fleet = {P: Replicas(3), D: Replicas(1), OptionKey("prefill", "medium"): Replicas(12)}
    steps = Stabilizer().decide(10.0, planner, rate, fleet, stale=False).steps
    assert {step.kind for step in steps} == {StepKind.DRAIN}


def test_limits_are_said_when_the_demand_cannot_be_met() -> None:
    problem = replace(PROBLEM, limits=Limits({("large", False): 3}))
    decision = Stabilizer().decide(0.0, Planner(problem), 90.0, {}, stale=False)
    assert decision.target.replicas == 3
    assert decision.target.limited_by


def test_without_traffic_the_least_replicas_stay() -> None:
    problem = replace(PROBLEM, bounds={"prefill": PoolBounds(1), "decode": PoolBounds(1)}, demand=Demand())
    cluster = Cluster(ready={P: 3, D: 2})
    live(cluster, Stabilizer(), lambda _: 0.0, 900.0, Planner(problem))
    assert cluster.counts() == {P: 1, D: 1}
    empty = Stabilizer().decide(0.0, Planner(problem), 0.0, {}, stale=False)
    assert {(step.kind, step.key) for step in empty.steps} == {(StepKind.START, P), (StepKind.START, D)}


def test_unified_and_separate_pools_live_side_by_side() -> None:
    problem = replace(PROBLEM, options=options(["large", "medium"], Role), limits=stock(["large", "medium"], 20))
    cluster = Cluster()
    live(cluster, Stabilizer(), lambda now: 20.0 + now / 60, 1800.0, Planner(problem))
    assert Planner(problem).carried_by(cluster.counts()) >= 50.0
