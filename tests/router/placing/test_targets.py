"""What placement does for a deployment's targets: against a slow obvious reference, and as properties."""

from __future__ import annotations

import math
from statistics import NormalDist

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tandem.common.errors import ConfigError
from tandem.planner.perf_model import ModelShape, PerfModel
from tandem.router.fleet.load import Stalls, WorkerLoad
from tandem.router.placing.placement import Placement, Request, place
from tandem.router.placing.targets import SPREAD, Aim, Change, Targets, missed
from tandem.router.settings import RouterConfig

MODEL = PerfModel("nvidia-h100", ModelShape(8 * 10**9, 16 * 10**9, 131_072))
stalls = st.lists(st.tuples(st.floats(0.0, 20.0), st.floats(0.001, 2.0)), max_size=8).map(sorted)
seconds = st.floats(0.001, 5.0)
tight = st.floats(0.0005, 0.2)
percentiles = st.floats(50.0, 99.9)


def worker(slot: int, held_up: list[tuple[float, float]] | None = None, **fields: object) -> WorkerLoad:
    load = WorkerLoad(MODEL, slot, capacity_tokens=400_000, max_requests=256, name=f"w{slot}")
    for name, value in fields.items():
        setattr(load, name, value)
    for at, stall_s in held_up or []:
        load.stalls.add(at, 4.0, stall_s)
    return load


@settings(deadline=None)
@given(stalls, st.floats(20.0, 40.0), st.floats(0.0, 2.0), percentiles)
def test_stalls_are_the_faded_sum_and_spread_of_each(
    held_up: list[tuple[float, float]], now: float, more_s: float, percentile: float
) -> None:
    found = Stalls()
    for at, stall_s in held_up:
        found.add(at, 4.0, stall_s)
    left = [(math.exp(-(now - at) / 4.0), stall_s) for at, stall_s in held_up]
    deviations = NormalDist().inv_cdf(percentile / 100)
    mean = sum(share * stall_s for share, stall_s in left) + more_s
    variance = sum(share * stall_s**2 for share, stall_s in left) + more_s**2
    assert found.total_s(now, 4.0, more_s, deviations) == pytest.approx(mean + deviations * math.sqrt(variance))
    assert found.count_in(now, 4.0) == pytest.approx(sum(share for share, _ in left))


@settings(deadline=None)
@given(
    st.builds(Targets, ttft_s=seconds, tpot_s=tight, gap_s=tight, percentile=percentiles),
    seconds,
    st.integers(0, 30),
    st.integers(1, 400),
    st.floats(0.0, 1.0),
    tight,
    tight,
    st.integers(0, 5),
    st.integers(0, 5),
    st.floats(0.0, 10.0),
)
def test_what_is_missed_is_counted_request_by_request(
    targets: Targets,
    ttft_s: float,
    decoding: int,
    output_tokens: int,
    stall_s: float,
    step_s: float,
    more_s: float,
    before: int,
    handed_over: int,
    wait_s: float,
) -> None:
    load = worker(0, [(0.0, 0.1)] * before, decoding=decoding, requests=decoding + handed_over)
    aim, change = Aim(targets, output_tokens, wait_s, 0.0), Change(load, stall_s, step_s, step_s + more_s)
    deviations = NormalDist().inv_cdf(targets.percentile / 100)

    def short(estimate_s: float, target_s: float) -> float:
        return max(0.0, (estimate_s - target_s) / target_s)

    tokens = max(output_tokens - 1, 1)
    life_s = tokens * (step_s + more_s)
    calm = load.stalls.total_s(0.0, life_s, 0.0, deviations) / tokens
    held = load.stalls.total_s(0.0, life_s, stall_s, deviations) / tokens
    share_late = (before + 1) / tokens
    gap = stall_s if share_late > 1 - targets.percentile / 100 else 0.0
    expected = short(ttft_s + ttft_s * SPREAD * deviations, targets.ttft_s)
    expected += short(step_s + more_s + calm, targets.tpot_s) + short(step_s + more_s, targets.gap_s)
    share_arriving = 1.0 if wait_s <= ttft_s else ttft_s / wait_s
    for share in [1.0] * decoding + [share_arriving] * handed_over:
        expected += share * (short(step_s + more_s + held, targets.tpot_s) - short(step_s + calm, targets.tpot_s))
        expected += share * (short(step_s + more_s + gap, targets.gap_s) - short(step_s, targets.gap_s))
    assert missed(aim, ttft_s, change) == pytest.approx(expected, rel=1e-6, abs=1e-6)


busy = st.fixed_dictionaries(
    {
        "requests": st.integers(1, 60),
        "decoding": st.integers(0, 60),
        "kv_tokens": st.integers(0, 300_000),
        "waiting_s": st.floats(0, 2),
        "busy_until": st.floats(0, 20),
        "waiting": st.integers(0, 5),
    }
)


def chosen(targets: Targets | None, decode: dict[str, object], prefill: dict[str, object], tokens: int) -> Placement:
    return place([worker(0, **decode)], [worker(1, **prefill)], Request(tokens), {}, 10.0, targets=targets)


@settings(deadline=None)
@given(busy, busy, st.integers(1, 20_000), tight, st.floats(0.1, 0.999), st.sampled_from(["tpot_s", "gap_s"]))
def test_a_tighter_target_for_later_tokens_never_moves_a_prompt_to_those_who_decode(
    decode: dict[str, object], prefill: dict[str, object], tokens: int, target_s: float, tighter: float, name: str
) -> None:
    loose = chosen(Targets(**{name: target_s}), decode, prefill, tokens)
    strict = chosen(Targets(**{name: target_s * tighter}), decode, prefill, tokens)
    assert loose.prefill is None or strict.prefill is not None


@settings(deadline=None)
@given(busy, busy, st.integers(1, 20_000), seconds, st.floats(0.1, 0.999))
def test_a_tighter_first_token_never_moves_a_prompt_to_the_slower_way(
    decode: dict[str, object], prefill: dict[str, object], tokens: int, target_s: float, tighter: float
) -> None:
    loose = chosen(Targets(ttft_s=target_s), decode, prefill, tokens)
    strict = chosen(Targets(ttft_s=target_s * tighter), decode, prefill, tokens)
    here, apart = (next(way for way in loose.ways if (way.prefill_load is None) == local) for local in (True, False))
    if here.ttft_s < apart.ttft_s:
        assert strict.prefill is None or loose.prefill is not None
    elif here.ttft_s > apart.ttft_s:
        assert loose.prefill is None or strict.prefill is not None


@settings(deadline=None)
@given(busy, busy, st.integers(1, 20_000))
def test_targets_that_everything_meets_leave_the_choice_to_cost(
    decode: dict[str, object], prefill: dict[str, object], tokens: int
) -> None:
    easy = Targets(ttft_s=1e9, tpot_s=1e9, gap_s=1e9, percentile=50.0)
    assert chosen(easy, decode, prefill, tokens).prefill == chosen(None, decode, prefill, tokens).prefill


def test_steady_tokens_or_a_quick_start_as_the_deployment_says() -> None:
    """Twenty requests decode, and the prefill worker has a queue of half a second."""
    decode = {"requests": 20, "decoding": 20, "kv_tokens": 20_000}
    prefill = {"requests": 3, "waiting": 3, "waiting_s": 0.5, "busy_until": 10.5}
    assert chosen(Targets(ttft_s=0.3), decode, prefill, 4096).prefill is None
    assert chosen(Targets(gap_s=0.03, percentile=99.9), decode, prefill, 4096).prefill is not None
    assert chosen(Targets(gap_s=0.03, percentile=95.0), decode, prefill, 4096).prefill is None, "one of 256 may be late"


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("target_ttft_s", 0.0),
        ("target_tpot_s", -1.0),
        ("target_gap_s", math.inf),
        ("target_ttft_s", math.nan),
        ("target_percentile", 100.0),
        ("target_percentile", 49.0),
        ("target_percentile", math.nan),
    ],
)
def test_an_impossible_target_names_its_setting(name: str, value: float) -> None:
    with pytest.raises(ConfigError, match=name):
        RouterConfig(model="m", **{name: value})  # type: ignore[arg-type]


def test_targets_are_those_of_the_configuration() -> None:
    assert Targets.stated(RouterConfig(model="m", target_percentile=90.0)) is None
    stated = Targets.stated(RouterConfig(model="m", target_tpot_s=0.006, target_percentile=90.0))
    assert stated == Targets(math.inf, 0.006, math.inf, 90.0)
