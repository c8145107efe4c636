"""Scheduling rules, one by one and under random workloads. No model: a step is played by advancing the books."""

from __future__ import annotations

import random
from collections.abc import Callable
from collections.abc import Sequence as Seq
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tandem.common.errors import TandemError
from tandem.common.fairness import LAST_BAND
from tandem.engine.request import Preemption, RequestKey
from tandem.engine.schedule.admission import MAX_DISPLACED
from tandem.engine.schedule.block_manager import BlockManager, IntegrityError
from tandem.engine.schedule.plan import StepPlan
from tandem.engine.schedule.ranges import EMPTY, TokenRanges
from tandem.engine.schedule.scheduler import Scheduler
from tandem.engine.schedule.sequence import Phase, Sequence
from tandem.kvstore.identity import prefix_chain
from tests.engine_harness import make_sequence

BLOCK = 16
up_to = TokenRanges.up_to


class Play:
    """A scheduler with a model that always answers token 7."""

    rows_may_rest = False
    """Rows of other bands than the last: tenants compete, and more rows make longer steps (test_row_shares.py)."""

    def __init__(
        self,
        num_blocks: int = 65,
        max_num_seqs: int = 8,
        budget: int = 64,
        max_waiting: int = 100,
        beside: int | None = None,
        longest_request: int = 0,
    ) -> None:
        self.blocks = BlockManager(num_blocks, BLOCK, longest_request=longest_request)
        self.scheduler = Scheduler(
            self.blocks,
            max_num_seqs=max_num_seqs,
            max_num_batched_tokens=budget,
            max_waiting=max_waiting,
            max_prompt_tokens_beside_decodes=beside,
        )
        self.budget = budget
        self.beside = beside or budget
        self.now = 0.0
        self.step_s: Callable[[StepPlan], float] = lambda plan: 1.0
        self.emitted: dict[str, int] = {}

    def add(self, name: str, length: int, **options: Any) -> Sequence:
        tokens = options.pop("tokens", None) or [hash_free(name, i) for i in range(length)]
        look_up = options.pop("look_up", False)
        sequence = make_sequence(name, tokens, **({"max_tokens": 4} | options))
        self.scheduler.add(sequence, look_up)
        return sequence

    def step(self) -> StepPlan:
        """Plans and plays one step, and checks what must hold for every step."""
        running = [s for s in self.scheduler.roster.running if s.num_computed >= s.num_prompt and s.remaining == 1]
        waiting = {s.key: s.priority for s in self.scheduler.roster.waiting.sequences()}
        plan = self.scheduler.schedule(self.now)
        self.check_displaced(plan, waiting)
        assert plan.num_tokens <= self.budget
        if plan.decodes:
            assert sum(chunk.num_tokens for chunk in plan.chunks) <= self.beside
        for sequence in running:
            rests = self.rows_may_rest or sequence.priority == LAST_BAND  # tests/engine/schedule/test_last_band.py
            assert rests or sequence in plan.decodes or sequence in plan.preempted, "a decode stalled"
        assert all(chunk.num_tokens > 0 for chunk in plan.chunks)
        names = [s.key for s in plan.decodes] + [chunk.sequence.key for chunk in plan.chunks]
        assert len(set(names)) == len(names)
        for sequence in plan.decodes + [chunk.sequence for chunk in plan.chunks]:
            assert sequence.phase is Phase.RUNNING
        for chunk in plan.chunks:
            chunk.sequence.gated = False  # a step waits for what is still on its way
        self.now += self.step_s(plan)
        self.scheduler.took(plan, self.step_s(plan))
        self.scheduler.computed(plan)
        for sequence in list(plan.decodes) + [chunk.sequence for chunk in plan.chunks]:
            assert sequence.num_computed <= len(self.blocks.table(sequence.key)) * BLOCK
            if sequence.remaining == 0:
                sequence.append(7)
                name = sequence.key.request_id
                self.emitted[name] = self.emitted.get(name, 0) + 1
                assert self.emitted[name] == sequence.num_output, "a token was emitted twice"
                if len(sequence.tokens) >= sequence.max_total:
                    self.scheduler.finish(sequence)
        self.scheduler.check_integrity()
        return plan

    def check_displaced(self, plan: StepPlan, waiting: dict[RequestKey, int]) -> None:
        """Who is displaced makes room for somebody of an earlier band that waited, and who takes it in this step."""
        displaced = [s for s in plan.preempted if s.preempted is Preemption.PRIORITY]
        taken = [waiting[s.key] for s in plan.admitted]
        for sequence in displaced:
            assert sequence.displaced <= MAX_DISPLACED
            assert any(priority < sequence.priority for priority in taken) or len(displaced) < len(plan.preempted)
        assert not {s.key for s in plan.preempted} & {s.key for s in plan.admitted}

    def run(self, limit: int = 2000) -> None:
        for _ in range(limit):
            plan = self.step()
            if not (plan.num_tokens or plan.admitted or plan.preempted):
                return
        raise AssertionError("it does not come to an end")


def hash_free(name: str, index: int) -> int:
    """Tokens that differ from request to request, so that nothing is shared by accident."""
    return (sum(name.encode()) * 31 + index * 7) % 500


def order_of_admission(play: Play) -> list[str]:
    names: list[str] = []
    for _ in range(200):
        names += [s.key.request_id for s in play.step().admitted]
    return names


def test_priorities_first_then_arrival() -> None:
    play = Play(max_num_seqs=1)
    for name, priority in (("late", 1), ("a", 0), ("b", 0), ("urgent", -1)):
        play.add(name, 20, priority=priority)
    assert order_of_admission(play) == ["urgent", "a", "b", "late"]


def test_a_long_prompt_never_stalls_decodes_and_shares_the_rest() -> None:
    play = Play(budget=64, num_blocks=200)
    short = [play.add(f"s{i}", 5, max_tokens=60) for i in range(3)]
    play.step()
    long = play.add("long", 1000, max_tokens=2)
    steps = 0
    while long.num_output == 0:
        before = [s.num_output for s in short]
        plan = play.step()
        assert [s.num_output for s in short] == [n + 1 for n in before]
        assert plan.chunks[0].num_tokens <= 61
        steps += 1
    assert steps == -(-1000 // 48), "chunks of 48: what is left of 64, cut at a block"


def test_prompts_take_small_chunks_beside_decodes_and_large_ones_alone() -> None:
    play = Play(budget=64, beside=16, num_blocks=200)
    play.add("short", 5, max_tokens=3)
    play.step()
    play.add("long", 200)
    sizes = []
    for _ in range(5):
        plan = play.step()
        sizes.append((len(plan.decodes), [chunk.num_tokens for chunk in plan.chunks]))
    assert sizes == [(1, [16]), (1, [16]), (0, [64]), (0, [64]), (0, [40])]


def test_chunks_end_at_block_boundaries_until_the_last() -> None:
    play = Play(budget=70, num_blocks=200)
    long = play.add("long", 301)
    while long.num_output == 0:
        plan = play.step()
        assert long.num_computed % BLOCK == 0 or long.num_computed == 301
        assert len(plan.chunks) == 1
    assert long.chunk_ends == [64, 128, 192, 256, 301]


def test_a_short_prompt_follows_a_long_one_within_the_same_step() -> None:
    play = Play(budget=64)
    play.add("a", 40)
    second = play.add("b", 40)
    plan = play.step()
    assert [chunk.num_tokens for chunk in plan.chunks] == [40, 16]
    play.step()
    assert second.num_output == 1


def test_more_than_the_queue_holds_is_refused() -> None:
    play = Play(max_waiting=2)
    play.add("a", 5)
    play.add("b", 5)
    with pytest.raises(TandemError) as refusal:
        play.add("c", 5)
    assert refusal.value.code == "overloaded"
    assert refusal.value.kind.retriable


def test_what_can_never_fit_is_refused() -> None:
    play = Play(num_blocks=5)
    play.add("fits", 60, max_tokens=4)
    with pytest.raises(TandemError) as refusal:
        play.add("does not", 60, max_tokens=5)
    assert refusal.value.code == "context_length_exceeded"


def test_the_last_in_order_is_preempted_and_its_tokens_survive() -> None:
    play = Play(num_blocks=10, budget=200)
    first = play.add("first", 60, max_tokens=60)
    second = play.add("second", 50, max_tokens=60)
    play.step()
    preempted: list[str] = []
    for _ in range(80):
        kept = list(second.tokens)
        plan = play.step()
        preempted += [s.key.request_id for s in plan.preempted]
        assert second.tokens[: len(kept)] == kept
    play.run()
    assert first.phase is second.phase is Phase.FINISHED
    assert set(preempted) == {"second"}
    assert play.emitted == {"first": 60, "second": 60}


def test_the_least_urgent_is_preempted_whoever_came_first() -> None:
    play = Play(num_blocks=10, budget=200)
    play.add("background", 60, max_tokens=60, priority=5)
    play.add("urgent", 50, max_tokens=60)
    preempted: list[str] = []
    for _ in range(70):
        preempted += [s.key.request_id for s in play.step().preempted]
    assert set(preempted) == {"background"}


def test_a_recompute_ends_its_chunks_where_the_first_computation_did() -> None:
    play = Play(num_blocks=200, budget=64, max_num_seqs=4)
    others = [play.add(f"o{i}", 5, max_tokens=30) for i in range(2)]
    play.step()
    victim = play.add("victim", 200, max_tokens=30)
    while victim.num_output < 3:
        play.step()
    ends = list(victim.chunk_ends)
    assert ends[0] == 48
    for sequence in others:
        play.scheduler.finish(sequence)
    play.scheduler.roster.preempt(StepPlan(), victim, Preemption.MEMORY)
    evictor = RequestKey("evictor", 1)
    assert play.blocks.allocate(evictor, play.blocks.available_blocks * play.blocks.block_size, []) == 0
    play.blocks.free(evictor)
    seen: list[int] = []
    while victim.num_output < 4:
        play.step()
        seen.append(victim.num_computed)
    assert seen[: len(ends)] == ends
    assert victim.chunk_ends == ends, "they are noted once"
    assert ends[-1] == 200, "up to the end of the prompt, not of the output"


def test_equal_prompts_wait_for_the_blocks_of_the_first() -> None:
    play = Play(budget=64)
    prompt = list(range(40))
    first = play.add("first", 0, tokens=prompt)
    second = play.add("second", 0, tokens=prompt)
    other = play.add("other", 20)
    plan = play.step()
    assert [s.key.request_id for s in plan.admitted] == ["first", "other"]
    play.step()
    assert second.report is not None
    assert second.report.cached_tokens == 32
    assert play.blocks.table(first.key)[:2] == play.blocks.table(second.key)[:2]
    assert play.blocks.table(first.key)[2] != play.blocks.table(second.key)[2]
    play.run()
    assert other.phase is Phase.FINISHED


def test_nobody_waits_for_a_block_that_it_has_to_compute_itself() -> None:
    """The last known token is always computed: a block that ends with it is no use."""
    play = Play(budget=40)
    prompt = list(range(48))
    play.add("first", 0, tokens=prompt)
    second = play.add("second", 0, tokens=prompt)
    assert play.step().chunks[0].num_tokens == 32
    plan = play.step()
    assert plan.admitted == [second]
    assert second.report is not None
    assert second.report.cached_tokens == 32


def test_blocks_of_output_are_known_by_what_is_in_them() -> None:
    play = Play()
    sequence = play.add("a", 20, max_tokens=50)
    while sequence.num_output < 40:
        play.step()
    known = prefix_chain(sequence.root, sequence.tokens, BLOCK)
    assert len(sequence.chain) == sequence.published == (20 + 39) // BLOCK
    assert sequence.chain == known[: len(sequence.chain)]


def test_equal_prompts_of_two_tenants_share_nothing() -> None:
    play = Play(budget=100)
    prompt = list(range(40))
    first = play.add("first", 0, tokens=prompt, salt=b"one")
    second = play.add("second", 0, tokens=prompt, salt=b"two")
    play.step()
    assert not set(play.blocks.table(first.key)) & set(play.blocks.table(second.key))


def test_a_request_goes_on_when_the_one_it_waited_for_is_cancelled() -> None:
    play = Play(budget=32)
    prompt = list(range(90))
    first = play.add("first", 0, tokens=prompt)
    second = play.add("second", 0, tokens=prompt)
    play.step()
    assert second.phase is Phase.WAITING
    play.scheduler.finish(first)
    play.run()
    assert second.num_output == 4


def test_prompt_logprobs_do_not_use_the_cache() -> None:
    play = Play(budget=200)
    prompt = list(range(90))
    play.add("first", 0, tokens=prompt)
    play.run()
    scored = play.add("scored", 0, tokens=prompt, prompt_logprobs=1)
    plan = play.step()
    assert [chunk.num_tokens for chunk in plan.chunks] == [90]
    assert scored.report is not None
    assert scored.report.cached_tokens == 0


def test_output_blocks_are_reused_by_a_follow_up() -> None:
    play = Play(budget=200)
    first = play.add("first", 20, max_tokens=30)
    play.run()
    second = play.add("second", 0, tokens=[*first.tokens, 1, 2, 3])
    play.step()
    assert second.report is not None
    assert second.report.cached_tokens == 48


def test_deadlines_expire_waiting_and_running_once() -> None:
    play = Play(max_num_seqs=1)
    running = play.add("running", 5, deadline=10.0, max_tokens=100)
    waiting = play.add("waiting", 5, deadline=5.0)
    play.add("patient", 5)
    play.step()
    assert play.scheduler.next_deadline() == 5.0
    assert play.scheduler.expired(4.9) == []
    assert play.scheduler.expired(5.0) == [waiting]
    assert play.scheduler.expired(5.0) == []
    play.scheduler.finish(waiting)
    assert play.scheduler.expired(11.0) == [running]
    play.scheduler.finish(running)
    assert play.scheduler.next_deadline() is None
    play.run()


def test_an_import_holds_blocks_outside_the_steps_and_joins() -> None:
    play = Play()
    waiting = play.add("import", 40, kv_import=object())
    plan = play.step()
    assert plan.admitted == [waiting]
    assert plan.num_tokens == 0
    assert waiting.phase is Phase.IMPORTING
    assert len(play.blocks.table(waiting.key)) == 3
    play.scheduler.join(waiting, up_to(40))
    waiting.append(7)
    play.emitted["import"] = 1
    assert play.step().decodes == [waiting]
    play.run()
    assert play.emitted == {"import": 4}


def test_a_failed_import_is_computed_here_from_what_was_cached() -> None:
    play = Play()
    waiting = play.add("import", 40, kv_import=object())
    play.step()
    play.scheduler.join(waiting, up_to(0))
    assert [chunk.num_tokens for chunk in play.step().chunks] == [40]
    play.run()
    assert play.emitted == {"import": 4}


def test_absent_imports_do_not_starve_others_beyond_their_slots() -> None:
    play = Play(max_num_seqs=3)
    for i in range(2):
        play.add(f"import{i}", 20, kv_import=object())
    for i in range(5):
        play.add(f"local{i}", 20)
    play.run()
    assert set(play.emitted) == {f"local{i}" for i in range(5)}


def test_a_held_sequence_keeps_its_blocks_but_not_its_slot() -> None:
    play = Play(max_num_seqs=1)
    held = play.add("held", 20)
    play.step()
    play.scheduler.hold(held)
    play.add("next", 20)
    play.run()
    assert play.blocks.holds(held.key)
    play.scheduler.finish(held)
    assert play.blocks.available_blocks == play.blocks.usable_blocks


def test_a_looked_up_sequence_keeps_its_place() -> None:
    play = Play(max_num_seqs=1)
    play.add("running", 20)
    first = play.add("first", 20, look_up=True)
    play.add("second", 20)
    assert play.scheduler.num_waiting == 3
    play.step()
    play.scheduler.looked_up(first)
    assert order_of_admission(play) == ["first", "second"]


def test_those_that_are_looked_up_count_as_waiting() -> None:
    play = Play(max_waiting=2)
    play.add("a", 20, look_up=True)
    play.add("b", 20, look_up=True)
    with pytest.raises(TandemError, match="2 requests are waiting"):
        play.add("c", 20)


def test_what_the_store_has_is_loaded_outside_the_steps() -> None:
    play = Play()
    loaded = play.add("load", 100)
    loaded.stored = up_to(64)
    assert play.scheduler.pending_prefill_tokens == 36
    plan = play.step()
    assert plan.admitted == [loaded]
    assert (plan.chunks, loaded.phase) == ([], Phase.LOADING)
    play.scheduler.join(loaded, up_to(64))
    play.scheduler.publish(loaded)
    assert [chunk.num_tokens for chunk in play.step().chunks] == [36]
    play.run()
    assert play.emitted == {"load": 4}


def test_what_the_device_has_is_not_loaded() -> None:
    play = Play()
    tokens = [hash_free("same", i) for i in range(100)]
    play.add("before", 0, tokens=tokens[:50])
    play.run()
    after = play.add("after", 0, tokens=tokens)
    after.stored = up_to(48)
    assert [chunk.num_tokens for chunk in play.step().chunks] == [52]


def test_what_lies_between_device_and_store_is_computed_and_what_is_there_is_not() -> None:
    play = Play()
    tokens = [hash_free("same", i) for i in range(100)]
    play.add("before", 0, tokens=tokens[:50])
    play.run()
    after = play.add("after", 0, tokens=tokens)
    after.stored = TokenRanges.of((64, 96))
    assert (play.step().chunks, after.phase) == ([], Phase.LOADING)
    assert play.scheduler.pending_prefill_tokens == 20
    play.scheduler.join(after, after.there.union(after.stored))
    assert play.scheduler.pending_prefill_tokens == after.remaining == 20
    assert [chunk.tokens.parts for chunk in play.step().chunks] == [((48, 64), (96, 100))]
    assert (after.num_computed, after.ahead, after.remaining) == (100, EMPTY, 1)
    play.run()
    assert play.emitted == {"before": 4, "after": 4}


def test_gaps_are_computed_in_order_as_far_as_the_budget_goes() -> None:
    play = Play(budget=2 * BLOCK)
    sequence = play.add("a", 10 * BLOCK)
    sequence.stored = TokenRanges.of((BLOCK, 4 * BLOCK), (6 * BLOCK, 7 * BLOCK + 5))
    play.step()
    play.scheduler.join(sequence, sequence.stored)
    computed = [chunk.tokens.parts for _ in range(4) for chunk in play.step().chunks]
    assert computed == [
        ((0, BLOCK), (4 * BLOCK, 5 * BLOCK)),
        ((5 * BLOCK, 6 * BLOCK), (7 * BLOCK + 5, 8 * BLOCK)),
        ((8 * BLOCK, 10 * BLOCK),),
    ]
    assert sequence.chunk_ends == [5 * BLOCK, 8 * BLOCK, 10 * BLOCK]


def test_pending_prefill_tokens_are_all_that_will_be_computed_here() -> None:
    """Each group of sequences has a number of its own, so that none can be left out, or counted against another."""
    play = Play(num_blocks=1000, max_num_seqs=4)
    play.add("decodes", 5, max_tokens=40)
    play.step()
    imports = play.add("imports", 10, kv_import=object())
    loads = play.add("loads", 1000)
    loads.stored = up_to(64)
    begun = play.add("half computed", 2000)
    while begun.num_computed == 0:
        play.step()
    assert (imports.phase, loads.phase, begun.phase) == (Phase.IMPORTING, Phase.LOADING, Phase.RUNNING)
    play.add("looked up", 3000, look_up=True)
    play.add("waits", 5000).stored = up_to(128)
    play.add("waits for an import", 7000, kv_import=object())
    pending = (1000 - 64) + (2000 - begun.num_computed) + 3000 + (5000 - 128)
    assert play.scheduler.pending_prefill_tokens == pending


def test_what_is_going_on_is_told_by_phase_and_band() -> None:
    play = Play(num_blocks=1000, max_num_seqs=4)
    decodes = play.add("decodes", 5, max_tokens=40, priority=-1)
    play.step()
    play.add("imports", 10, kv_import=object())
    play.add("loads", 1000, priority=3).stored = up_to(64)
    begun = play.add("half computed", 2000)
    while begun.num_computed == 0:
        play.step()
    for number in range(3):
        play.add(f"waits {number}", 50, priority=5)
    play.add("looked up", 3000, look_up=True, priority=5)
    for _ in range(3):
        scheduler = play.scheduler
        assert (scheduler.num_running, scheduler.num_waiting) == (4, 4), "who imports or loads has a slot"
        assert scheduler.roster.free_slots == 0
        assert scheduler.by_band() == {-1: 1, 0: 2, 3: 1, 5: 4}
        assert scheduler.decode_load() == (1, decodes.num_computed)
        play.step()
    assert begun.prefills


@pytest.mark.parametrize(
    ("damage", "finding"),
    [
        (lambda running, waiting: setattr(running, "phase", Phase.HOLDING), "is Phase.HOLDING among the running"),
        (lambda running, waiting: setattr(waiting, "gated", True), "is waiting and gated"),
        (lambda running, waiting: setattr(running, "num_computed", 49), r"has KV of tokens .* in 48 slots"),
        (lambda running, waiting: setattr(running, "ahead", up_to(1)), "are behind 35"),
        (lambda running, waiting: setattr(running, "ahead", TokenRanges.of((35, 36))), "are behind 35"),
        (lambda running, waiting: setattr(waiting, "ahead", TokenRanges.of((19, 20))), "are behind 0"),
        (
            lambda running, waiting: (running.tokens.append(7), setattr(running, "ahead", TokenRanges.of((35, 36)))),
            "are behind 35",
        ),
        (lambda running, waiting: setattr(waiting.account, "waiting", 2), "1 requests of .* wait, 2 are counted"),
        (lambda running, waiting: setattr(waiting, "arrival", 5), "out of order"),
        (lambda running, waiting: setattr(running, "published", 3), "published more than the 35 tokens"),
        (lambda running, waiting: setattr(waiting, "key", running.key), "a request is in two phases"),
    ],
)
def test_what_is_wrong_is_found(damage: Callable[[Sequence, Sequence], None], finding: str) -> None:
    play = Play(max_num_seqs=1)
    running = play.add("running", 31, max_tokens=10)
    waiting = play.add("waiting", 20)
    for _ in range(5):
        play.step()
    assert (running.num_computed, len(running.tokens)) == (35, 36)
    damage(running, waiting)
    with pytest.raises(IntegrityError, match=finding):
        play.scheduler.check_integrity()


def test_equal_prompts_wait_for_the_one_that_loads() -> None:
    play = Play()
    tokens = [hash_free("same", i) for i in range(100)]
    first, second = (play.add(name, 0, tokens=tokens) for name in ("first", "second"))
    first.stored = second.stored = up_to(96)
    assert play.step().admitted == [first]
    assert not play.step().admitted
    play.scheduler.join(first, up_to(96))
    play.scheduler.publish(first)
    plan = play.step()
    assert [(chunk.sequence, chunk.num_tokens) for chunk in plan.chunks] == [(first, 4), (second, 4)]


def test_a_gated_sequence_is_not_preempted_and_can_be_suspended() -> None:
    play = Play(num_blocks=8)
    decoding = play.add("decoding", 31, max_tokens=40)
    play.step()
    gated = play.add("gated", 64)
    gated.stored = up_to(48)
    play.step()
    play.scheduler.join(gated, up_to(48), gated=True)
    assert play.scheduler.roster.victim() is decoding
    play.scheduler.suspend(gated, up_to(0))
    play.scheduler.check_integrity()
    assert play.step().decodes == [decoding]
    play.scheduler.join(gated, up_to(16))
    play.run()
    assert play.emitted == {"decoding": 40, "gated": 4}


def test_full_blocks_are_told_of() -> None:
    play, told = Play(), []
    play.scheduler.on_full_blocks = lambda sequence: told.append(sequence.num_computed)
    play.add("a", 30, max_tokens=4)
    play.run()
    assert told == [30, 32], "after the prompt and where a decode fills a block, not for every token"


def shuffled_loads(rng: random.Random, play: Play, sequences: Seq[Sequence]) -> None:
    scheduler = play.scheduler
    for sequence in sequences:
        if sequence.phase is Phase.LOOKUP and rng.random() < 0.5:
            end = min(rng.randint(0, 80), sequence.num_prompt - 1)
            sequence.stored = TokenRanges.of((rng.randrange(0, end + 1, BLOCK), end))
            scheduler.looked_up(sequence)
        elif sequence.phase is Phase.LOADING and rng.random() < 0.3:
            loaded = rng.choice((sequence.there, sequence.there.union(sequence.stored)))
            gated = rng.random() < 0.3
            scheduler.join(sequence, loaded, gated)
            if not gated:
                scheduler.publish(sequence)
        elif sequence.gated and sequence.phase is Phase.RUNNING:
            if rng.random() < 0.5:
                scheduler.suspend(sequence, up_to(0))
            else:
                sequence.gated = False


def shuffled_imports(rng: random.Random, play: Play, imports: Seq[Sequence]) -> None:
    for sequence in imports:
        if sequence.phase is Phase.IMPORTING and rng.random() < 0.3:
            if rng.random() < 0.5:
                play.scheduler.join(sequence, sequence.there)
            else:
                play.scheduler.join(sequence, up_to(sequence.num_prompt))
                play.scheduler.publish(sequence)
                sequence.append(7)
                name = sequence.key.request_id
                play.emitted[name] = play.emitted.get(name, 0) + 1
                if len(sequence.tokens) >= sequence.max_total:
                    play.scheduler.finish(sequence)


@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 2**32), num_blocks=st.integers(6, 40), slots=st.integers(1, 8), spare=st.integers(16, 80))
def test_random_workloads_come_to_an_end(seed: int, num_blocks: int, slots: int, spare: int) -> None:
    rng = random.Random(seed)
    beside = rng.choice([None, 16, 40])
    play = Play(num_blocks=num_blocks, max_num_seqs=slots, budget=slots + spare, beside=beside)
    capacity = (num_blocks - 1) * BLOCK
    alive: list[Sequence] = []
    cancelled: set[str] = set()
    prompts = [[rng.randrange(400) for _ in range(80)] for _ in range(3)]
    for index in range(30):
        for _ in range(rng.randint(0, 2)):
            output = rng.randint(1, min(40, capacity - 1))
            length = rng.randint(1, min(70, capacity - output))
            kv_import = object() if rng.random() < 0.3 else None
            look_up = kv_import is None and rng.random() < 0.4
            alive.append(
                play.add(
                    f"r{index}-{len(alive)}",
                    0,
                    tokens=rng.choice(prompts)[:length],
                    max_tokens=output,
                    priority=rng.randint(0, 2),
                    kv_import=kv_import,
                    look_up=look_up,
                )
            )
        if alive and rng.random() < 0.15:
            victim = rng.choice(alive)
            if victim.phase is not Phase.FINISHED:
                cancelled.add(victim.key.request_id)
                play.scheduler.finish(victim)
        shuffled_imports(rng, play, alive)
        shuffled_loads(rng, play, alive)
        play.step()
    for _ in range(3000):
        shuffled_imports(rng, play, alive)
        shuffled_loads(rng, play, alive)
        play.step()
        if all(sequence.phase is Phase.FINISHED for sequence in alive):
            break
    assert all(sequence.phase is Phase.FINISHED for sequence in alive)
    assert play.blocks.available_blocks == play.blocks.usable_blocks
    for sequence in alive:
        if sequence.key.request_id not in cancelled:
            assert play.emitted[sequence.key.request_id] == sequence.request.sampling.max_tokens
