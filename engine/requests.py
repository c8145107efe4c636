"""The requests of one engine: how each comes, begins, gets its tokens, and ends in `end`.

Whatever goes wrong with one, or with what is called on its behalf, ends that one alone (`about`).
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Iterable
from functools import partial

from tandem.common.errors import TandemError
from tandem.engine import outputs
from tandem.engine.guided import Guided
from tandem.engine.handover import imports
from tandem.engine.handover.exports import Exports, abort
from tandem.engine.handover.imports import Imports
from tandem.engine.inbox import Inbox
from tandem.engine.intake import Intake
from tandem.engine.masks.pool import MaskPool
from tandem.engine.model.batch import KvPool
from tandem.engine.outputs import Outputs
from tandem.engine.request import EngineRequest, FinishReason, KvExport, RequestKey, RequestOutput
from tandem.engine.schedule.block_manager import IntegrityError
from tandem.engine.schedule.plan import StepPlan
from tandem.engine.schedule.scheduler import Scheduler
from tandem.engine.schedule.sequence import Phase, Sequence
from tandem.engine.step.executor import Executor, NextToken
from tandem.engine.step.parts import failure
from tandem.engine.step.runner import slots_of
from tandem.engine.store.flow import StoreFlow

logger = logging.getLogger(__name__)


class Requests:
    """Engine thread only, but for `take_key`, `post`, `wait_saved` and the attributes."""

    def __init__(
        self,
        intake: Intake,
        masks: MaskPool,
        pool: KvPool,
        scheduler: Scheduler,
        executor: Executor,
        inbox: Inbox,
        told: Outputs,
    ) -> None:
        """`told` takes the outputs. A store, where there is one, is set with `use`."""
        self._intake = intake
        self._scheduler = scheduler
        self._executor = executor
        self._inbox = inbox
        self._told = told
        self.guided = Guided(masks, inbox, about=self.about, queue=self._queue, end=self.end, fail=self.fail)
        self.exports = Exports(scheduler, executor, pool.num_layers, filled=self._filled)
        self._imports = Imports(
            pool, scheduler, intake.vocab_size, post=self.post, joined=self._joined, failed=self._start
        )
        self.store: StoreFlow | None = None
        self.sequences: dict[RequestKey, Sequence] = {}
        """Not ended."""
        self.is_suspect = False
        """Something raised at the end of a request: its blocks or its row may not have come back."""
        self._lock = threading.Lock()
        self.known: set[RequestKey] = set()
        """Submitted and not ended, or ended with blocks that an exporter may still read. Guarded by the lock."""
        self._closed = False
        """No request is taken any more. Guarded by the lock."""

    # From any thread

    def submit(self, request: EngineRequest) -> None:
        """Posts `request`. Raises TandemError `unavailable` after `close`, and `invalid_request` for a key that is in
        use."""
        now = time.monotonic()
        with self._lock:
            if self._closed:
                raise TandemError("unavailable", "the worker is shutting down")
            if request.key in self.known:
                raise TandemError("invalid_request", f"request {request.key} is being served already")
            self.known.add(request.key)
            self._inbox.put(partial(self._accept, request, now))

    def close(self) -> None:
        """Takes no request from now on."""
        with self._lock:
            self._closed = True

    def post(self, concerned: Iterable[Sequence], call: Callable[[], None]) -> None:
        """Hands a call to the engine thread: if it raises, the requests that are `concerned` end."""
        self._inbox.put(partial(self.about, concerned, call))

    # A request comes

    def _accept(self, request: EngineRequest, submitted: float) -> None:
        try:
            sequence = self._intake.sequence(request, submitted)
            guided = request.sampling.constraint is not None
            look_up = not guided and self.store is not None and self.store.accept(sequence)
            self._scheduler.add(sequence, look_up or guided)
            if request.kv_export is not None:
                self.exports.attach(sequence, request.kv_export)
        except Exception as error:
            self._refuse(request, error)
            return
        self.sequences[request.key] = sequence
        if guided:
            self.about((sequence,), partial(self.guided.open, sequence))
        elif self.store is not None and look_up:
            self.about((sequence,), partial(self.store.look_up, sequence))

    def _refuse(self, request: EngineRequest, error: Exception) -> None:
        refusal = TandemError("internal", "the request could not be read; see the worker's log")
        if isinstance(error, TandemError):
            refusal = error
        else:
            logger.error("request %s could not be queued", request.key, exc_info=error)
        self._told.put(outputs.failed(request.key, refusal))
        self._forget(request.key)
        if request.kv_export is not None:
            abort(request.kv_export, refusal.message)
        imports.close(request)

    def _queue(self, sequence: Sequence) -> None:
        """The first mask of `sequence` is there: it takes its place in the queue, or asks the store first."""
        if self.store is not None and self.store.accept(sequence):
            self.store.look_up(sequence)
        else:
            self._scheduler.looked_up(sequence)

    # A request begins

    def begin(self, plan: StepPlan) -> None:
        """Rows and hand-overs of the sequences that lost or got their blocks."""
        for sequence in plan.preempted:
            self._executor.release(sequence)
            self._told.put(RequestOutput(sequence.key, start_index=sequence.num_output, preempted=sequence.preempted))
        plan.drop([sequence for sequence in plan.admitted if not self._start(sequence)])

    def _start(self, sequence: Sequence) -> bool:
        """`sequence` has its blocks, or its import or loading has ended. If this fails, the request alone ends."""
        try:
            if sequence.phase is Phase.IMPORTING:
                self._imports.reserve(sequence)
                return True
            if self.store is not None:
                if sequence.phase is Phase.LOADING:
                    self.store.load(sequence, slots_of(self._scheduler.blocks, sequence))
                    return True
                self.store.runs(sequence)
            self._executor.admit(sequence)
            self.exports.announce(sequence)
        except Exception:
            logger.exception("request %s failed as it began", sequence.key)
            self.fail(sequence, TandemError("internal", "the request failed as it began; see the worker's log"))
            return False
        return True

    def loaded(self, sequence: Sequence) -> None:
        """All that comes from the store is there: `sequence` runs, or need not wait for it any more."""
        if not self._executor.holds(sequence):
            self._start(sequence)
            return
        try:
            self.exports.announce(sequence)
        except Exception as error:
            self.hand_over_failed(sequence, error)

    def _joined(self, sequence: Sequence, first: RequestOutput) -> None:
        """All that was to be imported is there, with the `first` output."""
        if first.finish_reason is not None:
            self.end(sequence, first)
        elif self._start(sequence):
            self._told.put(first)
            self.guided.follow(sequence)

    def _filled(self, sequence: Sequence) -> int:
        """Leading tokens of `sequence`, which runs, whose KV is there in all layers."""
        if sequence.gated and self.store is not None:
            return self.store.loading_from(sequence)
        return sequence.num_computed

    # A request gets on

    def advance(self, chosen: NextToken) -> None:
        """A token was chosen to follow the last one of its sequence."""
        sequence = chosen.sequence
        if chosen.dead_end is not None:
            self.fail(sequence, chosen.dead_end)
            return
        output = outputs.advance(sequence, chosen, ends=self.guided.ends_with(sequence, chosen.token))
        if sequence in self.exports:
            try:
                self.exports.hand_over(sequence, output)
            except Exception as error:
                self.hand_over_failed(sequence, error)
        elif output.finish_reason is not None:
            self.end(sequence, output)
        else:
            self._told.put(output)
            self.guided.follow(sequence)

    def hand_over_failed(self, sequence: Sequence, error: Exception) -> None:
        """Ends `sequence`, whose exporter has raised `error`."""
        logger.error("the export of %s failed", sequence.key, exc_info=error)
        self.fail(sequence, TandemError("internal", "the hand-over failed; see the worker's log"))

    def export(self, key: RequestKey, target: KvExport) -> None:
        """Hands the request over with its next token; `target` is told where that cannot be, and the request stays."""
        sequence = self.sequences.get(key)
        if sequence is None:
            abort(target, "the request has ended, or never was here")
            return
        try:
            self.exports.attach(sequence, target)
        except TandemError as error:
            abort(target, error.message)
            return
        if sequence.phase is Phase.RUNNING:
            try:
                self.exports.announce(sequence)
            except Exception as error:
                self.hand_over_failed(sequence, error)

    def release(self, key: RequestKey, error: str) -> None:
        """An exporter reads the blocks of `key` no longer; with an `error`, or before its end, the request fails."""
        sequence = self.sequences.get(key)
        if sequence is not None:
            if sequence.phase is Phase.HOLDING and not error:
                self.end(sequence, RequestOutput(key, finish_reason=FinishReason.HANDED_OVER))
            else:
                self.fail(sequence, TandemError("worker_lost", error or "the hand-over was given up"))
        if (held := self.exports.held(key)) is not None:
            self.free(held)

    # A request ends

    def about(self, concerned: Iterable[Sequence], call: Callable[[], None]) -> None:
        """Carries out what is about the `concerned` alone: if it raises, their requests end and no other."""
        try:
            call()
        except Exception as error:
            logger.exception("what failed is about %s", [str(each.key) for each in concerned] or "no request")
            for sequence in concerned:
                if self.sequences.get(sequence.key) is sequence:
                    self.fail(sequence, failure(error))

    def expire(self, now: float) -> None:
        """Ends those whose time is up, and what waits for others for too long; `now` is time.monotonic()."""
        for sequence in self._scheduler.expired(now):
            if sequence.key in self.sequences:
                self.fail(sequence, TandemError("deadline_exceeded", "the request ran out of time"))
        if self.store is not None:
            self.store.expire(now)
        self.guided.expire(now)
        for sequence in self.exports.expired(now):
            if sequence.key in self.sequences:
                self.fail(sequence, TandemError("unavailable", "the hand-over was not confirmed in time"))
            self.free(sequence)

    def next_due(self) -> float | None:
        """time.monotonic() at which `expire` has work."""
        times = (
            self._scheduler.next_deadline(),
            self.store.next_due() if self.store is not None else None,
            self.guided.masks.next_due(),
            self.exports.next_due(),
        )
        return min((each for each in times if each is not None), default=None)

    def fail(self, sequence: Sequence, error: TandemError) -> None:
        """Ends `sequence` with `error`."""
        self.end(sequence, outputs.failed(sequence.key, error, sequence.num_output))

    def cancel(self, key: RequestKey) -> None:
        """Ends the request with CANCELLED, if it has not ended."""
        if (sequence := self.sequences.get(key)) is not None:
            reason = FinishReason.CANCELLED
            self.end(sequence, RequestOutput(key, finish_reason=reason, start_index=sequence.num_output))

    def end(self, sequence: Sequence, output: RequestOutput) -> None:
        """The only way out of the engine: `output` is the request's last. Its blocks go back, or are kept under a lease
        while an exporter may still read them."""
        del self.sequences[sequence.key]
        self._told.put(output)
        self._let_go(sequence, self.guided.forget, self._imports.forget)
        if self.store is not None:
            self._let_go(sequence, self.store.forget)
        self._let_go(sequence, partial(self._free_or_hold, output=output))
        imports.close(sequence.request)

    def _free_or_hold(self, sequence: Sequence, output: RequestOutput) -> None:
        if self.exports.forget(sequence, output):
            self.exports.hold(sequence)
        else:
            self.free(sequence)

    def end_all(self, error: TandemError) -> None:
        """Ends all of them with `error`."""
        for sequence in list(self.sequences.values()):
            self.fail(sequence, error)

    def free(self, sequence: Sequence) -> None:
        """The blocks of `sequence`, which has ended, go back."""
        self._let_go(sequence, self.exports.release, self._executor.release, self._scheduler.finish)
        self._forget(sequence.key)

    def _let_go(self, sequence: Sequence, *calls: Callable[[Sequence], object]) -> None:
        """Carries out what belongs to the end of `sequence`, all of it, whatever raises. What that left behind turns
        out when the books are checked (`is_suspect`)."""
        for call in calls:
            try:
                call(sequence)
            except Exception:
                logger.exception("the end of %s left something behind", sequence.key)
                self.is_suspect = True

    def _forget(self, key: RequestKey) -> None:
        with self._lock:
            self.known.discard(key)

    def blame(self, plan: StepPlan, error: Exception) -> None:
        """Ends the request that the scheduler was looking at when it raised `error`, and carries out what `plan` had
        decided until then of who got and lost blocks. Raises `error` where there is no such request."""
        culprit = plan.looked_at
        if culprit is None or self.sequences.get(culprit.key) is not culprit:
            raise error
        logger.error("request %s cannot be planned", culprit.key, exc_info=error)
        self.is_suspect = True  # it may have stopped halfway
        self.fail(culprit, failure(error))
        for changed in (plan.admitted, plan.preempted):
            if culprit in changed:
                changed.remove(culprit)
        self.begin(plan)

    def check_integrity(self, max_num_seqs: int) -> None:
        """Raises IntegrityError with what does not balance."""
        self._scheduler.check_integrity()
        wrong: list[str] = []
        rows = sum(self._executor.holds(sequence) for sequence in self.sequences.values())
        if rows + self._executor.free_rows != max_num_seqs:
            wrong.append(f"{rows} rows are in use and {self._executor.free_rows} are free")
        with self._lock:
            known = set(self.known)
        live = self.sequences.keys() | {sequence.key for sequence in self.exports.all_held}
        if not live <= known:
            wrong.append("a request in the engine is not known to it")
        for key in known - live:
            if self._scheduler.blocks.holds(key):
                wrong.append(f"{key} is gone and holds blocks")
        if wrong:
            raise IntegrityError("; ".join(wrong))
