"""The executor of one device, in the engine's own process and thread."""

from __future__ import annotations

import logging
import time
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor

from tandem.common.errors import ConfigError, TandemError
from tandem.engine.model.batch import ForwardBatch, KvPool
from tandem.engine.model.loader import LoadedModel, device_of, load_model
from tandem.engine.model.memory import limit_gpu_memory, make_pool
from tandem.engine.request import Pooling, TokenLogprobs
from tandem.engine.schedule.block_manager import BlockManager
from tandem.engine.schedule.plan import Chunk, StepPlan
from tandem.engine.schedule.sequence import Sequence
from tandem.engine.settings import EngineConfig
from tandem.engine.step.executor import NextToken, StepResult, StepWatch
from tandem.engine.step.faults import device_faults, free_cached, is_shortage
from tandem.engine.step.parts import compute_in_parts, failure
from tandem.engine.step.pooling import Pooler, pooled_rows
from tandem.engine.step.runner import Runner
from tandem.engine.step.sampler import Sampler
from tandem.engine.step.scores import prompt_scores

logger = logging.getLogger(__name__)


def load(config: EngineConfig, folder: Path) -> tuple[LoadedModel, KvPool, int]:
    """The model in `folder`, the KV pool, and the tokens that a request may have. Raises ConfigError for what cannot be
    used."""
    torch.set_num_threads(config.num_threads)
    limit_gpu_memory(config.gpu_memory_bytes, device_of(config.device))
    try:
        loaded = load_model(
            folder,
            dtype=config.dtype,
            device=config.device,
            quantization=config.quantization,
            attention=config.attention,
            batch_invariant=config.batch_invariant,
        )
    except torch.OutOfMemoryError as error:
        raise ConfigError(
            f"device {config.device}: the weights do not fit into its memory, or into gpu_memory_bytes; put fewer "
            "workers on it"
        ) from error
    pool, max_model_len = make_pool(config, loaded)
    return loaded, pool, max_model_len


class _GivenUp(Exception):
    """The watch has the step stop; nothing of it counts."""


class LocalExecutor:
    """`Executor`: runner, forward, sampler and pooling, one after the other."""

    def __init__(
        self, config: EngineConfig, loaded: LoadedModel, pool: KvPool, blocks: BlockManager, max_model_len: int
    ) -> None:
        self._num_threads = config.num_threads
        self._loaded = loaded
        self._pool = pool
        loaded.decoder.reach(max_model_len)
        self._runner = Runner(blocks, config.max_num_seqs, max_model_len, loaded.device)
        self._sampler = Sampler(
            config.max_num_seqs, loaded.config.vocab_size, loaded.device, batch_invariant=config.batch_invariant
        )
        self._poolers: dict[Sequence, Pooler] = {}
        self._scores: dict[Sequence, list[TokenLogprobs]] = {}
        """Log-probabilities of prompt tokens, until the first token is chosen."""
        self.shortages = 0

    @property
    def free_rows(self) -> int:
        return self._runner.free_rows

    @contextmanager
    def thread(self) -> Iterator[None]:
        torch.set_num_threads(self._num_threads)
        with torch.inference_mode():
            yield

    def admit(self, sequence: Sequence) -> None:
        with device_faults(self._loaded.device):
            self._sampler.admit(sequence, self._runner.admit(sequence))
        if sequence.request.pooling is not Pooling.NONE:
            self._poolers[sequence] = Pooler(sequence.request.pooling)

    def release(self, sequence: Sequence) -> None:
        """Frees the sequence's row, and what the sampler and pooling keep of it."""
        self._runner.release(sequence)
        self._sampler.release(sequence)
        self._poolers.pop(sequence, None)
        self._scores.pop(sequence, None)

    def holds(self, sequence: Sequence) -> bool:
        return self._runner.holds(sequence)

    def execute(self, plan: StepPlan, watch: StepWatch) -> StepResult | None:
        """Computes the plan; where that raises, in parts, so that only those that fail are in `failed`. None: `watch`
        gave it up."""
        started = time.perf_counter()
        try:
            result = self._compute(plan, watch, stops=self._loaded.device.type == "cpu")
        except _GivenUp:
            self._runner.forget_decodes()
            return None
        except Exception as error:
            logger.exception("a step failed; its %d requests are computed again in parts", len(plan.sequences))
            self._make_room(error)
            result = compute_in_parts(plan, lambda part: self._compute_again(part, watch), watch)
            self._runner.forget_decodes()
        result.seconds = time.perf_counter() - started
        return result

    def _compute_again(self, plan: StepPlan, watch: StepWatch) -> StepResult:
        self._runner.forget_decodes()
        try:
            return self._compute(plan, watch, stops=False)
        except Exception as error:
            self._make_room(error)
            raise

    def _make_room(self, error: Exception) -> None:
        if is_shortage(error):
            self.shortages += 1
            free_cached(self._loaded.device)

    def _compute(self, plan: StepPlan, watch: StepWatch, *, stops: bool) -> StepResult:
        with device_faults(self._loaded.device):
            return self._computed(plan, watch, stops)

    def _computed(self, plan: StepPlan, watch: StepWatch, stops: bool) -> StepResult:
        """Raises what the model and the sampler raise, with nothing but KV written. `stops`: it may be given up; a GPU
        has all layers long before it has computed the first."""
        started = time.perf_counter()
        batch, sampled = self._runner.build(plan)
        logits = self._forward(batch, watch, stops)
        if self._loaded.device.type == "cuda" and (not sampled or any(each.guide is not None for each in sampled)):
            # Nothing else waits for the device, or masks have as long as it takes: its time is this step's.
            torch.cuda.synchronize(self._loaded.device)
        damaged = _not_finite(plan, batch, self._pool)
        unfit: Collection[Sequence] = {*damaged, *watch.void} if damaged or watch.void else ()
        late = watch.not_sampled([each for each in sampled if each not in unfit], time.perf_counter() - started)
        if late:
            self._runner.forget_decodes()
            unfit = {*unfit, *late}
        tokens = self._choose(logits[: len(sampled)], sampled, unfit)
        result = StepResult(StepPlan(list(plan.decodes), list(plan.chunks)), tokens)
        result.computed.drop(unfit)
        void = watch.void
        result.failed = [(each, _damage()) for each in damaged if each not in void]
        if len(batch.logit_rows) > len(sampled):
            self._keep_rows(plan.chunks, logits[len(sampled) :], batch.pooled, result)
        return result

    def _forward(self, batch: ForwardBatch, watch: StepWatch, stops: bool) -> Tensor:
        def on_layer(layer: int) -> None:
            watch.layer_done(layer)
            if stops and watch.gives_up():
                raise _GivenUp

        logits = self._loaded.decoder.forward(batch, self._pool, on_layer, watch.before_attention)
        if stops and watch.gives_up():
            raise _GivenUp
        return logits

    def _choose(self, logits: Tensor, sampled: list[Sequence], unfit: Collection[Sequence]) -> list[NextToken]:
        """Tokens for `sampled`, whose `logits` [R, vocab_size] these are, but for those that are `unfit`."""
        if unfit:
            kept = [index for index, sequence in enumerate(sampled) if sequence not in unfit]
            logits, sampled = logits[kept], [sampled[index] for index in kept]
        tokens, logprobs = self._sampler.sample(logits, sampled)
        dead_ends = self._sampler.dead_ends
        return [
            NextToken(each, token, logprobs[i] if logprobs else None, None, dead_ends.get(each) if dead_ends else None)
            for i, (each, token) in enumerate(zip(sampled, tokens, strict=True))
        ]

    def _keep_rows(self, chunks: list[Chunk], scored: Tensor, pooled: Tensor | None, result: StepResult) -> None:
        """What a step computed of prompts beside KV goes to those that want it: log-probabilities of `scored` rows
        [rows of chunks that are, vocab_size], and hidden states `pooled` [rows of chunks that are, hidden_size]."""
        scored_row = pooled_row = 0
        for chunk in chunks:
            sequence = chunk.sequence
            num_scored = chunk.num_tokens if sequence.scores_prompt else 0
            num_pooled = pooled_rows(chunk)
            rows, hidden = scored[scored_row : scored_row + num_scored], None
            if pooled is not None and num_pooled:
                hidden = pooled[pooled_row : pooled_row + num_pooled]
            scored_row += num_scored
            pooled_row += num_pooled
            if chunk not in result.computed.chunks:
                continue
            try:
                if num_scored:
                    self._scores.setdefault(sequence, []).extend(prompt_scores(chunk, rows))
                if hidden is not None:
                    self._poolers[sequence].add(hidden)
                    if chunk.num_tokens == sequence.remaining:
                        result.embeddings.append((sequence, self._poolers[sequence].result()))
            except TandemError as error:
                result.failed.append((sequence, error))
            except Exception as error:
                logger.exception("request %s failed alone", sequence.key)
                result.failed.append((sequence, failure(error)))
        result.tokens = [
            each._replace(prompt_logprobs=self._scores.pop(each.sequence, [])) if each.sequence.scores_prompt else each
            for each in result.tokens
        ]
        result.computed.drop([sequence for sequence, _ in result.failed])


def _not_finite(plan: StepPlan, batch: ForwardBatch, pool: KvPool) -> list[Sequence]:
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


def _damage() -> TandemError:
    return TandemError("computation_failed", "the model computed numbers that are not finite")
