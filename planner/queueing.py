"""How much traffic a pool of equal replicas carries within an SLO, and which latencies it then gives.

The model, in a few lines (docs/planner.md has the assumptions and the error against the simulator):

- *Prefill* is a G/G/m queue. The wait is exponential where there is any (Erlang C for how often, Allen and Cunneen for
  how long). Prompts that arrive during a step are computed together as far as the token budget goes, which makes the
  time of each shorter and the answer of each later.
- *Decode* is a processor that is shared: n requests run, each gets a token per step, n follows from Little's law. The
  number fluctuates like a Poisson process whose sum the router spreads over the replicas.
- A *unified* replica does both: prompts take their share of the time from the decode steps, and each prompt's chunks
  wait for the decode steps between them.

Pure functions; seconds, tokens, requests per second.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from enum import StrEnum
from statistics import NormalDist

from tandem.planner.objectives import Demand, Replica, Slo

TOKEN_BUDGET = 8192
"""Prompt tokens that a step takes at most, where a replica's own budget is not known."""
MAX_BATCH = 256
"""Requests that decode together at most, likewise."""
_TOLERANCE = 1e-3


class Role(StrEnum):
    """What the replicas of a pool do."""

    PREFILL = "Prefill"
    DECODE = "Decode"
    UNIFIED = "Unified"


@dataclass(frozen=True, slots=True)
class Latency:
    """What one pool adds at the SLO's percentile; infinite where its queue grows without end."""

    ttft_s: float = 0.0
    tpot_s: float = 0.0
    running: float = 0.0
    """Requests that run on one replica, on average."""
    busy: float = 0.0
    """Share of the time in which a replica works on prompts (prefill, unified)."""
    kv_share: float = 0.0
    """Share of a replica's KV memory in use, at the percentile."""

    def meets(self, slo: Slo) -> bool:
        return self.ttft_s <= slo.ttft_s and self.tpot_s <= slo.tpot_s and self.kv_share <= 1.0


OVERLOADED = Latency(math.inf, math.inf, math.inf, 1.0, math.inf)


@dataclass(frozen=True, slots=True)
class Load:
    """A pool of `replicas` equal replicas, which gets `rate` requests per second of `demand`'s kind."""

    replica: Replica
    demand: Demand
    percentile: float
    replicas: int
    token_budget: int = TOKEN_BUDGET
    max_batch: int = MAX_BATCH


def latency(role: Role, load: Load, rate: float) -> Latency:
    """What `rate` requests per second see; `OVERLOADED` where they cannot be carried."""
    if not load.demand.prompt_tokens.points:
        return Latency()
    return _MODELS[role](load, rate / load.replicas)


def highest_rate(role: Role, load: Load, slo: Slo, known: float = 0.0) -> float:
    """The most requests per second that meet `slo`, by bisection; 0 where not even one alone meets it.

    Args:
        known: a rate that is known to meet it.
    """

    def fits(rate: float) -> bool:
        return latency(role, load, rate).meets(slo)

    if not load.demand.prompt_tokens.points or not (known or fits(1e-9)):
        return 0.0
    low, high = known, known * 1.05 or 1e-3
    growth = 1.2 if known else 4.0
    while fits(high):
        low, high = high, high * growth
        if high > 1e9:  # nothing to compute and no goal to miss
            return high
    while high - low > _TOLERANCE * high:
        middle = (low + high) / 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return low


def _prefill(load: Load, rate: float) -> Latency:
    prompts = _prompts(load)
    mean_alone = _mean(prompts)
    batch, together_s = _prompt_batch(load, rate)
    stretch = together_s / mean_alone if mean_alone > 0 else 1.0
    ttft = _ttft(load, rate, [(seconds * stretch, share) for seconds, share in prompts], together_s / batch)
    return OVERLOADED if ttft is None else Latency(ttft_s=ttft, busy=min(rate * together_s / batch, 1.0))


def _decode(load: Load, rate: float) -> Latency:
    return _decoding(load, rate, prompt_share=0.0, prompt_square_s=0.0)


def _unified(load: Load, rate: float) -> Latency:
    step = load.replica.decode_step_s(1, 1)
    work = [(max(seconds - step, 0.0), share) for seconds, share in _prompts(load)]
    batch, together_s = _prompt_batch(load, rate)
    mean_work = max(together_s - step, 0.0) / batch
    busy = rate * mean_work
    square = sum(share * seconds * seconds for seconds, share in work)
    decoding = _decoding(load, rate, prompt_share=busy, prompt_square_s=square)
    if decoding is OVERLOADED:
        return OVERLOADED
    kv = decoding.running * _mean_context(load.demand)
    beside_s = load.replica.decode_step_s(decoding.running, kv) if decoding.running > 0 else 0.0
    beside_s = max(beside_s - step, 0.0)
    chunks = _chunks(load)
    served = [(alone + n * beside_s, share) for (alone, share), n in zip(_prompts(load), chunks, strict=True)]
    ttft = _ttft(load, rate, served, mean_work + beside_s * min(_mean_chunks(load, chunks), 1.0))
    if ttft is None:
        return OVERLOADED
    return Latency(ttft, decoding.tpot_s, decoding.running, min(busy, 1.0), decoding.kv_share)


def _decoding(load: Load, rate: float, prompt_share: float, prompt_square_s: float) -> Latency:
    """Requests that decode while prompts take `prompt_share` of the replica's time."""
    if prompt_share >= 1:
        return OVERLOADED
    demand, replica = load.demand, load.replica
    answer, context = max(demand.output_tokens.mean - 1, 0.0), _mean_context(demand)

    def step_s(running: float) -> float:
        return replica.decode_step_s(max(running, 1.0), max(running, 1.0) * context) / (1 - prompt_share)

    running = _fixed_point(lambda n: rate * answer * step_s(n), load.max_batch)
    if running is None:
        return OVERLOADED
    z = NormalDist().inv_cdf(load.percentile / 100)
    at_peak = running + z * math.sqrt(running / load.replicas)
    if at_peak > load.max_batch:
        return OVERLOADED
    kv_share = _kv_at_peak(load, running, z) / max(replica.kv_tokens, 1.0)
    lifetime_s = answer * step_s(at_peak)
    bursts_s = z * math.sqrt(rate * lifetime_s * prompt_square_s) / answer if answer > 0 else 0.0
    moved_s = (
        replica.transfer_s("handover", demand.prompt_tokens.mean) / answer if answer > 0 and not prompt_share else 0.0
    )
    return Latency(
        tpot_s=step_s(at_peak) + bursts_s + moved_s if answer > 0 else 0.0, running=running, kv_share=kv_share
    )


def _kv_at_peak(load: Load, running: float, z: float) -> float:
    """Tokens of KV held at the percentile: a sum of as many contexts as requests happen to run (compound Poisson)."""
    prompt, output = load.demand.prompt_tokens, load.demand.output_tokens
    mean = _mean_context(load.demand)
    square = prompt.mean_square + prompt.mean * output.mean + output.mean_square / 3
    longest = prompt.longest + output.longest
    return max(running * mean + z * math.sqrt(running * square), longest)


def _ttft(load: Load, rate: float, served: list[tuple[float, float]], service_s: float) -> float | None:
    """The percentile of wait and service; None where the queue grows without end.

    Args:
        rate: requests per second at one replica.
        served: seconds from the first chunk's start to the first token, with shares.
        service_s: seconds of a replica's time that a prompt takes, on average.
    """
    busy = rate * service_s
    if busy >= 1:
        return None
    mean = _mean(served)
    square = sum(share * seconds * seconds for seconds, share in served)
    variation = max(square / (mean * mean) - 1, 0.0) if mean > 0 else 0.0
    wait_s = service_s * (load.demand.burstiness + variation) / 2 / (load.replicas * (1 - busy))
    waits = _erlang_c(load.replicas, busy * load.replicas)
    goal = 1 - load.percentile / 100

    def late(ttft: float) -> float:
        return sum(
            share * (1.0 if ttft < seconds else waits * math.exp(-(ttft - seconds) / wait_s) if wait_s > 0 else 0.0)
            for seconds, share in served
        )

    low, high = 0.0, max(seconds for seconds, _ in served)
    while late(high) > goal:
        low, high = high, 2 * high + wait_s
    while high - low > _TOLERANCE * high:
        middle = (low + high) / 2
        low, high = (low, middle) if late(middle) <= goal else (middle, high)
    return high


def _erlang_c(servers: int, offered: float) -> float:
    """The probability that all of `servers` are busy, for `offered` erlangs below it."""
    blocked = 1.0
    for server in range(1, servers + 1):
        blocked = offered * blocked / (server + offered * blocked)
    return blocked / (1 - offered / servers * (1 - blocked))


def _prompt_batch(load: Load, rate: float) -> tuple[float, float]:
    """(prompts computed together, seconds of all of them): what arrives while the ones before are computed."""
    uncached = _mean_uncached(load.demand)
    most = max(load.token_budget / uncached, 1.0) if uncached > 0 else 1.0
    cached = load.demand.prompt_tokens.mean - uncached

    def seconds(batch: float) -> float:
        return load.replica.prefill_s(batch * uncached, cached)

    batch = _fixed_point(lambda k: max(rate * seconds(k), 1.0), most)
    batch = most if batch is None else batch
    return batch, seconds(batch)


def _prompts(load: Load) -> list[tuple[float, float]]:
    """(seconds of a prompt alone, share)."""
    uncached = 1 - load.demand.cached_share
    return [
        (load.replica.prefill_s(max(tokens * uncached, 1.0), tokens * (1 - uncached)), share)
        for tokens, share in load.demand.prompt_tokens.points
    ]


def _chunks(load: Load) -> list[int]:
    uncached = 1 - load.demand.cached_share
    return [max(math.ceil(tokens * uncached / load.token_budget), 1) for tokens, _ in load.demand.prompt_tokens.points]


def _mean_chunks(load: Load, chunks: list[int]) -> float:
    """Steps of prompts per request, where short prompts share one."""
    shared = _mean_uncached(load.demand) / load.token_budget
    return max(
        shared, sum(n * share for n, (_, share) in zip(chunks, load.demand.prompt_tokens.points, strict=True)) - 1
    )


def _mean_uncached(demand: Demand) -> float:
    return demand.prompt_tokens.mean * (1 - demand.cached_share)


def _mean_context(demand: Demand) -> float:
    return demand.prompt_tokens.mean + demand.output_tokens.mean / 2


def _mean(weighted: list[tuple[float, float]]) -> float:
    return sum(seconds * share for seconds, share in weighted)


def _fixed_point(after: Callable[[float], float], most: float) -> float | None:
    """The least x with after(x) = x, for a rising function; None where it lies above `most`."""
    low, high = 0.0, min(max(after(0.0), 1e-6), most)
    while after(high) > high:
        if high >= most:
            return None
        low, high = high, min(high * 1.5, most)
    while high - low > _TOLERANCE * high:
        middle = (low + high) / 2
        low, high = (middle, high) if after(middle) > middle else (low, middle)
    return high


_MODELS = {Role.PREFILL: _prefill, Role.DECODE: _decode, Role.UNIFIED: _unified}
