"""The engine: one thread that takes requests in, lets steps be computed, and takes note of what came of them.

Read `_run` first. Other threads talk to it through an inbox of calls that it empties before each step; it sleeps on the
inbox when there is nothing to compute. Each request ends in `_end`, with exactly one output that has a finish reason.
What it consists of:

- `schedule/` says what is computed next, `step/` computes it (`Executor`), `outputs.py` says what came of it;
- `handover/exports.py` sends KV to another worker: announced layer by layer while steps run, held until `release`;
- `handover/imports.py` reserves blocks for KV that comes from another worker, or has it computed here;
- `store/flow.py` looks prompts up in a KV store, loads them and saves what is computed;
- `guided.py` holds outputs to constraints.
"""

from __future__ import annotations

import contextlib
import logging
import threading
import time
from collections.abc import Callable
from functools import partial

from tandem.common.checkpoint import resolve_model
from tandem.common.errors import TandemError
from tandem.common.fairness import LAST_BAND
from tandem.engine.handover.announcer import LayerAnnouncer
from tandem.engine.inbox import Inbox
from tandem.engine.intake import Intake
from tandem.engine.masks.pool import MaskPool
from tandem.engine.model.loader import device_of
from tandem.engine.outputs import Outputs, embedding
from tandem.engine.request import EngineRequest, KvExport, RequestKey, RequestOutput
from tandem.engine.requests import Requests
from tandem.engine.schedule.block_manager import BlockManager
from tandem.engine.schedule.cache_events import CacheLog
from tandem.engine.schedule.plan import StepPlan
from tandem.engine.schedule.scheduler import Scheduler
from tandem.engine.schedule.sequence import Phase
from tandem.engine.settings import MAX_WAITING, EngineConfig
from tandem.engine.status import EngineStatus, StepMeter
from tandem.engine.step.executor import Executor, StepResult
from tandem.engine.step.faults import DeviceLost
from tandem.engine.step.local import LocalExecutor, load
from tandem.engine.step.parts import failure
from tandem.engine.store.cache import EngineStore
from tandem.engine.store.flow import StoreFlow
from tandem.engine.store.loading import Gate
from tandem.engine.watch import EngineWatch, Pulse

logger = logging.getLogger(__name__)


class Engine:
    """One model on one worker. Methods may be called from any thread."""

    def __init__(
        self,
        config: EngineConfig,
        on_outputs: Callable[[list[RequestOutput]], None],
        store: EngineStore | None = None,
        on_device_lost: Callable[[DeviceLost], None] = lambda lost: None,
    ) -> None:
        """Loads the model and reserves the KV pool. Raises ConfigError for a setting or model that cannot be used.

        `on_outputs` is called on the engine thread, once per step, and must not block. `store` serves this engine
        alone; without one, no KV outlives the pool. `on_device_lost` is called on the engine thread when nothing can be
        computed any more, and may end the process; if it returns, the engine stops.
        """
        self.config = config = config.sized_for(device_of(config.device).type)
        if store is not None:
            store.check(config.block_size)
        folder = resolve_model(config.model)
        self.loaded, self.pool, self.max_model_len = load(config, folder)
        self.blocks = BlockManager(
            self.pool.num_blocks, config.block_size, config.enable_prefix_caching, longest_request=self.max_model_len
        )
        self.scheduler = Scheduler(
            self.blocks,
            max_num_seqs=config.max_num_seqs,
            max_num_batched_tokens=config.max_num_batched_tokens,
            max_waiting=MAX_WAITING,
            max_prompt_tokens_beside_decodes=_tokens_beside_decodes(config, self.loaded.device.type),
        )
        self._executor: Executor = LocalExecutor(config, self.loaded, self.pool, self.blocks, self.max_model_len)
        self._on_device_lost = on_device_lost
        self._meter = StepMeter()
        self._pulse = Pulse()
        self._inbox = Inbox()
        """Requests beyond MAX_WAITING are refused when it is emptied."""
        self._outputs = Outputs(on_outputs)
        model = self.loaded.config
        self._requests = Requests(
            Intake(config, self.loaded, self.max_model_len),
            MaskPool(folder / "tokenizer.json", model.vocab_size, model.eos_token_ids),
            self.pool,
            self.scheduler,
            self._executor,
            self._inbox,
            self._outputs,
        )
        self._store: StoreFlow | None = None
        if store is not None:
            self._store = self._requests.store = StoreFlow(
                store,
                config,
                self.loaded,
                self.pool,
                self.blocks,
                self.scheduler,
                self._meter,
                post=self._requests.post,
                about=self._requests.about,
                resume=self._requests.loaded,
            )
        self.is_broken = False
        """It has stopped for good, as its books are wrong. Read from any thread."""
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)

    # From any thread

    def start(self) -> None:
        self._thread.start()

    def start_masks(self) -> None:
        """Starts the mask processes, before `start`: the first request with a constraint does not wait for the
        tokenizer to be read."""
        with contextlib.suppress(TandemError):  # such requests will be told
            self._requests.guided.masks.start()

    def submit(self, request: EngineRequest) -> None:
        """Queues `request`; everything that happens to it, a refusal too, comes through `on_outputs`.

        Raises TandemError `unavailable` after `stop`, and `invalid_request` for a key that is in use.
        """
        self._requests.submit(request)
        if request.priority < LAST_BAND:
            self._pulse.hurry = True

    def cancel(self, key: RequestKey) -> None:
        """Ends the request with CANCELLED. Without effect if it has ended."""
        self._inbox.put(partial(self._requests.cancel, key))

    def export(self, key: RequestKey, target: KvExport) -> None:
        """Hands a request over in the middle of its life: its next token goes to `target`, with the KV of all before
        it (`handover/exports.py`). A request that cannot be handed over stays, and `target` is told by `aborted`."""
        self._inbox.put(partial(self._requests.export, key, target))

    def release(self, key: RequestKey, error: str = "") -> None:
        """An exporter no longer reads the blocks of `key`: they are freed. The hand-over succeeded, unless there is an
        `error` or it comes before `KvExport.finished`: then the request ends with `worker_lost`."""
        self._inbox.put(partial(self._requests.release, key, error))

    def status(self) -> EngineStatus:
        return EngineStatus.of(self.scheduler, self._meter)

    @property
    def shortages(self) -> int:
        """How often a step, or a part of one, found too little memory on the device."""
        return self._executor.shortages

    @property
    def stalled_s(self) -> float:
        """How long the engine thread has been in the same layer of a step, or between two; 0 while it has no work."""
        moved = self._pulse.moved
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
        check = partial(self._requests.check_integrity, self.config.max_num_seqs)
        if not self._inbox.carry_out(check, self._thread.is_alive):
            check()

    def stop(self, timeout: float) -> bool:
        """Ends all requests with `unavailable` and the thread with them. False if it is still in a step after
        `timeout` seconds."""
        self._requests.close()
        self._pulse.stopping = True
        self._inbox.put(lambda: None)
        if self._thread.ident is None:
            self._close()
        elif self._thread.is_alive():
            self._thread.join(timeout)
        return not self._thread.is_alive()

    # The engine thread

    def _run(self) -> None:
        idle = True
        with self._executor.thread():
            while not self._pulse.stopping:
                try:
                    self._receive(wait=idle)
                    self._pulse.moved = now = time.monotonic()
                    self._requests.expire(now)
                    plan = self._plan(now)
                    self._requests.begin(plan)
                    self._outputs.flush()  # a first token that came with imported KV does not wait for the step
                    if plan.num_tokens:
                        self._step(plan)
                    idle = not (plan.num_tokens or plan.admitted or plan.preempted)
                except DeviceLost as lost:
                    self._on_device_lost(lost)
                    logger.critical("the device is lost, so the engine stops", exc_info=lost)
                    self._requests.close()
                    break
                except Exception:
                    logger.exception("the engine failed outside a step; all its requests are given up")
                    self._requests.end_all(TandemError("internal", "the engine failed; see its log"))
                    self._requests.is_suspect = True
                if self._requests.is_suspect:
                    self._check_after_failure()
                self._outputs.flush()
            self._pulse.moved = None
            self._close()

    def _plan(self, now: float) -> StepPlan:
        """The next step. A request at which the scheduler raises ends, and the others are planned again."""
        while True:
            try:
                return self.scheduler.schedule(now)
            except Exception as error:
                self._requests.blame(self.scheduler.plan, error)

    def _check_after_failure(self) -> None:
        """Goes on where the books balance. Else blocks or rows are lost, or might be somebody else's: the engine stops,
        and routers continue what it has elsewhere."""
        try:
            self._requests.check_integrity(self.config.max_num_seqs)
            self._requests.is_suspect = False
        except Exception:
            logger.exception("what failed left the engine's books wrong: it stops")
            self._requests.close()
            self.is_broken = self._pulse.stopping = True

    def _close(self) -> None:
        self._receive(wait=False)
        self._requests.end_all(TandemError("unavailable", "the worker is shutting down"))
        for sequence in self._requests.exports.all_held:
            self._requests.free(sequence)
        self._requests.guided.masks.stop()
        if self._store is not None:
            if not self._store.close():
                logger.warning("a call to the KV store does not return; its thread is left behind")
            self._receive(wait=False)
        self._outputs.flush()

    def _receive(self, wait: bool) -> None:
        """Carries out what other threads asked for; sleeps until something comes, or is due, if `wait`."""
        if wait and not self._requests.guided.masks.changed:
            self._pulse.moved = None
            self._inbox.sleep(self._next_event(), self._requests.guided.masks.watched())
            self._pulse.moved = time.monotonic()
        self._pulse.hurry = False
        self._inbox.run_all()
        self._requests.guided.receive()

    def _next_event(self) -> float | None:
        """Seconds until something is due; None: nothing is."""
        times = (self._requests.next_due(), self.scheduler.next_piece())
        due = min((each for each in times if each is not None), default=None)
        return max(due - time.monotonic(), 0.0) if due is not None else None

    def _step(self, plan: StepPlan) -> None:
        gate = self._store.gate(plan) if self._store is not None else None
        announcer = self._requests.exports.announcer(plan, gate.broken if gate is not None else ())
        watch = EngineWatch(plan, self._pulse, self._requests.guided, announcer, gate)
        result = self._executor.execute(plan, watch)
        if result is not None:
            self._take(result, announcer, gate)

    def _take(self, result: StepResult, announcer: LayerAnnouncer, gate: Gate | None) -> None:
        """The consequences, for one request after the other: what goes wrong with one ends that one."""
        requests, plan = self._requests, result.computed
        decodes, tokens = len(plan.decodes), plan.num_tokens
        if gate is not None and self._store is not None:
            requests.about((*gate.passing, *gate.broken), partial(self._store.stepped, gate))
            for sequence in gate.broken:
                self._executor.release(sequence)
        for sequence, error in result.failed:
            if sequence.phase is Phase.RUNNING:
                requests.fail(sequence, error)
        plan.drop([sequence for sequence in plan.sequences if sequence.phase is not Phase.RUNNING])
        for sequence, raised in self.scheduler.computed(plan):
            logger.error("what was computed for %s cannot be taken note of", sequence.key, exc_info=raised)
            requests.fail(sequence, failure(raised))
        for sequence, raised in announcer.broken.items():
            if sequence.phase is Phase.RUNNING:
                requests.hand_over_failed(sequence, raised)
        for chosen in result.tokens:
            if chosen.sequence.phase is Phase.RUNNING:
                requests.about((chosen.sequence,), partial(requests.advance, chosen))
        for sequence, vector in result.embeddings:
            if sequence.phase is Phase.RUNNING:
                requests.about((sequence,), partial(requests.end, sequence, embedding(sequence, vector)))
        requests.guided.send()
        self.scheduler.took(plan, result.seconds)
        if gate is None or not gate.broken:
            waited_s = gate.waited_s if gate is not None else 0.0
            self._meter.add(decodes, tokens - decodes, result.seconds - waited_s)


def _tokens_beside_decodes(config: EngineConfig, device: str) -> int | None:
    """A step on a GPU takes about as long with many tokens as with few."""
    if device != "cpu":
        return None
    return max(config.block_size, config.max_num_batched_tokens // 4)
