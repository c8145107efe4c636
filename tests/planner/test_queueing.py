"""The queueing model against a plain simulation, and in its extremes."""

from __future__ import annotations

import heapq
import math
import random
from dataclasses import replace

import pytest

from tandem.planner.lengths import Lengths
from tandem.planner.objectives import Slo
from tandem.planner.queueing import OVERLOADED, Load, Role, highest_rate, latency
from tests.planner.replicas import CHAT, PlainReplica


def simulated_ttft(load: Load, rate: float, requests: int, seed: int) -> float:
    """First come, first served, on `load.replicas` servers that take one prompt at a time: the percentile of waiting
    and service."""
    draw = random.Random(seed)
    tokens, shares = zip(*load.demand.prompt_tokens.points, strict=True)
    free_at = [0.0] * load.replicas
    now, seen = 0.0, []
    for _ in range(requests):
        now += draw.expovariate(rate)
        begin = max(now, heapq.heappop(free_at))
        end = begin + load.replica.prefill_s(draw.choices(tokens, shares)[0])
        heapq.heappush(free_at, end)
        seen.append(end - now)
    return sorted(seen)[int(load.percentile / 100 * requests)]


@pytest.mark.parametrize("replicas", [1, 4, 16])
@pytest.mark.parametrize("busy", [0.3, 0.6, 0.85])
def test_the_ttft_of_prefill_is_near_that_of_a_simulated_queue(replicas: int, busy: float) -> None:
    """One prompt at a time, as the simulation takes them."""
    load = Load(PlainReplica(), CHAT, 95.0, replicas, token_budget=1)
    mean_s = sum(share * load.replica.prefill_s(tokens) for tokens, share in CHAT.prompt_tokens.points)
    rate = busy * replicas / mean_s
    assert latency(Role.PREFILL, load, rate).ttft_s == pytest.approx(simulated_ttft(load, rate, 60_000, 7), rel=0.2)


def simulated_tpot(load: Load, rate: float, requests: int, seed: int) -> float:
    """One replica: all that run get a token per step; the percentile of seconds per token, of whole requests."""
    draw = random.Random(seed)
    prompts, prompt_shares = zip(*load.demand.prompt_tokens.points, strict=True)
    outputs, output_shares = zip(*load.demand.output_tokens.points, strict=True)
    now, due = 0.0, draw.expovariate(rate)
    running: list[list[float]] = []
    """(tokens left, tokens of context, begun, tokens in all)"""
    seen: list[float] = []
    while len(seen) < requests:
        while due <= now or not running:
            now = max(now, due)
            length = draw.choices(outputs, output_shares)[0] - 1
            running.append([length, draw.choices(prompts, prompt_shares)[0], now, length])
            due += draw.expovariate(rate)
        now += load.replica.decode_step_s(len(running), sum(context for _, context, _, _ in running))
        for one in running:
            one[0] -= 1
            one[1] += 1
        seen += [(now - begun) / total for left, _, begun, total in running if left <= 0]
        running = [one for one in running if one[0] > 0]
    return sorted(seen)[int(load.percentile / 100 * len(seen))]


@pytest.mark.parametrize("rate", [5.0, 20.0, 40.0])
def test_the_tpot_of_decode_is_near_that_of_simulated_steps(rate: float) -> None:
    load = Load(PlainReplica(), CHAT, 95.0, 1)
    moved_s = load.replica.transfer_s("handover", CHAT.prompt_tokens.mean) / (CHAT.output_tokens.mean - 1)
    predicted = latency(Role.DECODE, load, rate).tpot_s - moved_s
    assert predicted == pytest.approx(simulated_tpot(load, rate, 3000, 3), rel=0.25)


@pytest.mark.parametrize("role", list(Role))
def test_more_traffic_is_never_faster_and_more_replicas_are_never_slower(role: Role) -> None:
    before = latency(role, Load(PlainReplica(), CHAT, 95.0, 4), 1e-9)
    for rate in (1.0, 5.0, 20.0, 60.0, 200.0, 1000.0):
        now = latency(role, Load(PlainReplica(), CHAT, 95.0, 4), rate)
        wider = latency(role, Load(PlainReplica(), CHAT, 95.0, 8), rate)
        assert now.ttft_s >= before.ttft_s - 1e-9
        assert now.tpot_s >= before.tpot_s - 1e-9
        assert wider.ttft_s <= now.ttft_s + 1e-9
        assert wider.tpot_s <= now.tpot_s + 1e-9
        before = now
    assert before is OVERLOADED


@pytest.mark.parametrize("role", list(Role))
@pytest.mark.parametrize("replicas", [1, 3, 32])
def test_the_highest_rate_just_meets_the_slo(role: Role, replicas: int) -> None:
    slo = Slo(0.5, 0.03, 95.0)
    load = Load(PlainReplica(), CHAT, slo.percentile, replicas)
    rate = highest_rate(role, load, slo)
    assert rate > 0
    assert latency(role, load, rate).meets(slo)
    assert not latency(role, load, rate * 1.01).meets(slo)


def test_an_slo_that_an_idle_replica_misses_gives_no_rate() -> None:
    load = Load(PlainReplica(), CHAT, 95.0, 4)
    assert highest_rate(Role.PREFILL, load, Slo(ttft_s=0.01)) == 0.0
    assert highest_rate(Role.DECODE, load, Slo(tpot_s=0.005)) == 0.0


def test_requests_that_memory_does_not_hold_are_not_carried() -> None:
    """The longest context alone is more than the replica holds."""
    load = Load(PlainReplica(kv_tokens=3000.0), CHAT, 95.0, 4)
    assert highest_rate(Role.DECODE, load, Slo(tpot_s=10.0)) == 0.0


def test_little_memory_binds_before_time_does() -> None:
    slo = Slo(tpot_s=0.1)
    roomy = highest_rate(Role.DECODE, Load(PlainReplica(), CHAT, 95.0, 1), slo)
    tight = Load(PlainReplica(kv_tokens=50_000.0), CHAT, 95.0, 1)
    rate = highest_rate(Role.DECODE, tight, slo)
    assert 0 < rate < roomy / 2
    assert latency(Role.DECODE, tight, rate).kv_share == pytest.approx(1.0, abs=0.01)


def test_prompts_that_are_cached_cost_less() -> None:
    slo = Slo(0.5, 0.03)
    rates = [
        highest_rate(Role.PREFILL, Load(PlainReplica(), replace(CHAT, cached_share=share), 95.0, 2), slo)
        for share in (0.0, 0.5, 0.9, 1.0)
    ]
    assert rates == sorted(rates)
    assert math.isfinite(rates[-1])


def test_bursts_need_room() -> None:
    slo = Slo(0.3, 0.03)
    steady = highest_rate(Role.PREFILL, Load(PlainReplica(), CHAT, 95.0, 2), slo)
    bursty = highest_rate(Role.PREFILL, Load(PlainReplica(), replace(CHAT, burstiness=8.0), 95.0, 2), slo)
    assert bursty < steady


def test_answers_of_one_token_have_no_time_between_tokens() -> None:
    short = replace(CHAT, output_tokens=Lengths.of([(1, 1)]))
    assert latency(Role.DECODE, Load(PlainReplica(), short, 95.0, 1), 10.0).tpot_s == 0.0
