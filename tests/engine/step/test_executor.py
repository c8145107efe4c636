"""Whatever is in a step together, each request gets the token that the model computes for it alone, in one piece."""

from __future__ import annotations

from collections.abc import Callable, Collection
from pathlib import Path

import pytest
import torch

from tandem.engine.schedule.block_manager import BlockManager
from tandem.engine.schedule.plan import StepPlan
from tandem.engine.schedule.scheduler import Scheduler
from tandem.engine.schedule.sequence import Sequence
from tandem.engine.settings import EngineConfig
from tandem.engine.step.local import LocalExecutor, load
from tests.engine.paged_model import PagedModel
from tests.engine_harness import make_sequence

POISON = 7


class Quiet:
    """A `StepWatch` that interferes with nothing, but for what a test sets."""

    before_attention: Callable[[int], None] | None = None
    void: Collection[Sequence] = ()
    late: Collection[Sequence] = ()
    hurries = False

    def layer_done(self, layer: int) -> None: ...

    def gives_up(self) -> bool:
        return self.hurries

    def not_sampled(self, sequences: list[Sequence], step_s: float) -> list[Sequence]:
        return [each for each in sequences if each in self.late]

    def is_final(self, sequence: Sequence) -> bool:
        return False

    def goes_on(self) -> bool:
        return True


class Scene:
    def __init__(self, folder: Path) -> None:
        config = EngineConfig(model=str(folder), dtype="float32", device="cpu", kv_cache_bytes=4 << 20).sized_for("cpu")
        self.loaded, pool, max_model_len = load(config, folder)
        blocks = BlockManager(pool.num_blocks, config.block_size)
        self.scheduler = Scheduler(blocks, max_num_seqs=64, max_num_batched_tokens=80, max_waiting=64)
        self.executor = LocalExecutor(config, self.loaded, pool, blocks, max_model_len)

    def add(self, name: str, length: int) -> Sequence:
        prompt = [(len(name) * 31 + i * 17) % 400 + 20 for i in range(length)]
        sequence = make_sequence(name, prompt, temperature=0.0, max_tokens=40)
        self.scheduler.add(sequence)
        return sequence

    def plan(self) -> StepPlan:
        plan = self.scheduler.schedule(0.0)
        for sequence in plan.admitted:
            self.executor.admit(sequence)
        return plan

    def alone(self, sequence: Sequence) -> int:
        """The token that follows, computed from the first one on without a scheduler, a runner or a sampler."""
        model = PagedModel(self.loaded, 1, len(sequence.tokens))
        return int(model.prefill(0, sequence.tokens)[-1].argmax())


def test_each_token_is_the_one_of_its_request_alone(folder: Path) -> None:
    scene, watch = Scene(folder), Quiet()
    with scene.executor.thread():
        sequences = [scene.add("a" * length, length) for length in (5, 33, 100, 16)]
        for step in range(24):
            plan = scene.plan()
            watch.late = plan.decodes[:1] if step % 5 == 4 else ()
            watch.hurries = step % 7 == 6
            result = scene.executor.execute(plan, watch)
            assert (result is None) == watch.hurries
            if result is None:
                continue
            assert not any(chosen.sequence in watch.late for chosen in result.tokens)
            scene.scheduler.computed(result.computed)
            for chosen in result.tokens:
                assert chosen.token == scene.alone(chosen.sequence)
                chosen.sequence.append(chosen.token)
        assert all(sequence.num_output >= 10 for sequence in sequences)


def test_who_makes_a_step_raise_is_named_and_the_others_have_their_tokens(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    scene = Scene(folder)
    forward = scene.loaded.decoder.forward
    with scene.executor.thread():
        sequences = [scene.add("a" * length, length) for length in (5, 9, 14)]
        sequences[1].tokens[3] = POISON
        expected = [scene.alone(sequence) for sequence in sequences]

        def failing(batch, *arguments):  # type: ignore[no-untyped-def]
            if (batch.token_ids == POISON).any():
                raise torch.OutOfMemoryError("poison")
            return forward(batch, *arguments)

        monkeypatch.setattr(scene.loaded.decoder, "forward", failing)
        result = scene.executor.execute(scene.plan(), Quiet())
    assert result is not None
    assert [(sequence, error.code) for sequence, error in result.failed] == [(sequences[1], "computation_failed")]
    assert {chosen.sequence: chosen.token for chosen in result.tokens} == {
        sequences[0]: expected[0],
        sequences[2]: expected[2],
    }
