"""Demand from counters: rates, lengths, forecasts, bursts, and what is held when routers are silent."""

from __future__ import annotations

import math
import random
from dataclasses import replace

import pytest

from tandem.planner.demand import DemandMeter, DemandSettings, LengthCounts, Seen, Traffic

BOUNDS = (128.0, 512.0, 2048.0)
STEP_S = 10.0


def counted(requests: float, prompt: float = 300.0, output: float = 100.0, cached: float = 0.25) -> Traffic:
    """Totals after `requests` equal requests."""

    def lengths(tokens: float) -> LengthCounts:
        bucket = sum(tokens > bound for bound in BOUNDS)
        return LengthCounts(BOUNDS, tuple(requests if i == bucket else 0.0 for i in range(4)), tokens * requests)

    return Traffic(requests, cached * prompt * requests, lengths(prompt), lengths(output))


def run(meter: DemandMeter, rates: list[float], start_s: float = 0.0) -> Seen:
    """One router that counts `rates` requests per second, one rate per step."""
    total = 0.0
    meter.observe(start_s, {"a": counted(0.0)})
    for i, rate in enumerate(rates):
        total += rate * STEP_S
        meter.observe(start_s + (i + 1) * STEP_S, {"a": counted(total)})
    return meter.demand()


def test_a_steady_rate_is_seen_with_its_lengths() -> None:
    seen = run(DemandMeter(), [5.0] * 20)
    assert seen.demand.requests_per_s == pytest.approx(5.0)
    assert seen.demand.prompt_tokens.mean == pytest.approx(300.0)
    assert seen.demand.output_tokens.mean == pytest.approx(100.0)
    assert seen.demand.cached_share == pytest.approx(0.25)
    assert not seen.stale
    assert not seen.burst


def test_no_traffic_is_zero_and_fresh() -> None:
    seen = run(DemandMeter(), [0.0] * 5)
    assert seen.demand.requests_per_s == 0.0
    assert not seen.stale
    after = run(DemandMeter(), [5.0] * 10 + [0.0] * 60)
    assert after.demand.requests_per_s == pytest.approx(0.0, abs=1e-3)
    assert all(math.isfinite(x) for x in (after.demand.cached_share, after.demand.burstiness))


def test_nothing_seen_yet_is_stale() -> None:
    meter = DemandMeter()
    assert meter.demand().stale
    meter.observe(0.0, {"a": counted(100.0)})
    assert meter.demand().stale, "one look at totals says nothing of a rate"
    assert meter.demand().demand.requests_per_s == 0.0


def test_a_ramp_is_followed_ahead_of_time_and_levels_off() -> None:
    meter = DemandMeter()
    now = run(meter, [float(i) for i in range(30)]).demand.requests_per_s
    soon, later, at_last = (meter.demand(s).demand.requests_per_s for s in (20.0, 60.0, 1e6))
    assert now < soon < later <= at_last < 60.0
    assert math.isfinite(meter.demand(math.inf).demand.requests_per_s)


def test_a_falling_rate_is_never_forecast_below_zero() -> None:
    meter = DemandMeter()
    run(meter, [float(30 - i) for i in range(30)])
    assert meter.demand(600.0).demand.requests_per_s == 0.0


def test_a_burst_is_believed_at_once_and_noise_is_none() -> None:
    draw = random.Random(5)
    meter = DemandMeter()
    total = 0.0
    meter.observe(0.0, {"a": counted(0.0)})
    bursts = 0
    for i in range(200):
        total += sum(draw.random() < 0.05 for _ in range(1000))  # 50 requests in 10 seconds, with their noise
        meter.observe((i + 1) * STEP_S, {"a": counted(total)})
        bursts += meter.demand().burst
    assert bursts <= 6
    meter.observe(201 * STEP_S, {"a": counted(total + 400.0)})
    seen = meter.demand()
    assert seen.burst
    assert seen.demand.requests_per_s == pytest.approx(40.0)


def test_routers_add_up_and_one_that_starts_again_counts_from_zero() -> None:
    meter = DemandMeter()
    meter.observe(0.0, {"a": counted(1000.0), "b": counted(500.0)})
    for i in range(1, 8):
        meter.observe(i * STEP_S, {"a": counted(1000.0 + 20 * i), "b": counted(500.0 + 30 * i)})
    assert meter.demand().rate == pytest.approx(5.0)
    meter.observe(80.0, {"a": counted(20.0), "b": counted(740.0)})
    assert meter.demand().rate == pytest.approx(5.0)


def test_a_silent_router_makes_it_stale_and_what_was_known_is_held() -> None:
    meter = DemandMeter(DemandSettings(stale_after_s=60.0))
    for i in range(10):
        meter.observe(i * STEP_S, {"a": counted(30.0 * i), "b": counted(20.0 * i)})
    before = meter.demand().demand
    for i in range(10, 15):
        meter.observe(i * STEP_S, {"a": counted(30.0 * i), "b": None})
        assert meter.demand().stale
        assert meter.demand().missing == ("b",)
        assert meter.demand().demand == before
    for i in range(15, 40):
        meter.observe(i * STEP_S, {"a": counted(50.0 * i - 300), "b": None})
    gone = meter.demand()
    assert not gone.stale, "after a while it is gone, and its traffic comes through the other"
    assert gone.demand.requests_per_s == pytest.approx(5.0, rel=0.05)


def test_a_router_that_is_new_adds_its_traffic_from_the_next_look_on() -> None:
    meter = DemandMeter()
    meter.observe(0.0, {"a": counted(0.0)})
    meter.observe(10.0, {"a": counted(50.0), "b": counted(9000.0)})
    assert meter.demand().rate == pytest.approx(5.0)
    meter.observe(20.0, {"a": counted(100.0), "b": counted(9050.0)})
    assert meter.demand().rate == pytest.approx(10.0)


@pytest.mark.parametrize("wrong", [math.nan, math.inf, -5.0])
def test_rubbish_counts_as_silence(wrong: float) -> None:
    meter = DemandMeter()
    meter.observe(0.0, {"a": counted(0.0)})
    meter.observe(10.0, {"a": counted(50.0)})
    meter.observe(20.0, {"a": replace(counted(100.0), requests=wrong)})
    assert meter.demand().stale
    assert meter.demand().demand.requests_per_s == pytest.approx(5.0)


def test_old_lengths_are_forgotten() -> None:
    meter = DemandMeter(DemandSettings(lengths_memory_s=100.0))
    meter.observe(0.0, {"a": counted(0.0)})
    old, new = counted(1000.0, prompt=100.0), counted(1000.0, prompt=1000.0)
    meter.observe(10.0, {"a": old})
    both = LengthCounts(
        BOUNDS,
        tuple(x + y for x, y in zip(old.prompts.counts, new.prompts.counts, strict=True)),
        old.prompts.tokens + new.prompts.tokens,
    )
    meter.observe(1000.0, {"a": replace(old, requests=2000.0, prompts=both)})
    assert meter.demand().demand.prompt_tokens.mean == pytest.approx(1000.0, rel=0.01)


def test_traffic_in_clumps_counts_as_bursty() -> None:
    smooth = run(DemandMeter(), [5.0] * 300)
    clumps = run(DemandMeter(), [0.0, 0.0, 15.0] * 100)
    assert smooth.demand.burstiness == pytest.approx(1.0)
    assert clumps.demand.burstiness > 2.0
