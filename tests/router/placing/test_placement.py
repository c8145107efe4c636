"""The placement policy, as a pure function, and the books of load it reads."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tandem.common.fairness import LAST_BAND
from tandem.kvstore.identity import BlockHash
from tandem.planner.perf_model import ModelShape, PerfModel
from tandem.router.fleet.load import Work, WorkerLoad
from tandem.router.placing.placement import (
    DECODE_WEIGHT,
    PREFILL_WEIGHT,
    REASONS,
    STALL_WEIGHT,
    CandidateCost,
    Placement,
    Request,
    left_over,
    place,
)
from tandem.router.placing.prefix_index import PrefixIndex

MODEL = PerfModel("nvidia-h100", ModelShape(8 * 10**9, 16 * 10**9, 131_072))


def worker(slot: int, **fields: object) -> WorkerLoad:
    load = WorkerLoad(MODEL, slot, capacity_tokens=400_000, max_requests=256, name=f"w{slot}")
    for name, value in fields.items():
        setattr(load, name, value)
    return load


loads = st.fixed_dictionaries(
    {
        "requests": st.integers(0, 300),
        "waiting": st.integers(0, 20),
        "waiting_s": st.floats(0, 5),
        "busy_until": st.floats(0, 20),
        "decoding": st.integers(0, 256),
        "kv_tokens": st.integers(0, 400_000),
        "reserved_tokens": st.integers(0, 500_000),
        "foreign_requests": st.integers(0, 20),
        "foreign_tokens": st.integers(0, 200_000),
        "foreign_s": st.floats(0, 1),
    }
)
pools = st.lists(loads, min_size=1, max_size=5)
requests = st.builds(
    Request,
    prompt_tokens=st.integers(1, 50_000),
    output_tokens=st.integers(0, 2000),
    one_place=st.sampled_from(["", "", "prompt_logprobs", "pooling"]),
)
hit_counts = st.lists(st.tuples(st.integers(0, 50_000), st.integers(0, 5_000)), min_size=10, max_size=10)
modes = st.sampled_from(["auto", "always", "never"])


@settings(deadline=None)
@given(pools, st.lists(loads, max_size=4), requests, hit_counts, modes, st.integers(0, 9))
def test_the_cheapest_candidate_wins_and_says_why(decodes, prefills, request, hits, mode, turn) -> None:  # type: ignore[no-untyped-def]
    decoding = [worker(i, **fields) for i, fields in enumerate(decodes)]
    prefilling = [worker(5 + i, **fields) for i, fields in enumerate(prefills)]
    found = dict(enumerate(hits))
    placement = place(decoding, prefilling, request, found, 10.0, disaggregate=mode, turn=turn)
    assert placement.reason in REASONS
    assert (placement.prefill is not None) == (placement.reason == "handover")
    if mode == "never" or not prefilling or request.one_place:
        assert placement.prefill is None
    elif mode == "always":
        assert placement.prefill is not None
    pairs: list[int | None] = [None]
    if mode != "never" and not request.one_place:
        pairs = [*range(len(prefilling))] if mode == "always" and prefilling else [None, *range(len(prefilling))]
    totals = [reference(d, None if p is None else prefilling[p], request, found) for d in decoding for p in pairs]
    chosen = reference(
        decoding[placement.decode],
        None if placement.prefill is None else prefilling[placement.prefill],
        request,
        found,
    )
    assert chosen == pytest.approx(min(totals), rel=1e-9)
    costs = placement.candidates
    assert [cost.total_s for cost in costs] == sorted(cost.total_s for cost in costs)
    assert cost_of(placement, decoding, prefilling).total_s == pytest.approx(chosen)
    by_name = {None: None} | {load.name: load for load in (*decoding, *prefilling)}
    for cost in costs:
        assert cost.total_s == pytest.approx(reference(by_name[cost.decode], by_name[cost.prefill], request, found))
        assert cost.device_tokens + cost.promised_tokens < request.prompt_tokens
        parts = [cost.queue_s, cost.prefill_s, cost.fetch_s, cost.stall_s, cost.handover_s, cost.decode_s]
        parts += [cost.slowdown_s, cost.memory_s, cost.adapter_s]
        assert min(parts) >= 0.0
        weighted = sum(parts) + (PREFILL_WEIGHT - 1) * cost.prefill_s - (1 - STALL_WEIGHT) * cost.stall_s
        weighted -= (1 - DECODE_WEIGHT) * cost.decode_s + (1 - STALL_WEIGHT) * cost.slowdown_s
        assert cost.total_s == pytest.approx(weighted)


def reference(
    decode: WorkerLoad, prefill: WorkerLoad | None, request: Request, hits: dict[int, tuple[int, int]]
) -> float:
    """One pair at a time, as the docstring says it."""
    at = prefill or decode
    present, promised = hits[at.slot]
    cached = min(present + promised, request.prompt_tokens - 1)
    computing = MODEL.prefill_s(request.prompt_tokens - cached, cached)
    total = at.wait_s(10.0) + PREFILL_WEIGHT * computing
    if prefill is None:
        total += STALL_WEIGHT * MODEL.stall_s(request.prompt_tokens - cached, cached) * decode.decoding
    else:
        total += MODEL.handover_s(max(0, request.prompt_tokens - sum(hits[decode.slot])))
    batch, before = decode.batch, decode.kv_tokens + decode.foreign_tokens
    step = MODEL.decode_step_s(batch + 1, before + request.prompt_tokens + request.output_tokens // 2)
    answer = request.output_tokens * step
    slowdown = request.output_tokens * batch * (step - MODEL.decode_step_s(batch, before))
    total += DECODE_WEIGHT * answer + STALL_WEIGHT * slowdown
    if batch >= decode.max_requests:
        total += (batch - decode.max_requests + 1) / decode.max_requests * answer
    need = request.prompt_tokens - hits[decode.slot][0] + request.output_tokens
    taken = decode.reserved_tokens + decode.foreign_tokens
    missing = taken + need - decode.capacity_tokens
    if missing > 0:
        total += missing / max(1, taken) * answer + MODEL.prefill_s(missing)
    return total


def cost_of(placement: Placement, decodes: list[WorkerLoad], prefills: list[WorkerLoad]) -> CandidateCost:
    prefill = None if placement.prefill is None else prefills[placement.prefill].name
    names = decodes[placement.decode].name, prefill
    return next(cost for cost in placement.candidates if (cost.decode, cost.prefill) == names)


class Fleet:
    """Workers that never finish anything: what a burst looks like to the router."""

    def __init__(self, decodes: int, prefills: int = 0) -> None:
        self.index = PrefixIndex()
        self.decodes = [worker(self.index.add(None)) for _ in range(decodes)]
        self.prefills = [worker(self.index.add(None)) for _ in range(prefills)]
        self.turn = 0

    def send(self, blocks: list[int], request: Request) -> Placement:
        chain = [BlockHash(b"%d" % block) for block in blocks]
        hits = {slot: (present * 16, promised * 16) for slot, present, promised in self.index.match(chain)}
        self.turn += 1
        placement = place(self.decodes, self.prefills, request, hits, 0.0, turn=self.turn)
        handed_over = placement.prefill is not None
        load = self.prefills[placement.prefill] if placement.prefill is not None else self.decodes[placement.decode]
        if handed_over:
            Work(self.decodes[placement.decode], request.prompt_tokens, request.output_tokens, 0.0).start(0.0)
        output = 0 if handed_over else request.output_tokens
        Work(load, request.prompt_tokens, output, placement.prefill_s).start(0.0)
        self.index.promise(load.slot, chain, sum(hits.get(load.slot, (0, 0))) // 16)
        return placement


@pytest.mark.parametrize("unique", [0, 1])
def test_a_herd_of_equal_prompts_spreads(unique: int) -> None:
    fleet = Fleet(8)
    request = Request(2048 + 16 * unique)
    sent = Counter(fleet.send([*range(128), *([1000 + i] * unique)], request).decode for i in range(400))
    assert max(sent.values()) <= 1.1 * min(sent.values())


def test_a_common_first_block_does_not_gather_everything_on_one_worker() -> None:
    fleet = Fleet(8)
    sent = Counter(fleet.send([0, *range(1000 * i, 1000 * i + 127)], Request(2048)).decode for i in range(1, 401))
    assert max(sent.values()) <= 1.1 * min(sent.values())


def test_a_herd_spreads_over_prefill_workers_too() -> None:
    fleet = Fleet(4, 4)
    for load in fleet.decodes:
        load.decoding = load.requests = 100
    sent = Counter(fleet.send([*range(1000 * i, 1000 * i + 128)], Request(2048)).prefill for i in range(1, 201))
    handed_over = [count for prefill, count in sent.items() if prefill is not None]
    assert len(handed_over) == 4
    assert max(handed_over) <= 1.2 * min(handed_over)


def test_groups_stay_where_their_prefix_is() -> None:
    """Sixteen groups that come back in turn, each when its last prompt is done: none of them moves."""
    fleet = Fleet(4)
    homes: dict[int, set[int]] = {}
    for turn in range(160):
        group = turn % 16
        before = [replace(load) for load in fleet.decodes]
        homes.setdefault(group, set()).add(fleet.send([*range(1000 * group, 1000 * group + 128)], Request(2050)).decode)
        fleet.decodes = before  # done
    assert all(len(home) == 1 for home in homes.values())
    assert len({home for homes_of in homes.values() for home in homes_of}) == 4, "equal workers take turns"


def reason(request: Request, decode: WorkerLoad, hits: dict[int, tuple[int, int]] | None = None) -> str:
    return place([decode], [worker(1)], request, hits or {}, 0.0).reason


def test_a_handover_happens_where_it_pays() -> None:
    busy = {"decoding": 100, "requests": 100}
    assert reason(Request(10), worker(0, **busy)) == "short_prompt"
    assert reason(Request(8000), worker(0, **busy)) == "handover"
    assert reason(Request(8000), worker(0, **busy), {0: (7990, 0)}) == "cached_prefix"
    assert reason(Request(8000), worker(0)) == "cheaper_here", "nobody is held up"
    assert reason(Request(8000, one_place="pooling"), worker(0, **busy)) == "pooling"


def test_a_worker_that_would_have_to_preempt_is_avoided() -> None:
    full = worker(0, reserved_tokens=399_000, requests=50, kv_tokens=90_000)
    emptier = worker(1, reserved_tokens=100_000, requests=50, kv_tokens=90_000)
    assert place([full, emptier], [], Request(4000), {}, 0.0).decode == 1
    full.reserved_tokens = 300_000
    assert place([full, emptier], [], Request(4000), {}, 0.0).decode == 0


def test_kv_in_the_store_counts_where_it_can_be_had() -> None:
    near, far = worker(0, store_node="a"), worker(1, store_node="b")
    request = Request(8000, stored={"a": [("host", 7936)], "b": [("remote", 2048)]})
    placement = place([near, far], [], request, {}, 0.0)
    assert placement.decode == 0
    best = placement.candidates[0]
    assert best.stored_tokens == (("host", 7936),)
    assert best.fetch_s == pytest.approx(MODEL.fetch_s("host", 7936))
    held = place([near, far], [], request, {0: (8000, 0)}, 0.0).candidates[0]
    assert held.stored_tokens == (), "it is on the device already"


def test_without_a_decode_worker_there_is_no_placement() -> None:
    with pytest.raises(ValueError, match="no decode"):
        place([], [], Request(1), {}, 0.0)


steps = st.lists(st.tuples(st.sampled_from(["start", "computed", "produced", "end"]), st.integers(0, 20)), max_size=60)


@settings(deadline=None)
@given(steps)
def test_the_books_balance_whatever_happens(steps) -> None:  # type: ignore[no-untyped-def]
    load, works, now = worker(0), [], 0.0
    for what, number in steps:
        now += 0.1
        if what == "start":
            works.append(Work(load, 100 + number, number, 0.05 * number, cached_tokens=number, priority=number % 3))
            works[-1].start(now)
        elif works:
            work = works[number % len(works)]
            if what == "computed":
                work.computed(now)
            elif what == "produced":
                work.produced(number)
            else:
                works.remove(work)
                work.end(now)
                work.end(now)
        assert load.requests == len(works)
        assert 0 <= load.decoding <= len(works)
        assert load.wait_s(now) >= 0.0
        for priority in range(-1, 3):
            later = [work for work in works if work.priority > priority]
            assert load.batch_before(priority) == len(works) - len(later)
            assert 0.0 <= load.wait_s(now, priority) <= load.wait_s(now)
        assert sum(band.reserved_tokens for band in load.bands.values()) == load.reserved_tokens
    for work in works:
        work.end(now)
    empty = worker(0)
    empty.busy_until = load.busy_until
    assert replace(load, waiting_s=0.0) == empty
    assert load.wait_s(now) == 0.0


def test_prompts_drain_with_the_clock_but_a_slow_worker_is_not_idle() -> None:
    load = worker(0)
    works = [Work(load, 1000, 10, 1.0) for _ in range(3)]
    for work in works:
        work.start(0.0)
    assert load.wait_s(0.0) == pytest.approx(3.0)
    assert load.wait_s(0.5) == pytest.approx(2.5)
    assert load.wait_s(9.0) == pytest.approx(2.0), "at most one of them is nearly done"
    works[0].computed(9.0)
    assert load.wait_s(9.0) == pytest.approx(2.0)


def test_room() -> None:
    load = worker(0)
    assert load.has_room(10**9, 0), "an empty worker takes what fits nowhere else, or says no itself"
    load.requests = 256
    assert not load.has_room(1, 0)
    assert load.has_room(1, 1)
    load.reserved_tokens = 399_999
    assert not load.has_room(2, 1)


def test_later_bands_take_no_room_from_earlier_ones() -> None:
    load = replace(worker(0), max_requests=2, capacity_tokens=1000)
    for _ in range(2):
        Work(load, 400, 50, 5.0, priority=5).start(0.0)
    assert not load.has_room(200, 0, 5)
    assert load.has_room(200, 0, 4)
    assert (load.wait_s(0.0, 5), load.wait_s(0.0, 4)) == (10.0, 0.0)
    Work(load, 400, 50, 5.0, priority=4).start(0.0)
    assert load.batch_before(4) == 1
    assert not load.has_room(1000, 0, 4), "memory that its own band has is not to be had"
    assert load.wait_s(0.0, 4) == 5.0


def test_other_routers_requests_yield_as_well() -> None:
    load = replace(worker(0), max_requests=2)
    Work(load, 100, 50, 1.0, priority=0).start(0.0)
    load.foreign(requests=3, decoding=0, pending_tokens=0, used_tokens=0, by_band={0: 1, 7: 3})
    assert (load.batch_before(7), load.batch_before(6), load.batch_before(0)) == (4, 1, 1)
    assert load.has_room(10, 0, 6)
    assert not load.has_room(10, 0, 7)


@given(st.lists(st.booleans(), max_size=6))
def test_the_last_band_leaves_one_worker_to_others(taken: list[bool]) -> None:
    loads = [worker(index) for index in range(len(taken))]
    for load, busy in zip(loads, taken, strict=True):
        if busy:
            Work(load, 100, 10, 0.1, priority=LAST_BAND).start(0.0)
    allowed = left_over(loads)
    for index in allowed:
        after = [busy or place == index for place, busy in enumerate(taken)]
        assert not all(after) or all(taken)
    assert set(allowed) >= {index for index, busy in enumerate(taken) if busy}
    if taken.count(False) > 1:
        assert len(allowed) == len(loads)


def test_other_routers_batches_count_too() -> None:
    loads = [worker(0), worker(1)]
    loads[1].foreign(requests=1, decoding=1, pending_tokens=0, used_tokens=0, by_band={LAST_BAND: 1})
    assert left_over(loads) == [1]


def test_a_tenant_with_far_more_yields_to_one_with_few() -> None:
    load = replace(worker(0), max_requests=16)
    for _ in range(16):
        Work(load, 10, 10, 0.0, tenant="hog").start(0.0)
    assert not load.has_room(10, 0)
    assert load.yields_to("victim", 1.0, 0)
    assert not load.yields_to("hog", 1.0, 0)
    assert not load.yields_to("victim", 1.0, 1), "bands are strict"
    mine = [Work(load, 10, 10, 0.0, tenant="victim") for _ in range(6)]
    for work in mine:
        work.start(0.0)
    assert not load.yields_to("victim", 1.0, 0), "it has its share"
    assert load.yields_to("victim", 4.0, 0), "which is larger with a larger weight"
    for work in mine:
        work.end(0.0)
    assert load.yields_to("victim", 1.0, 0)
    assert set(load.bands[0].tenants) == {"hog"}


def test_tenants_with_few_requests_each_yield_to_nobody() -> None:
    load = replace(worker(0), max_requests=16)
    for index in range(16):
        Work(load, 10, 10, 0.0, tenant=f"tenant {index // 2}").start(0.0)
    assert not load.yields_to("newcomer", 1.0, 0)


def test_requests_of_other_routers_yield_as_those_of_one_tenant() -> None:
    load = replace(worker(0), max_requests=16)
    load.foreign(requests=16, decoding=16, pending_tokens=0, used_tokens=0, by_band={0: 16})
    assert load.yields_to("victim", 1.0, 0)
    assert not load.yields_to("victim", 1.0, 3)


def test_a_pair_with_a_quick_link_is_found_where_the_cheapest_worker_is_behind_a_slow_one() -> None:
    model = PerfModel("nvidia-h100", ModelShape(8 * 10**9, 16 * 10**9, 131_072))
    busy = {"decoding": 100, "requests": 100, "model": model}
    decodes = [worker(0, host="d0", **busy), worker(1, host="d1", **busy)]
    prefills = [worker(2, host="p0", model=model), worker(3, host="p1", model=model, waiting=1, waiting_s=0.02)]
    for slow in (("p0", "d0"), ("p0", "d1"), ("p1", "d0")):
        model.observe_handover(8000, 20.0, slow, 0.0)
    placement = place(decodes, prefills, Request(8000), {}, 0.0)
    assert (placement.reason, placement.prefill, placement.decode) == ("handover", 1, 1)
    assert cost_of(placement, decodes, prefills).handover_s < 1.0
    assert max(cost.handover_s for cost in placement.candidates) > 10.0, "what is believed of the others is shown"
    model.observe_handover(8000, 20.0, ("p1", "d1"), 0.0)
    assert place(decodes, prefills, Request(8000), {}, 0.0).prefill is None
    assert place(decodes, prefills, Request(8000), {}, 3600.0).prefill is not None, "it may have been repaired"
