"""The batch that the runner builds, against one computed in the obvious way."""

from __future__ import annotations

import torch

from tandem.engine.schedule.block_manager import BlockManager
from tandem.engine.schedule.plan import Chunk, StepPlan
from tandem.engine.schedule.ranges import TokenRanges
from tandem.engine.schedule.scheduler import Scheduler
from tandem.engine.schedule.sequence import Sequence
from tandem.engine.step.runner import Runner, slots_of
from tests.engine_harness import make_sequence

BLOCK = 16


class Bench:
    def __init__(self) -> None:
        self.blocks = BlockManager(65, BLOCK)
        self.scheduler = Scheduler(self.blocks, max_num_seqs=4, max_num_batched_tokens=64, max_waiting=10)
        self.runner = Runner(self.blocks, 4, 512, torch.device("cpu"))

    def plan(self) -> StepPlan:
        plan = self.scheduler.schedule(0.0)
        for sequence in plan.preempted:
            self.runner.release(sequence)
        for sequence in plan.admitted:
            self.runner.admit(sequence)
        return plan

    def check(self, plan: StepPlan) -> None:
        """Builds the batch of `plan` and compares all of it."""
        batch, sampled = self.runner.build(plan)
        rows: list[tuple[Sequence, int]] = [(s, s.num_computed) for s in plan.decodes]
        for chunk in plan.chunks:
            rows += [(chunk.sequence, position) for first, end in chunk.tokens for position in range(first, end)]
        assert batch.token_ids.tolist() == [s.tokens[position] for s, position in rows]
        assert batch.positions.tolist() == [position for _, position in rows]
        assert batch.slots.tolist() == [
            self.blocks.table(s.key)[position // BLOCK] * BLOCK + position % BLOCK for s, position in rows
        ]
        assert batch.num_decode == len(plan.decodes) == len(batch.context_lens) == len(batch.block_tables)
        assert batch.context_lens.tolist() == [s.num_computed + 1 for s in plan.decodes]
        assert batch.max_context_len == max(batch.context_lens.tolist(), default=0)
        assert batch.block_tables.shape[1] == -(-batch.max_context_len // BLOCK)
        for s, got in zip(plan.decodes, batch.block_tables.tolist(), strict=True):
            own = self.blocks.table(s.key)[: len(got)]
            assert got == own + [0] * (len(got) - len(own))
        assert [p.num_tokens for p in batch.prefills] == [c.num_tokens for c in plan.chunks]
        for piece, chunk in zip(batch.prefills, plan.chunks, strict=True):
            assert rows[piece.row + piece.num_tokens - 1] == (chunk.sequence, piece.end - 1)
            count = -(-piece.end // BLOCK)
            assert piece.block_ids.tolist() == self.blocks.table(chunk.sequence.key)[:count]
        wanted = [(s, len(s.tokens) - 1) for s in sampled]
        assert [rows[row] for row in batch.logit_rows.tolist()[: len(sampled)]] == wanted
        for tensor in (batch.token_ids, batch.positions, batch.slots, batch.block_tables, batch.logit_rows):
            assert tensor.dtype == torch.int64
        self.scheduler.computed(plan)
        for s in sampled:
            s.append(s.num_output)


def test_every_step_of_a_mixed_workload_is_built_right() -> None:
    bench = Bench()
    for index, length in enumerate((5, 33, 100, 16, 70)):
        bench.scheduler.add(make_sequence(f"r{index}", range(index, index + length), max_tokens=60))
    for _ in range(60):
        plan = bench.plan()
        bench.check(plan)
        for sequence in plan.decodes:
            if len(sequence.tokens) >= sequence.max_total:
                bench.runner.release(sequence)
                bench.scheduler.finish(sequence)


def test_a_scored_prompt_asks_for_all_its_rows() -> None:
    bench = Bench()
    bench.scheduler.add(make_sequence("plain", range(10)))
    bench.scheduler.add(make_sequence("scored", range(20), prompt_logprobs=0))
    batch, sampled = bench.runner.build(bench.plan())
    assert [s.key.request_id for s in sampled] == ["plain", "scored"]
    assert batch.logit_rows.tolist() == [9, 29, *range(10, 30)]


def test_rows_are_given_back_once() -> None:
    bench = Bench()
    sequence = make_sequence("a", range(10))
    bench.scheduler.add(sequence)
    bench.plan()
    assert bench.runner.free_rows == 3
    bench.runner.release(sequence)
    bench.runner.release(sequence)
    assert bench.runner.free_rows == 4


def test_a_used_row_does_not_leak_into_the_next_table() -> None:
    bench = Bench()
    first = make_sequence("a", range(200))
    assert bench.blocks.allocate(first.key, 200, []) == 0
    bench.runner.admit(first)
    bench.runner.release(first)
    second = make_sequence("b", range(20))
    bench.blocks.allocate(second.key, 20, [])
    bench.runner.admit(second)
    third = make_sequence("c", range(100))
    bench.blocks.allocate(third.key, 100, [])
    bench.runner.admit(third)
    for sequence in (second, third):
        sequence.num_computed = sequence.num_prompt - 1
    batch, _ = bench.runner.build(StepPlan(decodes=[second, third]))
    assert batch.block_tables[0, 2:].tolist() == [0] * 5


def test_slots_of_a_prompt_follow_its_table() -> None:
    bench = Bench()
    sequence = make_sequence("a", range(35))
    bench.blocks.allocate(sequence.key, 35, [])
    table = bench.blocks.table(sequence.key)
    assert slots_of(bench.blocks, sequence).tolist() == [table[i // BLOCK] * BLOCK + i % BLOCK for i in range(35)]


def test_a_chunk_that_stops_short_samples_nothing() -> None:
    bench = Bench()
    sequence = make_sequence("a", range(40))
    bench.scheduler.add(sequence)
    bench.plan()
    batch, sampled = bench.runner.build(StepPlan(chunks=[Chunk(sequence, TokenRanges.up_to(16))]))
    assert sampled == []
    assert batch.logit_rows.tolist() == []
