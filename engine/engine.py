"""The engine: one thread that owns the model, the KV pool and every running request.

Read `_run` first. Other threads talk to it through an inbox of calls that it empties before each step; it sleeps on the
inbox when there is nothing to compute. Each request ends in `_end`, with exactly one output that has a finish reason.

- unified: submit -> waiting -> steps -> outputs;
- prefill worker (`kv_export`): the KV is announced layer by layer while the step runs, `finished` passes the first
  token on, and the blocks stay until `release`, or until a lease ends;
- decode worker (`kv_import`): blocks are reserved; `complete` brings the first token and the request joins the running
  batch, `fail` makes it compute its prompt here.

With a KV store (`store/flow.py`) a prompt is looked up before it waits, and loaded before it runs; what is computed is
saved.
"""

from __future__ import annotations

import contextlib
import logging
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import replace
from functools import partial

import torch

from tandem.common.checkpoint import resolve_model
from tandem.common.errors import TandemError
from tandem.common.fairness import LAST_BAND
from tandem.common.sampling import Constraint
from tandem.engine.export import LayerAnnouncer
from tandem.engine.inbox import Inbox
from tandem.engine.intake import Intake
from tandem.engine.masks.guide import Guide
from tandem.engine.masks.pool import MaskPool
from tandem.engine.model.loader import load_model
from tandem.engine.model.memory import make_pool
from tandem.engine.request import (
    EngineRequest,
    FinishReason,
    KvExport,
    KvImport,
    RequestKey,
    RequestOutput,
    TokenLogprobs,
)
from tandem.engine.reservation import Reservation
from tandem.engine.schedule.block_manager import BlockManager, IntegrityError
from tandem.engine.schedule.cache_events import CacheLog
from tandem.engine.schedule.plan import StepPlan
from tandem.engine.schedule.ranges import TokenRanges
from tandem.engine.schedule.scheduler import Scheduler
from tandem.engine.schedule.sequence import Phase, Sequence
from tandem.engine.settings import EXPORT_LEASE_S, MAX_WAITING, EngineConfig
from tandem.engine.status import EngineStatus, StepMeter
from tandem.engine.step.constraint import Patience
from tandem.engine.step.runner import Runner
from tandem.engine.step.sampler import Sampler
from tandem.engine.step.step import ChunkRows, ComputedStep, compute_in_parts, not_finite
from tandem.engine.store.cache import EngineStore
from tandem.engine.store.flow import StoreFlow

logger = logging.getLogger(__name__)


class _GivenUp(Exception):
    """A step of the last band stops for a request that nobody should keep waiting; nothing of it counts."""


class Engine:
    def __init__(
        self,
        config: EngineConfig,
        on_outputs: Callable[[list[RequestOutput]], None],
        store: EngineStore | None = None,
    ) -> None:
        """Loads the model and reserves the KV pool. Raises ConfigError for a setting or model that cannot be used.

        `on_outputs` is called on the engine thread, once per step, and must not block. `store` serves this engine
        alone; without one, no KV outlives the pool.
        """
        self.config = config
        if store is not None:
            store.check(config.block_size)
        self._on_outputs = on_outputs
        torch.set_num_threads(config.num_threads)
        folder = resolve_model(config.model)
        self.loaded = load_model(
            folder,
            dtype=config.dtype,
            device=config.device,
            quantization=config.quantization,
            attention=config.attention,
            batch_invariant=config.batch_invariant,
        )
        self.pool, self.max_model_len = make_pool(config, self.loaded)
        self.loaded.decoder.reach(self.max_model_len)
        self.blocks = BlockManager(self.pool.num_blocks, config.block_size, config.enable_prefix_caching)
        self.scheduler = Scheduler(
            self.blocks,
            max_num_seqs=config.max_num_seqs,
            max_num_batched_tokens=config.max_num_batched_tokens,
            max_waiting=MAX_WAITING,
            max_prompt_tokens_beside_decodes=_tokens_beside_decodes(config, self.loaded.device),
        )
        self._runner = Runner(self.blocks, config.max_num_seqs, self.max_model_len, self.loaded.device)
        self._meter = StepMeter()
        self._intake = Intake(config, self.loaded, self.max_model_len)
        self._sequences: dict[RequestKey, Sequence] = {}
        """Not ended."""
        self._leases: dict[RequestKey, tuple[float, Sequence]] = {}
        """Blocks kept for an exporter, and until when; the earliest end first."""
        self._outputs: list[RequestOutput] = []
        self._inbox = Inbox()
        """Requests beyond MAX_WAITING are refused when it is emptied."""
        model = self.loaded.config
        self._masks = MaskPool(folder / "tokenizer.json", model.vocab_size, model.eos_token_ids)
        self._guided: dict[int, Sequence] = {}
        """Those with a constraint, by the number of the guide."""
        self._patience = Patience()
        self._sampler = Sampler(
            config.max_num_seqs, model.vocab_size, self.loaded.device, batch_invariant=config.batch_invariant
        )
        self._store: StoreFlow | None = None
        if store is not None:
            self._store = StoreFlow(
                store,
                config,
                self.loaded,
                self.pool,
                self.blocks,
                self.scheduler,
                self._meter,
                post=self._inbox.put,
                resume=self._loaded,
            )
        self._lock = threading.Lock()
        """Guards `_known` and `_stopping`."""
        self._known: set[RequestKey] = set()
        """Submitted and not ended, or ended with blocks that an exporter may still read."""
        self._stopping = False
        self._moved: float | None = None
        """When the engine thread last got on with its work; None while it waits for some."""
        self._hurry = False
        """A request of an earlier band than the last has come since the inbox was last emptied."""
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)

    # From any thread

    def start(self) -> None:
        self._thread.start()

    def start_masks(self) -> None:
        """Before `start`: the first request with a constraint does not wait for the tokenizer to be read."""
        with contextlib.suppress(TandemError):  # such requests will be told
            self._masks.start()

    def submit(self, request: EngineRequest) -> None:
        """Queues `request`; everything that happens to it, a refusal too, comes through `on_outputs`.

        Raises TandemError `unavailable` after `stop`, and `invalid_request` for a key that is in use.
        """
        now = time.monotonic()
        with self._lock:
            if self._stopping:
                raise TandemError("unavailable", "the worker is shutting down")
            if request.key in self._known:
                raise TandemError("invalid_request", f"request {request.key} is being served already")
            self._known.add(request.key)
            self._inbox.put(partial(self._accept, request, now))
            if request.priority < LAST_BAND:
                self._hurry = True

    def cancel(self, key: RequestKey) -> None:
        """Ends the request with CANCELLED. Without effect if it has ended."""
        self._inbox.put(partial(self._end_by_key, key, FinishReason.CANCELLED))

    def release(self, key: RequestKey, error: str = "") -> None:
        """An exporter no longer reads the blocks of `key`: they are freed. The hand-over succeeded, unless there is an
        `error` or it comes before `KvExport.finished`: then the request ends with `worker_lost`."""
        self._inbox.put(partial(self._release, key, error))

    def status(self) -> EngineStatus:
        decoding, running_tokens = self.scheduler.decode_load()
        return EngineStatus(
            running=self.scheduler.num_running,
            waiting=self.scheduler.num_waiting,
            free_blocks=self.blocks.available_blocks,
            total_blocks=self.blocks.usable_blocks,
            pending_prefill_tokens=self.scheduler.pending_prefill_tokens,
            prefill_tokens_per_s=self._meter.prefill_tokens_per_s,
            decode_step_s=self._meter.decode_step_s,
            decoding=decoding,
            running_tokens=running_tokens,
            by_band=self.scheduler.by_band(),
        )

    @property
    def stalled_s(self) -> float:
        """How long the engine thread has been in the same layer of a step, or between two; 0 while it has no work."""
        moved = self._moved
        return time.monotonic() - moved if moved is not None else 0.0

    @property
    def cache_log(self) -> CacheLog:
        """What is in the prefix cache, for routers to follow."""
        return self.blocks.cache_log

    def wait_saved(self, timeout: float) -> bool:
        """Waits until all KV computed so far is in the store, or refused by it; for a drain. False: time is up."""
        return self._store is None or self._store.wait_saved(timeout)

    def check_integrity(self) -> None:
        """Raises IntegrityError if the books do not balance; between two steps, so it may wait for one."""
        if not self._thread.is_alive():
            self._check()
            return
        done: Future[None] = Future()

        def check() -> None:
            try:
                self._check()
                done.set_result(None)
            except IntegrityError as error:
                done.set_exception(error)

        self._inbox.put(check)
        while True:
            try:
                done.result(timeout=1.0)
                return
            except TimeoutError:
                if not self._thread.is_alive():
                    self._check()
                    return

    def stop(self, timeout: float) -> bool:
        """Ends all requests with `unavailable` and the thread with them. False if it is still in a step after
        `timeout` seconds."""
        with self._lock:
            self._stopping = True
        self._inbox.put(lambda: None)
        if self._thread.ident is None:
            self._close()
        elif self._thread.is_alive():
            self._thread.join(timeout)
        return not self._thread.is_alive()

    # The engine thread

    def _run(self) -> None:
        torch.set_num_threads(self.config.num_threads)
        idle = True
        with torch.inference_mode():
            while not self._stopping:
                try:
                    self._receive(wait=idle)
                    self._moved = now = time.monotonic()
                    self._expire(now)
                    plan = self.scheduler.schedule(now)
                    self._begin(plan)
                    self._flush()  # a first token that came with imported KV does not wait for the step
                    if plan.num_tokens:
                        self._step(plan)
                    idle = not (plan.num_tokens or plan.admitted or plan.preempted)
                except Exception:
                    logger.exception("the engine failed outside a step; all its requests are given up")
                    self._end_all("internal", "the engine failed; see its log")
                self._flush()
            self._moved = None
            self._close()

    def _close(self) -> None:
        self._receive(wait=False)
        self._end_all("unavailable", "the worker is shutting down")
        for _, sequence in list(self._leases.values()):
            self._free(sequence)
        self._masks.stop()
        if self._store is not None:
            if not self._store.close():
                logger.warning("a call to the KV store does not return; its thread is left behind")
            self._receive(wait=False)
        self._flush()

    def _receive(self, wait: bool) -> None:
        """Carries out what other threads asked for; sleeps until something comes, or is due, if `wait`."""
        if wait and not self._masks.changed:
            self._moved = None
            self._inbox.sleep(self._next_event(), self._masks.watched())
            self._moved = time.monotonic()
        self._hurry = False
        self._inbox.run_all()
        self._masks.receive()
        self._masks.send()
        while self._masks.changed:
            self._mask_came(self._masks.changed.pop(0))
            self._masks.send()

    def _next_event(self) -> float | None:
        times = [end for end, _ in self._leases.values()][:1]
        if (deadline := self.scheduler.next_deadline()) is not None:
            times.append(deadline)
        if (piece := self.scheduler.next_piece()) is not None:
            times.append(piece)
        if self._store is not None and (due := self._store.next_due()) is not None:
            times.append(due)
        if (due := self._masks.next_due()) is not None:
            times.append(due)
        return max(min(times) - time.monotonic(), 0.0) if times else None

    def _expire(self, now: float) -> None:
        for sequence in self.scheduler.expired(now):
            if sequence.key in self._sequences:
                self._fail(sequence, "deadline_exceeded", "the request ran out of time")
        if self._store is not None:
            self._store.expire(now)
        self._masks.expire(now)
        for key, (end, sequence) in list(self._leases.items()):
            if end > now:
                break
            logger.warning("the hand-over of %s was not confirmed within %g s", key, EXPORT_LEASE_S)
            if key in self._sequences:
                self._fail(sequence, "unavailable", "the hand-over was not confirmed in time")
            self._free(sequence)

    def _begin(self, plan: StepPlan) -> None:
        """Rows and hand-overs of the sequences that lost or got their blocks."""
        for sequence in plan.preempted:
            self._runner.release(sequence)
            self._outputs.append(
                RequestOutput(sequence.key, start_index=sequence.num_output, preempted=sequence.preempted)
            )
        for sequence in plan.admitted:
            if not self._start(sequence):
                plan.chunks = [chunk for chunk in plan.chunks if chunk.sequence is not sequence]

    def _start(self, sequence: Sequence) -> bool:
        """`sequence` has its blocks, or its import or load has ended. If this fails, the request alone ends."""
        request = sequence.request
        try:
            if request.kv_import is not None and sequence.phase is Phase.IMPORTING:
                self._reserve(sequence, request.kv_import)
                return True
            if self._store is not None:
                if sequence.phase is Phase.LOADING:
                    self._store.load(sequence, self._runner.slots(sequence))
                    return True
                self._store.runs(sequence)
            self._runner.admit(sequence)
            self._sampler.admit(sequence)
            if request.kv_export is not None:
                self._announce(sequence, request.kv_export)
        except Exception:
            logger.exception("request %s failed as it began", sequence.key)
            self._fail(sequence, "internal", "the request failed as it began; see the worker's log")
            return False
        return True

    def _step(self, plan: StepPlan) -> None:
        try:
            computed = self._compute(plan, yields=self._yields(plan))
        except _GivenUp:
            self._runner.forget_decodes()
        except Exception:
            logger.exception("a step failed; its %d requests are computed again in parts", len(plan.sequences))
            self._step_in_parts(plan)
        else:
            self._take(computed)

    def _compute(self, plan: StepPlan, *, yields: bool) -> ComputedStep:
        """Raises what the model and the sampler raise, with nothing but KV written; and _GivenUp."""
        started = time.perf_counter()
        gate = self._store.gate(plan) if self._store is not None else None
        announcer = LayerAnnouncer(plan, gate.broken if gate is not None else ())
        yields = yields and gate is None

        def on_layer(layer: int) -> None:
            self._moved = time.monotonic()
            if yields and self._hurry:
                raise _GivenUp
            announcer(layer)

        batch, sampled = self._runner.build(plan)
        logits = self.loaded.decoder.forward(batch, self.pool, on_layer, gate)
        if yields and self._hurry:
            raise _GivenUp
        if not sampled and self.loaded.device.type == "cuda":
            # Nothing else waits for the device; its time and its errors belong to this step.
            torch.cuda.synchronize(self.loaded.device)
        scored, logits = logits[len(sampled) :], logits[: len(sampled)]
        out = not_finite(plan, batch, self.pool)
        if gate is not None and gate.broken:
            out = [sequence for sequence in out if sequence not in gate.broken]
        if unfit := [*out, *(gate.broken if gate is not None else ())]:
            kept = [index for index, sequence in enumerate(sampled) if sequence not in unfit]
            logits, sampled = logits[kept], [sampled[index] for index in kept]
        chunks = list(plan.chunks)
        logits, sampled = self._with_masks(plan, logits, sampled, time.perf_counter() - started)
        tokens, logprobs = self._sampler.sample(logits, sampled)
        rows = ChunkRows(chunks, scored, batch.pooled)
        return ComputedStep(plan, started, gate, announcer, out, sampled, tokens, logprobs, rows)

    def _yields(self, plan: StepPlan) -> bool:
        """Whether the step may be given up between two layers and computed again, for those who come meanwhile. A GPU
        is not asked: it has all layers long before it has computed the first."""
        last = all(each.priority == LAST_BAND and each.request.kv_export is None for each in plan.sequences)
        return last and self.loaded.device.type == "cpu"

    def _take(self, step: ComputedStep) -> None:
        """The consequences, for one request after the other: what goes wrong with one ends that one."""
        plan, gate = step.plan, step.gate
        decodes, prefill_tokens = len(plan.decodes), plan.num_tokens - len(plan.decodes)
        failed = step.rows.take(plan)
        if gate is not None and self._store is not None:
            self._store.stepped(gate)
            for sequence in gate.broken:
                self._runner.release(sequence)
        for sequence, error in failed:
            self._fail_alone(sequence, error)
        for sequence in step.not_finite:
            if sequence.phase is Phase.RUNNING:
                self._fail(sequence, "computation_failed", "the model computed numbers that are not finite")
        plan.drop([sequence for sequence in plan.sequences if sequence.phase is not Phase.RUNNING])
        self.scheduler.computed(plan)
        for sequence in step.announcer.broken:
            if sequence.phase is Phase.RUNNING:
                self._fail(sequence, "internal", "the hand-over failed; see the worker's log")
        for index, sequence in enumerate(step.sampled):
            if sequence.phase is Phase.RUNNING:
                try:
                    self._advance(sequence, step.tokens[index], step.logprobs[index] if step.logprobs else None)
                except Exception as error:
                    self._fail_alone(sequence, error)
        self._finish_pooling(plan)
        self._masks.send()
        seconds = time.perf_counter() - step.started
        self.scheduler.took(plan, seconds)
        if gate is None:
            self._meter.add(decodes, prefill_tokens, seconds)
        elif not gate.broken:
            self._meter.add(decodes, prefill_tokens, seconds - gate.waited_s)

    def _step_in_parts(self, plan: StepPlan) -> None:
        """`plan` has raised: those that make it raise end, the others do not notice."""
        exports = [chunk.sequence for chunk in plan.chunks if chunk.sequence.request.kv_export is not None]
        for sequence in exports:
            # Rows may be on their way already, and do not change under an exporter: the decode worker computes them.
            self._fail(sequence, "unavailable", "the step that computed the prompt failed")
        plan.drop(exports)
        if not plan.num_tokens:
            return

        def compute(part: StepPlan) -> ComputedStep:
            self._runner.forget_decodes()
            return self._compute(part, yields=False)

        parts = compute_in_parts(plan, compute, self._take, lambda: not self._stopping)
        for sequence, error in parts.failed:
            if parts.computed:
                self._fail_alone(sequence, error)
            else:  # it may as well be this worker that fails: others can try
                self._fail(sequence, "internal", f"computing the request failed ({type(error).__name__})")

    def _fail_alone(self, sequence: Sequence, error: Exception) -> None:
        """`error` is the doing of `sequence`, whatever it is."""
        logger.error("request %s failed alone", sequence.key, exc_info=error)
        if sequence.key in self._sequences:
            self._fail(sequence, "computation_failed", f"computing the request failed ({type(error).__name__})")

    def _with_masks(
        self, plan: StepPlan, logits: torch.Tensor, sampled: list[Sequence], step_s: float
    ) -> tuple[torch.Tensor, list[Sequence]]:
        """Takes decodes whose mask has not come in time out of the step: they are computed again."""
        late = _without_mask(sampled)
        if not late:
            return logits, sampled
        if self.loaded.device.type == "cuda":
            torch.cuda.synchronize(self.loaded.device)  # the masks have as long as the step takes
        self._wait_for_masks(late, step_s, alone=len(late) == len(sampled))
        late = _without_mask(late)
        if not late:
            return logits, sampled
        for sequence in late:
            if sequence.guide is not None:
                sequence.guide.prompt = False
        self._runner.forget_decodes()
        plan.decodes = [sequence for sequence in plan.decodes if sequence not in late]
        plan.chunks = [chunk for chunk in plan.chunks if chunk.sequence not in late]
        kept = [index for index, sequence in enumerate(sampled) if sequence not in late]
        return logits[kept], [sampled[index] for index in kept]

    def _wait_for_masks(self, late: list[Sequence], step_s: float, *, alone: bool) -> None:
        """`alone`: nobody else is sampled; then it ends when somebody comes, too."""
        self._masks.receive()
        started = time.monotonic()
        until = started + self._patience.of_step(step_s, alone)
        while any(each.guide is not None and each.guide.awaited for each in late):
            left = until - time.monotonic()
            if left <= 0 or (alone and self._inbox):
                break
            if alone:
                self._inbox.sleep(left, self._masks.watched())
                self._masks.receive()
            elif not self._masks.receive(left):
                break
        if not alone:
            self._patience.spend(time.monotonic() - started)

    def _advance(self, sequence: Sequence, token: int, logprobs: TokenLogprobs | None) -> None:
        """`token` was chosen to follow the last one of `sequence`."""
        params, guide = sequence.request.sampling, sequence.guide
        if sequence.dead_end is not None:
            self._fail(sequence, sequence.dead_end.code, sequence.dead_end.message)
            return
        output = RequestOutput(sequence.key, start_index=sequence.num_output)
        if sequence.num_output < params.max_tokens:
            sequence.append(token)
            output.token_ids.append(token)
            if logprobs is not None:
                output.logprobs.append(logprobs)
            stops = token in sequence.stop_ids and sequence.num_output >= params.min_tokens
            if stops or (guide is not None and self._masks.ends_with(token)):
                output.finish_reason = FinishReason.STOP
                output.stop_token_id = token
        if output.finish_reason is None and guide is not None and output.token_ids:
            if sequence.request.kv_export is None:  # else the decode worker goes on
                self._masks.follow(guide, sequence.tokens[sequence.num_prompt :])
        elif output.finish_reason is None and len(sequence.tokens) >= sequence.max_total:
            output.finish_reason = FinishReason.LENGTH
        _add_report(sequence, output)
        if (export := sequence.request.kv_export) is not None:
            self._export_finished(sequence, export, output)
        elif output.finish_reason is not None:
            self._end(sequence, output)
        else:
            self._outputs.append(output)

    def _finish_pooling(self, plan: StepPlan) -> None:
        for chunk in plan.chunks:
            sequence = chunk.sequence
            if sequence.pooler is not None and sequence.phase is Phase.RUNNING and not sequence.remaining:
                try:
                    embedding = sequence.pooler.result()
                except (ValueError, ArithmeticError) as error:
                    self._fail_alone(sequence, error)
                    continue
                output = RequestOutput(sequence.key, finish_reason=FinishReason.STOP, embedding=embedding)
                _add_report(sequence, output)
                self._end(sequence, output)

    # Requests come and go

    def _accept(self, request: EngineRequest, submitted: float) -> None:
        try:
            sequence = self._intake.sequence(request, submitted)
            constraint = request.sampling.constraint
            look_up = constraint is None and self._store is not None and self._store.accept(sequence)
            self.scheduler.add(sequence, look_up or constraint is not None)
        except Exception as error:
            output = RequestOutput(request.key, finish_reason=FinishReason.ERROR)
            output.error_code, output.error_message = "internal", "the request could not be read; see the worker's log"
            if isinstance(error, TandemError):
                output.error_code, output.error_message = error.code, error.message
            else:
                logger.exception("request %s could not be queued", request.key)
            self._outputs.append(output)
            self._forget(request.key)
            self._tell_end(request, output)
        else:
            self._sequences[request.key] = sequence
            if constraint is not None:
                self._guide(sequence, constraint)
            elif self._store is not None and look_up:
                self._store.look_up(sequence)

    def _guide(self, sequence: Sequence, constraint: Constraint) -> None:
        try:
            output = sequence.tokens[sequence.num_prompt :]
            sequence.guide = self._masks.guide(constraint, sequence.request.tenant, output)
        except TandemError as error:
            self._fail(sequence, error.code, error.message)
        else:
            self._guided[sequence.guide.number] = sequence

    def _mask_came(self, guide: Guide) -> None:
        """Or it is known that none will come."""
        sequence = self._guided.get(guide.number)
        if sequence is None or guide.awaited:  # it came within a step, and the next one is on its way
            return
        if guide.error:
            self._fail(sequence, guide.error_code, guide.error)
        elif guide.complete or (sequence.num_output and len(sequence.tokens) >= sequence.max_total):
            reason = FinishReason.STOP if guide.complete else FinishReason.LENGTH
            self._end(sequence, RequestOutput(sequence.key, sequence.num_output, finish_reason=reason))
        elif not guide.queued:
            guide.queued = True
            if self._store is not None and self._store.accept(sequence):
                self._store.look_up(sequence)
            else:
                self.scheduler.looked_up(sequence)

    def _fail(self, sequence: Sequence, code: str, message: str) -> None:
        output = RequestOutput(sequence.key, finish_reason=FinishReason.ERROR, start_index=sequence.num_output)
        output.error_code, output.error_message = code, message
        self._end(sequence, output)

    def _end_by_key(self, key: RequestKey, reason: FinishReason) -> None:
        if (sequence := self._sequences.get(key)) is not None:
            self._end(sequence, RequestOutput(key, finish_reason=reason, start_index=sequence.num_output))

    def _end_all(self, code: str, message: str) -> None:
        for sequence in list(self._sequences.values()):
            try:
                self._fail(sequence, code, message)
            except Exception:
                logger.exception("the end of %s left something behind", sequence.key)

    def _end(self, sequence: Sequence, output: RequestOutput) -> None:
        """The only way out of the engine: `output` is the request's last. Its blocks go back, or are kept under a lease
        while an exporter may still read them."""
        del self._sequences[sequence.key]
        self._outputs.append(output)
        if sequence.guide is not None:
            del self._guided[sequence.guide.number]
            self._masks.close(sequence.guide)
        if sequence.reservation is not None:
            sequence.reservation.close()
        if self._store is not None:
            self._store.forget(sequence)
        aborted = sequence.request.kv_export is not None and output.finish_reason is not FinishReason.HANDED_OVER
        if aborted and sequence.announced is not None:
            self._hold(sequence)
        else:
            self._free(sequence)
        self._tell_end(sequence.request, output)

    def _tell_end(self, request: EngineRequest, output: RequestOutput) -> None:
        try:
            if request.kv_export is not None and output.finish_reason is not FinishReason.HANDED_OVER:
                request.kv_export.aborted(output.error_message or "cancelled")
            if request.kv_import is not None:
                request.kv_import.closed()
        except Exception:
            logger.exception("the hand-over of %s failed as it was told of the end", request.key)

    def _free(self, sequence: Sequence) -> None:
        self._leases.pop(sequence.key, None)
        self._runner.release(sequence)
        self.scheduler.finish(sequence)
        self._forget(sequence.key)

    def _forget(self, key: RequestKey) -> None:
        with self._lock:
            self._known.discard(key)

    def _flush(self) -> None:
        outputs, self._outputs = self._outputs, []
        if outputs:
            try:
                self._on_outputs(outputs)
            except Exception:
                logger.exception("the receiver of outputs failed; %d outputs are lost", len(outputs))

    # Hand-overs: prefill worker

    def _announce(self, sequence: Sequence, export: KvExport) -> None:
        """Tells the exporter of the tokens that are there before anything is computed."""
        previous, sequence.announced = sequence.announced, sequence.num_computed
        if sequence.gated and self._store is not None:
            sequence.announced = self._store.loading_from(sequence)
        if previous is None:
            export.begin(sequence.key, self._runner.slots(sequence).tolist(), sequence.announced)
        elif previous < sequence.announced:
            for layer in range(self.pool.num_layers):
                export.layer_ready(layer, previous, sequence.announced)

    def _loaded(self, sequence: Sequence) -> None:
        """All that comes from the store is there: `sequence` runs, or need not wait for it any more."""
        if sequence.row < 0:
            self._start(sequence)
        elif sequence.request.kv_export is not None:
            try:
                self._announce(sequence, sequence.request.kv_export)
            except Exception:
                logger.exception("the export of %s failed", sequence.key)
                self._fail(sequence, "internal", "the hand-over failed; see the worker's log")

    def _hold(self, sequence: Sequence) -> None:
        """Out of the steps; its blocks are kept until they are released or the lease ends."""
        self._runner.release(sequence)
        self.scheduler.hold(sequence)
        self._leases.pop(sequence.key, None)
        self._leases[sequence.key] = (time.monotonic() + EXPORT_LEASE_S, sequence)

    def _export_finished(self, sequence: Sequence, export: KvExport, output: RequestOutput) -> None:
        self._hold(sequence)
        try:
            export.finished(output)
        except Exception:
            logger.exception("the export of %s failed at its end", sequence.key)
            self._fail(sequence, "internal", "the hand-over failed; see the worker's log")

    def _release(self, key: RequestKey, error: str) -> None:
        sequence = self._sequences.get(key)
        if sequence is not None:
            if sequence.phase is Phase.HOLDING and not error:
                self._end(sequence, RequestOutput(key, finish_reason=FinishReason.HANDED_OVER))
            else:
                self._fail(sequence, "worker_lost", error or "the hand-over was given up")
        if (lease := self._leases.get(key)) is not None:
            self._free(lease[1])

    # Hand-overs: decode worker

    def _reserve(self, sequence: Sequence, kv_import: KvImport) -> None:
        slots = torch.from_numpy(self._runner.slots(sequence)).to(self.loaded.device)
        sequence.reservation = Reservation(
            self.pool,
            slots,
            skip_tokens=sequence.num_computed,
            completed=lambda first: self._inbox.put(partial(self._about, sequence, self._import_completed, first)),
            failed=lambda reason: self._inbox.put(partial(self._about, sequence, self._import_failed, reason)),
        )
        kv_import.reserved(sequence.reservation)

    def _about(self, sequence: Sequence, call: Callable[..., None], *arguments: object) -> None:
        """Carries out what is about `sequence` alone: if it raises, that request ends."""
        try:
            call(sequence, *arguments)
        except Exception as error:
            self._fail_alone(sequence, error)

    def _import_completed(self, sequence: Sequence, first: RequestOutput) -> None:
        if sequence.phase is not Phase.IMPORTING:
            return
        if len(first.token_ids) > 1 or any(token >= self.loaded.config.vocab_size for token in first.token_ids):
            self._import_failed(sequence, "the first output is none of this model")
            return
        inexact_from = first.prompt.inexact_from if first.prompt is not None else None
        if inexact_from is not None:  # what was here before is exact; what came was computed after rows that are not
            inexact_from = max(inexact_from, sequence.num_computed)
        sequence.reservation = None
        self.scheduler.join(sequence, TokenRanges.up_to(len(sequence.tokens)), inexact_from=inexact_from)
        self.scheduler.publish(sequence)
        start_index = sequence.num_output
        for token in first.token_ids:
            sequence.append(token)
        sequence.report, report = None, sequence.report
        output = replace(first, key=sequence.key, start_index=start_index, prompt=first.prompt or report)
        if output.finish_reason is not None:
            self._end(sequence, output)
        elif self._start(sequence):
            self._outputs.append(output)
            if sequence.guide is not None:
                self._masks.follow(sequence.guide, sequence.tokens[sequence.num_prompt :])

    def _import_failed(self, sequence: Sequence, reason: str) -> None:
        if sequence.phase is not Phase.IMPORTING or sequence.reservation is None:
            return
        logger.info("request %s computes its prompt here: %s", sequence.key, reason)
        if sequence.report is not None:
            sequence.report.recompute_reason = reason
        self.scheduler.join(sequence, TokenRanges.up_to(sequence.reservation.skip_tokens))
        sequence.reservation = None
        self._start(sequence)

    # Books

    def _check(self) -> None:
        self.scheduler.check_integrity()
        wrong: list[str] = []
        rows = [sequence.row for sequence in self._sequences.values() if sequence.row >= 0]
        if len(set(rows)) != len(rows) or len(rows) + self._runner.free_rows != self.config.max_num_seqs:
            wrong.append(f"rows {rows} are in use and {self._runner.free_rows} are free")
        with self._lock:
            known = set(self._known)
        if not self._sequences.keys() | self._leases.keys() <= known:
            wrong.append("a request in the engine is not known to it")
        for key in known - self._sequences.keys() - self._leases.keys():
            if self.blocks.holds(key):
                wrong.append(f"{key} is gone and holds blocks")
        if wrong:
            raise IntegrityError("; ".join(wrong))


def _tokens_beside_decodes(config: EngineConfig, device: torch.device) -> int | None:
    """A step on a GPU takes about as long with many tokens as with few."""
    if device.type != "cpu":
        return None
    return max(config.block_size, config.max_num_batched_tokens // 4)


def _without_mask(sequences: list[Sequence]) -> list[Sequence]:
    return [sequence for sequence in sequences if sequence.guide is not None and not sequence.guide.ready]


def _add_report(sequence: Sequence, output: RequestOutput) -> None:
    """What is told once, with the first output."""
    if sequence.report is not None:
        report, now = sequence.report, time.monotonic()
        report.queue_s = (sequence.first_scheduled or now) - sequence.submitted
        report.prefill_s = now - (sequence.first_scheduled or now)
        report.inexact_from = sequence.inexact_from
        output.prompt, sequence.report = report, None
        if sequence.request.sampling.prompt_logprobs is not None:
            output.prompt_logprobs = [None, *sequence.prompt_logprobs]
