"""Which workers serve a request. A pure policy: loads, cache hits and the time in, a decision with its reasons out.

Every candidate has a cost in seconds: what the request will wait for, plus what it takes from those that run already.

    computed on the decode worker    queue + prefill or fetch + stall of its decoders  + decode + slowdown + memory
    by a prefill worker              queue + prefill or fetch + hand-over of the KV    + decode + slowdown + memory

The cheapest wins. Work in flight is part of the loads, so that a herd spreads by itself. The two halves of a hand-over
do not depend on each other, so n prefill and m decode workers cost n + m evaluations, not n * m.
"""

from __future__ import annotations

import heapq
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TypeVar

from tandem.common.fairness import LAST_BAND
from tandem.router.fleet.load import LOWEST, WorkerLoad
from tandem.router.placing.targets import Aim, Change, Targets, missed
from tandem.router.settings import Disaggregate

REASONS = (
    "handover",
    "no_prefill_worker",
    "short_prompt",
    "cached_prefix",
    "cheaper_here",
    "prompt_logprobs",
    "pooling",
    "switched_off",
    "left_free",
)
"""`handover`, or why there is none. `short_prompt`: it computes faster than it is sent; `cached_prefix`: most of
it is on the decode worker; `cheaper_here`: neither, but nobody there is held up enough for a hand-over to pay;
`left_free`: the last band leaves the last prefill worker to others."""

Hits = Mapping[int, tuple[int, int]]
"""Prefix hits by slot of a worker: leading prompt tokens present, and tokens promised right after them."""
Stored = Mapping[str, Sequence[tuple[str, int]]]
"""Leading prompt tokens that each store node can fetch, as runs of (tier, end of the run in tokens)."""
_Cost = TypeVar("_Cost", float, tuple[float, float])
_NOTHING = (0, 0)
MAX_SOURCES = 16
"""Prefill workers that are weighed with the links from their hosts: the cheapest ones."""

PREFILL_WEIGHT = 2.0
"""Computing what another worker has cached also makes those wait who come after: each second of it counts this often.
Found in replays of a production trace (docs/placement.md): more raises the hit rate little, and lets queues grow."""
STALL_WEIGHT = 0.05
"""Waiting for the first token weighs more than as many seconds taken from running requests, which are spread over all
of them and over many tokens. The same whether a prompt takes them at once or a larger batch bit by bit: else a prompt
is computed again elsewhere, which stalls those who decode there, to spare others as much."""
DECODE_WEIGHT = 0.5
"""Waiting for this answer's later tokens weighs less, too."""


@dataclass(frozen=True, slots=True)
class Request:
    """What the policy knows of a request."""

    prompt_tokens: int
    output_tokens: int = 256
    """Expected."""
    priority: int = LOWEST
    """It displaces requests of later bands (higher values) where a worker is full."""
    one_place: str = ""
    """Why it cannot be handed over: `prompt_logprobs`, `pooling` or `left_free`."""
    stored: Stored = field(default_factory=dict)
    adapter_s: Mapping[int, float] = field(default_factory=dict)
    """Seconds to load the request's adapter, by slot of a decode worker."""


@dataclass(frozen=True, slots=True)
class CandidateCost:
    """Seconds, unless it says otherwise."""

    decode: str
    """Name of the worker."""
    prefill: str | None
    total_s: float
    """The sum, with the weights above."""
    queue_s: float
    """Until its turn, on whichever worker computes the prompt, and for a place in the decode worker's batch."""
    prefill_s: float
    fetch_s: float
    """KV from the store."""
    stall_s: float
    """Seconds that the decode worker's other requests are held up, all together, while it computes the prompt."""
    handover_s: float
    decode_s: float
    """All expected output of this request."""
    slowdown_s: float
    """Seconds that the others' steps become longer, all together, while this request decodes."""
    memory_s: float
    """Until others have made room for its KV, and what being preempted would cost."""
    adapter_s: float
    device_tokens: int
    """Prompt tokens on the device of the worker that computes the prompt."""
    promised_tokens: int
    """More that an earlier request will have computed there by then."""
    stored_tokens: tuple[tuple[str, int], ...]
    """More that are fetched, by tier."""


@dataclass(frozen=True, slots=True)
class Placement:
    """The decision for one request, and what it was based on."""

    decode: int
    """Index of the decode worker."""
    prefill: int | None
    """Index of the prefill worker; None: the decode worker computes the prompt."""
    reason: str
    """One of `REASONS`."""
    prefill_s: float
    """Estimated time to compute (or fetch) the prompt where that happens."""
    ways: tuple[_Way, ...]
    """What was compared, as `candidates` shows it."""
    stall_s: float = 0.0
    """Time by which each request that decodes on the worker is held up while the prompt is computed there."""

    @property
    def candidates(self) -> tuple[CandidateCost, ...]:
        """Cheapest first: every decode worker by itself, each with the best prefill worker, and the best decode worker
        with each prefill worker. Made when asked for, since few placements are ever explained."""
        return tuple(sorted((_explain(way) for way in self.ways), key=lambda cost: cost.total_s))


@dataclass(slots=True)
class _Prompt:
    """The cost of computing the prompt on one worker."""

    queue_s: float
    prefill_s: float
    fetch_s: float
    stall_s: float
    stall_each_s: float
    """Stall of each request that decodes there, if it is a decode worker."""
    present: int
    promised: int
    stored: tuple[tuple[str, int], ...]
    total_s: float


@dataclass(slots=True)
class _Decode:
    """The cost of decoding on one worker."""

    queue_s: float
    decode_s: float
    slowdown_s: float
    memory_s: float
    adapter_s: float
    sent_tokens: int
    """Tokens that are handed over if the prompt is computed elsewhere."""
    step_before_s: float
    step_after_s: float
    """One token for each of its requests, without and with this one."""
    total_s: float
    """Total without the hand-over."""


@dataclass(slots=True)
class _Way:
    """One decode worker, and perhaps a prefill worker that computes the prompt for it."""

    prompt: _Prompt
    decode: _Decode
    decode_load: WorkerLoad
    prefill_load: WorkerLoad | None
    decode_index: int
    prefill_index: int | None
    handover_s: float = 0.0

    @property
    def total_s(self) -> float:
        return self.prompt.total_s + self.decode.total_s + self.handover_s

    @property
    def stall_s(self) -> float:
        """Stall of each request that decodes there."""
        return self.prompt.stall_each_s if self.prefill_load is None else 0.0

    @property
    def ttft_s(self) -> float:
        prompt, decode = self.prompt, self.decode
        waits_s = prompt.queue_s + decode.queue_s + decode.memory_s + decode.adapter_s
        return waits_s + prompt.prefill_s + prompt.fetch_s + self.handover_s


def place(
    decodes: Sequence[WorkerLoad],
    prefills: Sequence[WorkerLoad],
    request: Request,
    hits: Hits,
    now: float,
    *,
    disaggregate: Disaggregate = "auto",
    targets: Targets | None = None,
    turn: int = 0,
) -> Placement:
    """`targets`: what the deployment has promised; the way that misses least of it is taken, and of equal ones the
    cheapest. `turn` breaks ties: equally cheap workers take turns if it grows by one each time. Raises ValueError where
    there is no decode worker."""
    if not decodes:
        raise ValueError("no decode candidate")
    decoding = [_decode_cost(load, request, hits.get(load.slot, _NOTHING)) for load in decodes]
    remote = [_prompt_cost(load, request, hits.get(load.slot, _NOTHING), now, 0) for load in prefills]
    handover_wait_s = min((prompt.queue_s for prompt in remote), default=0.0)
    aim = None if targets is None else Aim(targets, request.output_tokens, handover_wait_s, now)
    here = [
        _Way(
            _prompt_cost(load, request, hits.get(load.slot, _NOTHING), now, load.decoding + load.foreign_decoding),
            decode,
            load,
            None,
            i,
            None,
        )
        for i, (load, decode) in enumerate(zip(decodes, decoding, strict=True))
    ]
    why = _forbidden(prefills, request, disaggregate)
    if why:
        return _placement(_best(here, aim, turn), why, here)
    best, there = _best_pair(remote, decoding, prefills, decodes, now, turn)
    pairs = [(best, i) for i in range(len(decodes))] + [(i, there) for i in range(len(prefills)) if i != best]
    apart = [
        _Way(
            remote[p],
            decoding[d],
            decodes[d],
            prefills[p],
            d,
            p,
            _handover_s(prefills[p], decodes[d], decoding[d], now),
        )
        for p, d in pairs
    ]
    handed_over = apart[there] if targets is None else _best(apart, aim, turn)
    local, ways = _best(here, aim, turn), [*here, *apart]
    if disaggregate == "always" or _key(handed_over, aim) < _key(local, aim):
        return _placement(handed_over, "handover", ways)
    model, prompt = local.decode_load.model, local.prompt
    if model.stall_s(request.prompt_tokens) <= apart[local.decode_index].handover_s:
        why = "short_prompt"
    elif 2 * (prompt.present + prompt.promised) >= request.prompt_tokens:
        why = "cached_prefix"
    else:
        why = "cheaper_here"
    return _placement(local, why, ways)


def _best(ways: Sequence[_Way], aim: Aim | None, turn: int) -> _Way:
    return ways[_least([_key(way, aim) for way in ways], turn)]


def _key(way: _Way, aim: Aim | None) -> tuple[float, float]:
    """The smaller the better: what is promised goes before what is cheap."""
    if aim is None:
        return 0.0, way.total_s
    steps = way.decode.step_before_s, way.decode.step_after_s
    return missed(aim, way.ttft_s, Change(way.decode_load, way.stall_s, *steps)), way.total_s


def _placement(way: _Way, reason: str, ways: Sequence[_Way]) -> Placement:
    prefill_s = way.prompt.prefill_s + way.prompt.fetch_s
    return Placement(way.decode_index, way.prefill_index, reason, prefill_s, tuple(ways), way.stall_s)


def left_over(loads: Sequence[WorkerLoad]) -> list[int]:
    """Indices of the workers that the last band may use: not the last one that is free of it. A client who comes finds
    a worker that batches do not keep busy, where there is more than one."""
    free = [index for index, load in enumerate(loads) if not load.has_band(LAST_BAND)]
    return [index for index in range(len(loads)) if len(free) > 1 or index not in free]


def _forbidden(prefills: Sequence[WorkerLoad], request: Request, disaggregate: Disaggregate) -> str:
    if disaggregate == "never":
        return "switched_off"
    if not prefills:
        return request.one_place or "no_prefill_worker"
    return request.one_place


def _least(costs: Sequence[_Cost], turn: int) -> int:
    """Index of the smallest; of equal ones, the first from `turn` on."""
    least = min(costs)
    if costs.count(least) == 1:
        return costs.index(least)
    start = turn % len(costs)
    return next(i % len(costs) for i in range(start, start + len(costs)) if costs[i % len(costs)] == least)


def _prompt_cost(load: WorkerLoad, request: Request, hit: tuple[int, int], now: float, decoding: int) -> _Prompt:
    model = load.model
    last = request.prompt_tokens - 1  # always computed: its logits are needed
    present = min(hit[0], last)
    promised = min(hit[1], last - present)
    # What is promised is computed before this request has its turn: the wait for it is in the queue.
    cached = present + promised
    prefill_s, fetch_s, computed_from = model.prefill_s(request.prompt_tokens - cached, cached), 0.0, cached
    stored: tuple[tuple[str, int], ...] = ()
    runs = request.stored.get(load.store_node) if load.store_node else None
    if runs:
        tokens: dict[str, int] = {}
        reached = cached
        for tier, end in runs:
            end = min(end, last)
            if end > reached:
                tokens[tier] = tokens.get(tier, 0) + end - reached
                reached = end
        loading_s = sum(model.fetch_s(tier, count) for tier, count in tokens.items())
        rest_s = model.prefill_s(request.prompt_tokens - reached, reached)
        if tokens and loading_s + PREFILL_WEIGHT * rest_s < PREFILL_WEIGHT * prefill_s:
            prefill_s, fetch_s, stored, computed_from = rest_s, loading_s, tuple(tokens.items()), reached
    queue_s = load.wait_s(now, request.priority)
    stall_each_s = model.stall_s(request.prompt_tokens - computed_from, computed_from)
    stall_s = decoding * stall_each_s
    total_s = queue_s + PREFILL_WEIGHT * prefill_s + fetch_s + STALL_WEIGHT * stall_s
    return _Prompt(queue_s, prefill_s, fetch_s, stall_s, stall_each_s, present, promised, stored, total_s)


def _decode_cost(load: WorkerLoad, request: Request, hit: tuple[int, int]) -> _Decode:
    model, output, batch = load.model, request.output_tokens, load.batch
    kv_tokens = load.kv_tokens + load.foreign_tokens
    before_s = model.decode_step_s(batch, kv_tokens)
    after_s = model.decode_step_s(batch + 1, kv_tokens + request.prompt_tokens + output // 2)
    decode_s = output * after_s
    slowdown_s = output * batch * (after_s - before_s)
    queue_s = memory_s = 0.0
    before = load.batch_before(request.priority)
    if load.max_requests and before >= load.max_requests:
        queue_s = (before - load.max_requests + 1) / load.max_requests * decode_s
    if load.capacity_tokens:
        taken = load.reserved_tokens + load.foreign_tokens
        missing = taken + request.prompt_tokens - hit[0] + output - load.capacity_tokens
        if missing > 0:
            # Requests end, and give back their KV, at a rate of all of it per life of a request.
            memory_s = missing / max(taken, 1) * decode_s + model.prefill_s(missing)
    adapter_s = request.adapter_s.get(load.slot, 0.0) if request.adapter_s else 0.0
    sent_tokens = max(request.prompt_tokens - hit[0] - hit[1], 0)
    total_s = queue_s + DECODE_WEIGHT * decode_s + STALL_WEIGHT * slowdown_s + memory_s + adapter_s
    return _Decode(queue_s, decode_s, slowdown_s, memory_s, adapter_s, sent_tokens, before_s, after_s, total_s)


def _best_pair(
    remote: Sequence[_Prompt],
    decoding: Sequence[_Decode],
    prefills: Sequence[WorkerLoad],
    decodes: Sequence[WorkerLoad],
    now: float,
    turn: int,
) -> tuple[int, int]:
    """The cheapest prefill and decode worker together. Of each host only the cheapest prefill worker counts, and only
    `MAX_SOURCES` hosts do, so that links do not cost n * m evaluations."""
    best = _least([prompt.total_s for prompt in remote], turn)
    best_of_host = {prefills[best].host: best}
    if any(load.host != prefills[best].host for load in prefills):
        for i in heapq.nsmallest(MAX_SOURCES, range(len(remote)), key=lambda i: remote[i].total_s):
            best_of_host.setdefault(prefills[i].host, i)
    pairs = []
    for i in best_of_host.values():
        costs = [
            each.total_s + _handover_s(prefills[i], load, each, now)
            for each, load in zip(decoding, decodes, strict=True)
        ]
        there = _least(costs, turn)
        pairs.append((remote[i].total_s + costs[there], i, there))
    _, best, there = min(pairs, key=lambda pair: pair[0])
    return best, there


def _handover_s(prefill: WorkerLoad, load: WorkerLoad, decode: _Decode, now: float) -> float:
    return load.model.handover_s(decode.sent_tokens, (prefill.host, load.host), now)


def _explain(way: _Way) -> CandidateCost:
    prompt, decode = way.prompt, way.decode
    return CandidateCost(
        decode=way.decode_load.name,
        prefill=None if way.prefill_load is None else way.prefill_load.name,
        total_s=way.total_s,
        queue_s=prompt.queue_s + decode.queue_s,
        prefill_s=prompt.prefill_s,
        fetch_s=prompt.fetch_s,
        stall_s=prompt.stall_s,
        handover_s=way.handover_s,
        decode_s=decode.decode_s,
        slowdown_s=decode.slowdown_s,
        memory_s=decode.memory_s,
        adapter_s=decode.adapter_s,
        device_tokens=prompt.present,
        promised_tokens=prompt.promised,
        stored_tokens=prompt.stored,
    )
