"""Rows of a step while tenants compete: who has few is not made late by who has many, everybody gets turns, and nothing
changes for one alone or where rows cost nothing."""

from __future__ import annotations

from fractions import Fraction
from typing import Any

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from tandem.common.fairness import LAST_BAND
from tandem.engine.schedule.plan import StepPlan
from tandem.engine.schedule.row_shares import LEAST_SHARE, PROBE, SEEN, STRETCH, Claim, StepCost, StepTimes, shares
from tandem.engine.schedule.sequence import Sequence
from tests.engine.schedule.test_scheduler import Play, hash_free
from tests.engine_harness import make_sequence

BASE_S, ROW_S = 0.002, 0.0001


class SharedPlay(Play):
    """One whose rows may rest, and whose steps take longer with more rows."""

    rows_may_rest = True

    def __init__(self, row_s: float = ROW_S) -> None:
        super().__init__(num_blocks=3000, max_num_seqs=64, budget=512)
        self.step_s = lambda plan: BASE_S + row_s * plan.num_tokens

    def fill(self, tenant: str, rows: int, tokens: int = 2500, **options: int) -> list[Sequence]:
        return [self.add(f"{tenant}{index}", 4, tenant=tenant, max_tokens=tokens, **options) for index in range(rows)]

    def add(self, name: str, length: int, **options: Any) -> Sequence:
        tenant, weight = options.pop("tenant", "a"), options.pop("weight", 1.0)
        tokens = [hash_free(name, index) for index in range(length)]
        sequence = make_sequence(name, tokens, **({"max_tokens": 4} | options))
        sequence.request.tenant, sequence.request.weight = tenant, weight
        self.scheduler.add(sequence)
        return sequence

    def learn(self) -> None:
        """Steps of many sizes are seen."""
        anybody = make_sequence("anybody", [1])
        for rows in (1, 2, 4, 8, 16, 32, 60) * SEEN:
            plan = StepPlan(decodes=[anybody] * rows)
            self.scheduler.took(plan, self.step_s(plan))


def rows_of(plan: StepPlan, sequences: list[Sequence]) -> int:
    return sum(each in plan.decodes for each in sequences)


def test_a_tenant_with_few_rows_is_hardly_slower_beside_one_with_many() -> None:
    play = SharedPlay()
    play.learn()
    many, few = play.fill("many", 56), play.fill("few", 4)
    play.step()
    plans = [play.step() for _ in range(2 * PROBE)]
    assert all(rows_of(plan, few) == 4 for plan in plans)
    alone_s = BASE_S + ROW_S * 4
    slow = [plan for plan in plans if play.step_s(plan) > 1.5 * alone_s]
    assert len(slow) == 2, "the two that see what all rows cost"
    assert all(play.step_s(plan) <= 3.6 * alone_s for plan in slow)
    had = [play.emitted[each.key.request_id] for each in many]
    assert max(had) - min(had) <= 3, "its rows take turns"
    assert min(had) >= 2 * PROBE // 8


def test_a_tenant_alone_has_all_its_rows_and_so_has_everybody_once_the_other_is_gone() -> None:
    play = SharedPlay()
    play.learn()
    many, few = play.fill("many", 56), play.fill("few", 2, tokens=30)
    while not all(each.num_output == 30 for each in few):
        play.step()
    assert all(rows_of(play.step(), many) == 56 for _ in range(10))


def test_nobody_rests_where_rows_cost_nothing() -> None:
    play = SharedPlay(row_s=0.0)
    play.learn()
    everybody = play.fill("many", 56) + play.fill("few", 4)
    play.step()
    assert all(rows_of(play.step(), everybody) == 60 for _ in range(2 * PROBE))


def test_nobody_rests_among_equals() -> None:
    play = SharedPlay()
    play.learn()
    everybody = [each for tenant in "abcdef" for each in play.fill(tenant, 10)]
    play.step()
    assert all(rows_of(play.step(), everybody) == 60 for _ in range(2 * PROBE))


def test_who_waits_for_a_first_token_counts_too() -> None:
    play = SharedPlay()
    play.learn()
    many = play.fill("many", 56)
    play.step()
    play.add("prompt", 600, tenant="few")
    plan = play.step()
    assert plan.chunks
    assert rows_of(play.step(), many) < 56


def test_earlier_bands_never_rest_for_later_ones() -> None:
    play = SharedPlay()
    play.learn()
    early, late = play.fill("early band", 50, priority=0), play.fill("late band", 4, priority=1)
    play.step()
    assert all(rows_of(play.step(), early + late) == 54 for _ in range(PROBE))


def test_later_bands_rest_for_earlier_ones() -> None:
    play = SharedPlay()
    play.learn()
    early, late = play.fill("early band", 4, priority=0), play.fill("late band", 50, priority=1)
    play.step()
    plan = play.step()
    assert rows_of(plan, early) == 4
    assert 0 < rows_of(plan, late) < 25


def test_one_slow_step_is_not_what_a_row_costs() -> None:
    times = StepTimes()
    for _ in range(50):
        times.add(4, 0.002)
        times.add(40, 0.002)
    times.add(40, 10.0)
    for _ in range(50):
        times.add(4, 0.002)
        times.add(40, 0.002)
    assert times.cost().row_s < 1e-6
    assert times.cost().base_s == pytest.approx(0.002, rel=0.05)


def test_steps_of_one_size_say_nothing_about_rows() -> None:
    times = StepTimes()
    for _ in range(100):
        times.add(40, 0.5)
    assert times.cost() == StepCost()


@given(base=st.floats(0, 1), row=st.floats(0, 0.1), sizes=st.sets(st.sampled_from([1, 2, 4, 8, 32, 64]), min_size=2))
def test_the_cost_of_rows_is_found(base: float, row: float, sizes: set[int]) -> None:
    times = StepTimes()
    for rows in sizes:
        for _ in range(SEEN):
            times.add(rows, base + row * rows)
    cost = times.cost()
    assert (cost.base_s, cost.row_s) == (pytest.approx(base, abs=1e-6), pytest.approx(row, abs=1e-6))


def reference(claims: list[Claim], cost: StepCost) -> list[int]:
    """The same by trying: rows per weight grow by hundredths until the step would be too long."""
    granted = [claim.rows for claim in claims]
    if cost.row_s <= 0.0:
        return granted
    base = Fraction(cost.base_s) / Fraction(cost.row_s)
    for band in sorted({claim.band for claim in claims}):
        here = [index for index, claim in enumerate(claims) if claim.band == band]
        least = min(Fraction(claim.rows) / Fraction(claim.weight) for claim in claims if claim.band <= band)

        def rows(level: Fraction, here: list[int] = here) -> list[Fraction]:
            return [min(Fraction(claims[i].rows), level * Fraction(claims[i].weight)) for i in here]

        most = Fraction(STRETCH) * (base + sum(rows(least)))
        level = LEAST_SHARE * least
        while rows(level) != [claims[i].rows for i in here] and base + sum(rows(level + Fraction(1, 100))) <= most:
            level += Fraction(1, 100)
        for index, share in zip(here, rows(level), strict=True):
            granted[index] = max(1, int(share))
        base += sum(granted[index] for index in here)
    return granted


CLAIMS = st.builds(Claim, st.integers(0, 2), st.integers(1, 60), st.sampled_from([0.5, 1.0, 2.0, 4.0]))


@given(
    claims=st.lists(CLAIMS, min_size=1, max_size=6),
    cost=st.builds(StepCost, st.integers(0, 20).map(float), st.integers(0, 3).map(float)),
)
@example([Claim(0, 60, 1.0), Claim(0, 4, 1.0)], StepCost(20.0, 1.0))
def test_shares_are_those_of_the_slow_way(claims: list[Claim], cost: StepCost) -> None:
    granted, slow = shares(claims, cost), reference(claims, cost)
    for claim, mine, theirs in zip(claims, granted, slow, strict=True):
        assert 1 <= mine <= claim.rows
        assert abs(mine - theirs) <= 1 + sum(granted) // 40, "as far as hundredths and whole rows can tell"


@given(claims=st.lists(CLAIMS, min_size=1, max_size=8), base=st.floats(0, 100), row=st.floats(0.01, 3))
def test_who_has_least_never_rests_and_bands_are_strict(claims: list[Claim], base: float, row: float) -> None:
    cost = StepCost(base, row)
    granted = shares(claims, cost)
    least = min(claim.rows / claim.weight for claim in claims)
    for claim, rows in zip(claims, granted, strict=True):
        assert rows == claim.rows or claim.rows / claim.weight > least
    first = min(claim.band for claim in claims)
    kept = [(claim, rows) for claim, rows in zip(claims, granted, strict=True) if claim.band == first]
    assert shares([claim for claim, _ in kept], cost) == [rows for _, rows in kept]


@settings(max_examples=15)
@given(
    tenants=st.lists(
        st.tuples(st.integers(1, 20), st.integers(0, 2), st.sampled_from([0.5, 1.0, 3.0])), min_size=2, max_size=5
    )
)
def test_every_row_has_its_turn(tenants: list[tuple[int, int, float]]) -> None:
    play = SharedPlay()
    play.learn()
    for number, (rows, priority, weight) in enumerate(tenants):
        for index in range(min(rows, 60 // len(tenants))):
            play.add(f"{number}-{index}", 4, tenant=f"t{number}", priority=priority, weight=weight, max_tokens=3000)
    play.step()
    live = list(play.scheduler.roster.running)
    since = dict.fromkeys(live, 0)
    for _ in range(60):
        plan = play.step()
        assert plan.decodes
        for each in live:
            since[each] = 0 if each in plan.decodes else since[each] + 1
            assert since[each] <= 20, "as many steps as its tenant has rows, at most"


def test_the_last_band_is_not_shared_out_here() -> None:
    play = SharedPlay()
    play.learn()
    batches = play.fill("a", 40, priority=LAST_BAND) + play.fill("b", 2, priority=LAST_BAND)
    for _ in range(200):
        play.step()
    assert rows_of(play.step(), batches) == 42
