"""Whose request gets blocks next on a worker: tenants by service, one tenant by arrival, those who have begun first."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tandem.common.errors import TandemError
from tandem.common.fairness import INPUT_COST, OUTPUT_COST, ServiceCounters
from tandem.engine.schedule.block_manager import BlockManager
from tandem.engine.schedule.plan import StepPlan
from tandem.engine.schedule.scheduler import Scheduler
from tandem.engine.schedule.sequence import Sequence
from tandem.engine.schedule.waiting import WaitingQueue
from tandem.proto import worker_pb2
from tandem.worker.wire import request_from_proto
from tests.engine_harness import make_sequence

BLOCK = 16


class Floor:
    """A scheduler whose model always answers token 7."""

    def __init__(self, slots: int = 4, num_blocks: int = 400, budget: int = 512) -> None:
        self.blocks = BlockManager(num_blocks, BLOCK)
        self.scheduler = Scheduler(self.blocks, max_num_seqs=slots, max_num_batched_tokens=budget, max_waiting=1000)
        self.admitted: list[Sequence] = []
        self.served: dict[str, int] = {}
        self._count = 0

    def add(self, tenant: str, tokens: int = 32, weight: float = 1.0, **options: Any) -> Sequence:
        self._count += 1
        prompt = [(self._count * 7919 + index * 31) % 30_000 for index in range(tokens)]
        sequence = make_sequence(f"{tenant}-{self._count}", prompt, **({"max_tokens": 4} | options))
        sequence.request.tenant = tenant
        sequence.request.weight = weight
        self.scheduler.add(sequence)
        return sequence

    def step(self, now: float = 0.0) -> StepPlan:
        plan = self.scheduler.schedule(now)
        self.admitted += plan.admitted
        self.scheduler.computed(plan)
        for sequence in [*plan.decodes, *(chunk.sequence for chunk in plan.chunks)]:
            if sequence.remaining == 0:
                sequence.append(7)
                tenant = sequence.request.tenant
                self.served[tenant] = self.served.get(tenant, 0) + 1
                if len(sequence.tokens) >= sequence.max_total:
                    self.scheduler.finish(sequence)
        self.scheduler.check_integrity()
        return plan


def tenants(sequences: list[Sequence]) -> list[str]:
    return [sequence.request.tenant for sequence in sequences]


def test_a_light_tenant_passes_the_backlog_of_a_greedy_one() -> None:
    floor = Floor(slots=2)
    for _ in range(50):
        floor.add("greedy")
    for _ in range(3):
        floor.step()
    light = floor.add("light")
    while light not in floor.admitted:
        floor.step()
    assert len(floor.admitted) <= 5


def test_service_follows_weights() -> None:
    floor = Floor(slots=4, num_blocks=2000)
    for _ in range(200):
        floor.add("ann", weight=3.0)
        floor.add("bob", weight=1.0)
    while len(floor.admitted) < 160:
        floor.step()
    share = tenants(floor.admitted).count("ann") / len(floor.admitted)
    assert share == pytest.approx(0.75, abs=0.05)


def test_priority_goes_before_fairness() -> None:
    floor = Floor(slots=1)
    for _ in range(3):
        floor.add("light", priority=5)
    for _ in range(3):
        floor.add("greedy", priority=1)
    while len(floor.admitted) < 6:
        floor.step()
    assert tenants(floor.admitted) == ["greedy"] * 3 + ["light"] * 3


def test_who_was_preempted_goes_on_before_others_begin() -> None:
    """Two requests outgrow the pool; the one that had to leave comes back before a tenant that had nothing yet."""
    floor = Floor(slots=2, num_blocks=10)
    first = floor.add("ann", tokens=62, max_tokens=60)
    second = floor.add("amy", tokens=62, max_tokens=20)
    floor.step()
    for _ in range(3):
        floor.add("bob", tokens=62)
    while len(floor.admitted) < 3:
        floor.step()
    assert floor.admitted[:2] == [first, second]
    assert floor.admitted[2] is second


def test_output_that_another_worker_began_goes_on_before_others_begin() -> None:
    floor = Floor(slots=1)
    floor.add("light")
    continued = make_sequence("continued", list(range(40)), max_tokens=8)
    continued.request.tenant = "greedy"
    continued.append(7)
    floor.scheduler.add(continued)
    floor.step()
    assert floor.admitted == [continued]


def test_kv_that_comes_from_a_prefill_worker_is_not_charged_as_input() -> None:
    floor = Floor()
    imported = floor.add("ann", tokens=100, kv_import=object())
    computed = floor.add("bob", tokens=100)
    floor.step()
    assert imported.account is not None
    assert imported.account.counter == 0.0
    assert computed.account is not None
    assert computed.account.counter == 100 * INPUT_COST


@settings(max_examples=60, deadline=None)
@given(
    st.lists(
        st.tuples(st.sampled_from(["ann", "bob", "cat"]), st.integers(1, 120), st.integers(1, 12)),
        min_size=1,
        max_size=40,
    ),
    st.integers(1, 4),
    st.integers(0, 10),
)
def test_waiting_tenants_never_differ_by_more_than_what_runs_can_still_cost(
    jobs: list[tuple[str, int, int]], slots: int, pause: int
) -> None:
    """The bound of `common/fairness.py` with no quantum: what requests of one tenant can be charged once chosen."""
    floor = Floor(slots=slots)
    all_added: list[Sequence] = []
    apart = 0.0
    for index, (tenant, tokens, output) in enumerate(jobs):
        all_added.append(floor.add(tenant, tokens, max_tokens=output))
        if pause and index % pause == 0:
            floor.step()
    for _ in range(3000):
        if not floor.scheduler.num_waiting and not floor.scheduler.num_running:
            break
        waiting = {sequence.request.tenant: sequence.account for sequence in floor.scheduler.roster.waiting.sequences()}
        counters = [account.counter for account in waiting.values() if account is not None]
        apart = max(apart, max(counters, default=0.0) - min(counters, default=0.0))
        floor.step()
    longest = max(tokens * INPUT_COST + output * OUTPUT_COST for _, tokens, output in jobs)
    assert apart <= slots * longest
    assert all(len(sequence.tokens) == sequence.max_total for sequence in all_added)


def reference_turns(sequences: list[Sequence], counters: ServiceCounters) -> list[Sequence]:
    """The order in which all would be tried if none were admitted, said slowly."""
    left = list(sequences)
    order: list[Sequence] = []
    while left:
        heads = [
            sequence
            for sequence in left
            if not any(
                (other.priority, other.request.tenant) == (sequence.priority, sequence.request.tenant)
                and other.arrival < sequence.arrival
                for other in left
            )
        ]
        lowest = min(sequence.priority for sequence in heads)
        heads = [sequence for sequence in heads if sequence.priority == lowest]
        begun = [sequence for sequence in heads if sequence.first_scheduled is not None]
        if begun:
            chosen = min(begun, key=lambda sequence: sequence.arrival)
        else:
            values = counters.values()
            chosen = min(heads, key=lambda each: (values[each.priority, each.request.tenant], each.arrival))
        order.append(chosen)
        left.remove(chosen)
    return order


waiting_requests = st.lists(
    st.tuples(st.sampled_from(["ann", "bob", "cat"]), st.integers(0, 1), st.booleans(), st.integers(0, 50)),
    max_size=25,
)


@settings(max_examples=100, deadline=None)
@given(waiting_requests, st.randoms(use_true_random=False))
def test_turns_follow_the_obvious_reference(requests: list[tuple[str, int, bool, int]], random: Any) -> None:
    counters = ServiceCounters()
    queue = WaitingQueue(counters)
    sequences = []
    for arrival, (tenant, priority, begun, service) in enumerate(requests):
        sequence = make_sequence(f"{arrival}", [1, 2, 3], priority=priority)
        sequence.request.tenant = tenant
        sequence.arrival = arrival
        sequence.first_scheduled = 0.0 if begun else None
        counters.charge(tenant, priority, service, 1.0)
        sequences.append(sequence)
    shuffled = list(sequences)
    random.shuffle(shuffled)
    for sequence in shuffled:
        queue.add(sequence)
    assert list(queue.in_turn()) == reference_turns(sequences, counters)
    assert (len(queue), queue.problems()) == (len(sequences), [])
    # One by one, each admitted (or cancelled) at once: charges move the turns.
    while queue:
        expected = reference_turns(queue.sequences(), counters)[0]
        chosen = next(queue.in_turn())
        assert chosen is expected
        if random.random() < 0.2:
            queue.remove(chosen)
        else:
            queue.admit(chosen, random.randrange(100))
        assert queue.problems() == []


@settings(max_examples=50, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 2), st.booleans()), max_size=30))
def test_one_tenant_is_served_by_priority_and_arrival(requests: list[tuple[int, bool]]) -> None:
    queue = WaitingQueue(ServiceCounters())
    sequences = []
    for arrival, (priority, begun) in enumerate(requests):
        sequence = make_sequence(f"{arrival}", [1, 2, 3], priority=priority)
        sequence.arrival = arrival
        sequence.first_scheduled = 0.0 if begun else None
        queue.add(sequence)
        sequences.append(sequence)
    assert list(queue.in_turn()) == sorted(sequences, key=lambda sequence: sequence.order)


def test_the_weight_travels_with_the_request() -> None:
    def submit(weight: float) -> worker_pb2.Submit:
        key = worker_pb2.RequestKey(request_id="r", epoch=1)
        sampling = worker_pb2.SamplingParams(max_tokens=1, top_p=1.0, repetition_penalty=1.0)
        return worker_pb2.Submit(key=key, prompt_token_ids=[1], sampling=sampling, weight=weight)

    assert request_from_proto(submit(2.5)).weight == 2.5
    assert request_from_proto(submit(0.0)).weight == 1.0
    for wrong in (-1.0, float("nan"), float("inf")):
        with pytest.raises(TandemError, match="weight"):
            request_from_proto(submit(wrong))
