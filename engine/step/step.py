"""A step of the engine between its computation and its consequences; and who it is that makes a step raise.

Up to the consequences a step can be repeated: it has written KV that is written again, and nothing else.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

from tandem.engine.export import LayerAnnouncer
from tandem.engine.model.batch import ForwardBatch, KvPool
from tandem.engine.request import TokenLogprobs
from tandem.engine.schedule.plan import Chunk, StepPlan
from tandem.engine.schedule.pooling import pool_rows, pooled_rows
from tandem.engine.schedule.sequence import Sequence
from tandem.engine.step.sampler import score_prompts
from tandem.engine.store.loading import Gate


@dataclass(slots=True)
class ChunkRows:
    """What a step computed of prompts beside KV."""

    chunks: list[Chunk]
    """All that were computed."""
    scored: Tensor
    """Logits [rows of those whose request wants prompt log-probabilities, vocab_size]."""
    pooled: Tensor | None
    """Hidden states [pooled rows, hidden_size]."""

    def take(self, plan: StepPlan) -> list[tuple[Sequence, Exception]]:
        """Log-probabilities and rows of embeddings go to the requests that are still in `plan`. Returns those with whom
        something went wrong."""
        failed: list[tuple[Sequence, Exception]] = []
        scored_row = pooled_row = 0
        for chunk in self.chunks:
            scored = chunk.num_tokens if chunk.sequence.scores_prompt else 0
            pooled = pooled_rows(chunk)
            try:
                if scored and chunk in plan.chunks:
                    score_prompts([chunk], self.scored[scored_row : scored_row + scored])
                if pooled and chunk in plan.chunks and self.pooled is not None:
                    pool_rows([chunk], self.pooled[pooled_row : pooled_row + pooled])
            except Exception as error:
                failed.append((chunk.sequence, error))
            scored_row += scored
            pooled_row += pooled
        return failed


@dataclass(slots=True)
class ComputedStep:
    plan: StepPlan
    started: float
    """time.perf_counter() before it."""
    gate: Gate | None
    announcer: LayerAnnouncer
    not_finite: list[Sequence]
    """For which the model computed numbers that are not finite."""
    sampled: list[Sequence]
    """Without those, and without the gate's broken ones."""
    tokens: list[int]
    logprobs: list[TokenLogprobs | None] | None
    rows: ChunkRows


@dataclass(slots=True)
class Parts:
    """What became of a step that was computed in parts."""

    failed: list[tuple[Sequence, Exception]]
    """Those that raise alone, and what."""
    computed: bool = False
    """Whether any part was: then the others' failure is their own."""


def compute_in_parts(
    plan: StepPlan,
    compute: Callable[[StepPlan], ComputedStep],
    take: Callable[[ComputedStep], None],
    goes_on: Callable[[], bool],
) -> Parts:
    """Computes `plan`, which has raised, in halves, and in halves of those that raise: fewer than twice as many steps
    as there are sequences. One alone has a second chance: what raised may have been a passing lack of memory."""
    parts = Parts([])
    left = _smaller(plan) if len(plan.sequences) > 1 else [plan]
    while left and goes_on():
        part = left.pop()
        try:
            computed = compute(part)
        except Exception as error:
            if len(part.sequences) > 1:
                left += _smaller(part)
            elif part.sequences:
                parts.failed.append((part.sequences[0], error))
        else:
            take(computed)
            parts.computed = True
    return parts


def _smaller(plan: StepPlan) -> list[StepPlan]:
    """Halves; the last one is the first to compute."""
    first, second = plan.halves()
    return [second, first]


def not_finite(plan: StepPlan, batch: ForwardBatch, pool: KvPool) -> list[Sequence]:
    """The sequences of whose new rows some K or V is no finite number. What a layer is given is not finite either where
    that of a row before it was not, so that what follows from it is found here, too."""
    if batch.finite:
        return []
    finite = pool.finite(batch.slots)
    if finite.all():
        return []
    found = [sequence for sequence, fine in zip(plan.decodes, finite[: batch.num_decode], strict=True) if not fine]
    for chunk, piece in zip(plan.chunks, batch.prefills, strict=True):
        if not finite[piece.row : piece.row + piece.num_tokens].all():
            found.append(chunk.sequence)
    return found
