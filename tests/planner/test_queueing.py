"""The queueing model against a plain simulation, and in its extremes."""

from __future__ import annotations

import heapq
import math
import random
from dataclasses import dataclass, replace

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
        end = begin + chunked_s(load, draw.choices(tokens, shares)[0])
        heapq.heappush(free_at, end)
        seen.append(end - now)
    return sorted(seen)[int(load.percentile / 100 * requests)]


def chunked_s(load: Load, tokens: float) -> float:
    """Seconds of a prompt in chunks of the token budget."""
    seconds, done = 0.0, 0.0
    while done < tokens:
        chunk = min(load.token_budget, tokens - done)
        seconds += load.replica.prefill_s(chunk, done)
        done += chunk
    return seconds


@pytest.mark.parametrize("replicas", [1, 4, 16])
@pytest.mark.parametrize("busy", [0.3, 0.6, 0.85])
def test_the_ttft_of_prefill_is_near_that_of_a_simulated_queue(replicas: int, busy: float) -> None:
    """One prompt at a time, as the simulation takes them: the budget is that of one chunk."""
    load = Load(PlainReplica(), CHAT, 95.0, replicas, token_budget=1000)
    mean_s = sum(share * chunked_s(load, tokens) for tokens, share in CHAT.prompt_tokens.points)
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


@dataclass
class Running:
    """A request in the simulation of a unified replica."""

    came: float
    prompt: float
    tokens: float
    """Length of the answer, without the first."""
    uncomputed: float = 0.0
    begun: float = 0.0
    left: float = 0.0


def simulated_unified(load: Load, rate: float, requests: int, seed: int) -> tuple[float, float]:
    """One replica whose steps hold a token for each that runs and chunks of prompts, first come, first served: the
    percentiles of TTFT and TPOT."""
    draw = random.Random(seed)
    prompts, prompt_shares = zip(*load.demand.prompt_tokens.points, strict=True)
    outputs, output_shares = zip(*load.demand.output_tokens.points, strict=True)
    floor = load.replica.decode_step_s(1, 1)
    now, due = 0.0, draw.expovariate(rate)
    waiting: list[Running] = []
    running: list[Running] = []
    ttft: list[float] = []
    tpot: list[float] = []
    while len(tpot) < requests:
        while due <= now or not (waiting or running):
            now = max(now, due)
            prompt = draw.choices(prompts, prompt_shares)[0]
            waiting.append(Running(now, prompt, draw.choices(outputs, output_shares)[0] - 1, uncomputed=prompt))
            due += draw.expovariate(rate)
        room = budget = load.token_budget - len(running)
        for one in waiting:
            chunk = min(one.uncomputed, room)
            one.uncomputed, room = one.uncomputed - chunk, room - chunk
        step_s = 0.0
        if running:
            contexts = sum(one.prompt + one.tokens - one.left for one in running)
            step_s = load.replica.decode_step_s(len(running), contexts)
        if room < budget:
            step_s += load.replica.prefill_s(budget - room) - (floor if running else 0.0)
        now += step_s
        for one in running:
            one.left -= 1
        tpot += [(now - one.begun) / one.tokens for one in running if one.left <= 0]
        begun = [one for one in waiting if one.uncomputed == 0]
        ttft += [now - one.came for one in begun]
        for one in begun:
            one.begun, one.left = now, one.tokens
        waiting = [one for one in waiting if one.uncomputed > 0]
        running = [one for one in running if one.left > 0] + begun
    share = load.percentile / 100
    return sorted(ttft)[int(share * len(ttft))], sorted(tpot)[int(share * len(tpot))]


@pytest.mark.parametrize("budget", [512, 2048, 8192])
@pytest.mark.parametrize("rate", [2.0, 6.0, 10.0])
def test_the_latencies_of_a_unified_replica_are_near_those_of_simulated_steps(budget: int, rate: float) -> None:
    load = Load(PlainReplica(), CHAT, 95.0, 1, token_budget=budget)
    predicted = latency(Role.UNIFIED, load, rate)
    ttft, tpot = simulated_unified(load, rate, 2000, 1)
    assert predicted.ttft_s == pytest.approx(ttft, rel=0.3)
    assert predicted.tpot_s == pytest.approx(tpot, rel=0.2)


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
