"""How much traffic a pool of equal replicas carries within an SLO, and which latencies it then gives.

The model, in a few lines (docs/planner.md has the assumptions and the error against the simulator):

- *Prefill* is a G/G/m queue. The wait is exponential where there is any (Erlang C for how often, Allen and Cunneen for
  how long). Prompts that arrive during a step are computed together as far as the token budget goes, which makes the
  time of each shorter and the answer of each later.
- *Decode* is a processor that is shared: n requests run, each gets a token per step, n follows from Little's law. The
  number fluctuates like a Poisson process whose sum the router spreads over the replicas.
- A *unified* replica does both in the same steps: prompts make steps longer for what decodes, and every chunk of a
  prompt waits for the decode rows of its step.

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
    alone = [(prompt.seconds, prompt.share) for prompt in _prompts(load)]
    batch, together_s, one_s = _prompt_batch(load, rate)
    occupied = [(seconds * together_s / batch / one_s, share) for seconds, share in alone]
    ttft = _ttft(load, rate, occupied, [(seconds * together_s / one_s, share) for seconds, share in alone])
    return OVERLOADED if ttft is None else Latency(ttft_s=ttft, busy=rate * _mean(occupied))


def _decode(load: Load, rate: float) -> Latency:
    moved_s = load.replica.transfer_s("handover", load.demand.prompt_tokens.mean)
    return _decoding(load, rate, [], moved_s)


def _unified(load: Load, rate: float) -> Latency:
    floor = load.replica.decode_step_s(1, 1)
    prompts = _prompts(load)
    work = [(max(prompt.seconds - prompt.chunks * floor, 0.0), prompt.share) for prompt in prompts]
    decoding = _decoding(load, rate, work, 0.0)
    if decoding is OVERLOADED:
        return OVERLOADED
    running = max(decoding.running, 1.0)
    step_s = load.replica.decode_step_s(running, running * _mean_context(load.demand))
    occupied, served = [], []
    for prompt, (seconds, share) in zip(prompts, work, strict=True):
        occupied.append((seconds + step_s * prompt.tokens / load.token_budget, share))
        served.append((seconds + step_s * (prompt.chunks + min(decoding.running, 1.0) / 2), share))
    ttft = _ttft(load, rate, occupied, served)
    if ttft is None:
        return OVERLOADED
    return Latency(ttft, decoding.tpot_s, decoding.running, rate * _mean(work), decoding.kv_share)


def _decoding(load: Load, rate: float, work: list[tuple[float, float]], moved_s: float) -> Latency:
    """Requests that decode while prompts are computed beside them.

    Args:
        rate: requests per second at one replica.
        work: seconds by which a prompt makes steps longer, with shares.
        moved_s: seconds before the second token, of every request.
    """
    demand, replica = load.demand, load.replica
    left = 1 - rate * _mean(work)
    if left <= 0:
        return OVERLOADED
    answer, context = max(demand.output_tokens.mean - 1, 0.0), _mean_context(demand)

    def step_s(running: float) -> float:
        return replica.decode_step_s(max(running, 1.0), max(running, 1.0) * context)

    running = _fixed_point(lambda n: rate * answer * step_s(n) / left, load.max_batch)
    if running is None:
        return OVERLOADED
    z = NormalDist().inv_cdf(load.percentile / 100)
    at_peak = running + z * math.sqrt(running / load.replicas)
    if at_peak > load.max_batch:
        return OVERLOADED
    kv_share = _kv_at_peak(load, running, z) / max(replica.kv_tokens, 1.0)
    tpot = _tpot(load, rate, step_s(at_peak), left, work, moved_s) if answer > 0 else 0.0
    if work:
        tpot = min(tpot, step_s(at_peak) + _most_of_a_step(load))
    return Latency(tpot_s=tpot, running=running, kv_share=kv_share)


def _most_of_a_step(load: Load) -> float:
    """Seconds that prompts add to a step whose token budget they fill."""
    return max(load.replica.prefill_s(load.token_budget) - load.replica.decode_step_s(1, 1), 0.0)


def _tpot(
    load: Load, rate: float, step_s: float, left: float, work: list[tuple[float, float]], moved_s: float
) -> float:
    """The percentile over requests of seconds per token. Short answers differ most: a prompt that comes while they run
    is spread over few tokens. An answer is a busy period of M/G/1 that begins with its own steps, and in which the
    prompts that come are served at once; its length is taken to be normal."""
    square = sum(share * seconds * seconds for seconds, share in work)
    answers = []
    for tokens, share in load.demand.output_tokens.points:
        steps = max(tokens - 1, 1.0)
        spread_s = math.sqrt(rate * steps * step_s * square / left**3) / steps
        answers.append((step_s / left + moved_s / steps, spread_s, share))
    goal = load.percentile / 100

    def covered(tpot: float) -> float:
        return sum(
            share * (NormalDist(mean, spread).cdf(tpot) if spread > 0 else float(tpot >= mean))
            for mean, spread, share in answers
        )

    return _bisect(lambda tpot: covered(tpot) >= goal, max(mean + spread for mean, spread, _ in answers))


def _kv_at_peak(load: Load, running: float, z: float) -> float:
    """Tokens of KV held at the percentile: a sum of as many contexts as requests happen to run (compound Poisson)."""
    prompt, output = load.demand.prompt_tokens, load.demand.output_tokens
    mean = _mean_context(load.demand)
    square = prompt.mean_square + prompt.mean * output.mean + output.mean_square / 3
    longest = prompt.longest + output.longest
    return max(running * mean + z * math.sqrt(running * square), longest)


def _ttft(
    load: Load, rate: float, occupied: list[tuple[float, float]], served: list[tuple[float, float]]
) -> float | None:
    """The percentile of wait and service; None where the queue grows without end.

    Args:
        rate: requests per second at one replica.
        occupied: seconds by which a prompt keeps the next ones waiting, with shares.
        served: seconds from its first chunk's start to its first token; shares in the same order.
    """
    mean = _mean(occupied)
    busy = rate * mean
    if busy >= 1:
        return None
    square = sum(share * seconds * seconds for seconds, share in occupied)
    variation = max(square / (mean * mean) - 1, 0.0) if mean > 0 else 0.0
    wait_s = mean * (load.demand.burstiness + variation) / 2 / (load.replicas * (1 - busy))
    waits = _erlang_c(load.replicas, busy * load.replicas)
    goal = 1 - load.percentile / 100

    def late(ttft: float) -> float:
        return sum(
            share * (1.0 if ttft < seconds else waits * math.exp(-(ttft - seconds) / wait_s) if wait_s > 0 else 0.0)
            for seconds, share in served
        )

    return _bisect(lambda ttft: late(ttft) <= goal, max(seconds for seconds, _ in served))


def _bisect(enough: Callable[[float], bool], guess: float) -> float:
    """The least value that is enough."""
    low, high = 0.0, max(guess, 1e-9)
    while not enough(high):
        low, high = high, 2 * high
    while high - low > _TOLERANCE * high:
        middle = (low + high) / 2
        low, high = (low, middle) if enough(middle) else (middle, high)
    return high


def _erlang_c(servers: int, offered: float) -> float:
    """The probability that all of `servers` are busy, for `offered` erlangs below it."""
    blocked = 1.0
    for server in range(1, servers + 1):
        blocked = offered * blocked / (server + offered * blocked)
    return blocked / (1 - offered / servers * (1 - blocked))


def _prompt_batch(load: Load, rate: float) -> tuple[float, float, float]:
    """(prompts computed together, seconds of all of them, seconds of one): what comes while the ones before are
    computed. Of prompts of the mean length."""
    uncached = max(load.demand.prompt_tokens.mean * (1 - load.demand.cached_share), 1.0)
    cached = load.demand.prompt_tokens.mean * load.demand.cached_share

    def seconds(batch: float) -> float:
        return load.replica.prefill_s(batch * uncached, cached)

    most = max(load.token_budget / uncached, 1.0)
    batch = _fixed_point(lambda k: max(rate * seconds(k), 1.0), most)
    batch = most if batch is None else batch
    return batch, seconds(batch), seconds(1.0)


@dataclass(frozen=True, slots=True)
class _Prompt:
    """Prompts of one length."""

    tokens: float
    """That are not cached."""
    chunks: int
    seconds: float
    """Time of all chunks, when nothing else is computed."""
    share: float


def _prompts(load: Load) -> list[_Prompt]:
    prompts = []
    for length, share in load.demand.prompt_tokens.points:
        tokens = max(length * (1 - load.demand.cached_share), 1.0)
        chunks = max(math.ceil(tokens / load.token_budget), 1)
        before = length - tokens + tokens * (chunks - 1) / (2 * chunks)
        seconds = chunks * load.replica.prefill_s(tokens / chunks, max(before, 0.0))
        prompts.append(_Prompt(tokens, chunks, seconds, share))
    return prompts


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
