"""Sequences whose KV goes to another worker, and the blocks that are kept for those who read them.

An export can begin at any time of a sequence's life. It tells, in this order, of the tokens that are known and where
their KV is; of the rows that are computed since, layer by layer while the steps run; and of the next token, which goes
to the exporter and not out of this engine. With that the sequence is done here: its blocks are held until they are
released, or a lease ends. Whoever has the rows, the known tokens and that one goes on where this engine stopped.

A prefill worker's request is the case that begins before its first step: the next token is the first of the output. One
that decodes has all of its rows already, but for the last known token's, which its next step computes.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Container

from tandem.common.errors import TandemError
from tandem.common.fairness import LAST_BAND
from tandem.engine.handover.announcer import Export, LayerAnnouncer
from tandem.engine.request import FinishReason, KvExport, Pooling, RequestKey, RequestOutput
from tandem.engine.schedule.plan import StepPlan
from tandem.engine.schedule.scheduler import Scheduler
from tandem.engine.schedule.sequence import Phase, Sequence
from tandem.engine.settings import EXPORT_LEASE_S
from tandem.engine.step.executor import Executor
from tandem.engine.step.runner import slots_of

logger = logging.getLogger(__name__)


class Exports:
    """Engine thread only."""

    def __init__(
        self, scheduler: Scheduler, executor: Executor, num_layers: int, *, filled: Callable[[Sequence], int]
    ) -> None:
        """`filled` says how many leading tokens of a running sequence have their KV in all layers of the pool."""
        self._scheduler = scheduler
        self._blocks = scheduler.blocks
        self._executor = executor
        self._num_layers = num_layers
        self._filled = filled
        self._exports: dict[Sequence, Export] = {}
        self._leases: dict[RequestKey, tuple[float, Sequence]] = {}
        """Blocks kept for an exporter, and until when; the earliest end first."""

    def __contains__(self, sequence: Sequence) -> bool:
        return sequence in self._exports

    # The way out

    def attach(self, sequence: Sequence, target: KvExport) -> None:
        """The next token of `sequence` goes to `target`, with its KV. Raises TandemError for what cannot be exported,
        with nothing changed."""
        if sequence in self._exports:
            raise TandemError("invalid_request", "the request is being handed over already")
        if sequence.request.pooling is not Pooling.NONE:
            raise TandemError("invalid_request", "an embedding is not handed over", param="pooling")
        if sequence.phase is Phase.RUNNING and not self._has_room(sequence):
            raise TandemError("overloaded", "there is no block for the next token of the request")
        self._exports[sequence] = Export(target)
        sequence.pinned = True

    def detach(self, sequence: Sequence, reason: str) -> None:
        """`sequence` stays here, before its export has begun."""
        export = self._exports.pop(sequence)
        sequence.pinned = False
        abort(export.target, reason)

    def announce(self, sequence: Sequence) -> None:
        """`sequence`, if it is exported, is about to be computed: tells of the tokens that are there before. Raises
        what the exporter raises."""
        export = self._exports.get(sequence)
        if export is None:
            return
        if not self._has_room(sequence):
            self.detach(sequence, "there is no block for the next token of the request")
            return
        previous, export.announced = export.announced, self._filled(sequence)
        if previous is None:
            slots = slots_of(self._blocks, sequence).tolist()
            export.target.begin(sequence.key, list(sequence.tokens), slots, export.announced)
        elif previous < export.announced:
            for layer in range(self._num_layers):
                export.target.layer_ready(layer, previous, export.announced)

    def announcer(self, plan: StepPlan, late: Container[Sequence]) -> LayerAnnouncer:
        """Tells of the rows of `plan` while they are computed."""
        return LayerAnnouncer(plan, self._exports, late)

    def hand_over(self, sequence: Sequence, output: RequestOutput) -> None:
        """`output` holds the next token: `sequence` is done here. Raises what the exporter raises."""
        self.hold(sequence)
        self._exports[sequence].target.finished(output)

    def forget(self, sequence: Sequence, output: RequestOutput) -> bool:
        """`sequence` ends with `output`. Returns whether its exporter may still read its blocks."""
        export = self._exports.pop(sequence, None)
        if export is None or output.finish_reason is FinishReason.HANDED_OVER:
            return False
        abort(export.target, output.error_message or "cancelled")
        return export.announced is not None

    def _has_room(self, sequence: Sequence) -> bool:
        """Whether there is a block for every known token; the last of one that decodes may need another."""
        return self._blocks.extend(sequence.key, len(sequence.tokens), sequence.priority == LAST_BAND)

    # Leases

    def hold(self, sequence: Sequence) -> None:
        """`sequence` is out of the steps; its blocks are kept until they are released or the lease ends."""
        self._executor.release(sequence)
        self._scheduler.hold(sequence)
        self._leases.pop(sequence.key, None)
        self._leases[sequence.key] = (time.monotonic() + EXPORT_LEASE_S, sequence)

    def release(self, sequence: Sequence) -> None:
        """The blocks of `sequence` go back: nobody reads them."""
        self._leases.pop(sequence.key, None)

    def held(self, key: RequestKey) -> Sequence | None:
        """The sequence whose blocks are held under `key`."""
        lease = self._leases.get(key)
        return lease[1] if lease is not None else None

    @property
    def all_held(self) -> list[Sequence]:
        return [sequence for _, sequence in self._leases.values()]

    def next_due(self) -> float | None:
        """time.monotonic() at which a lease ends."""
        return next((end for end, _ in self._leases.values()), None)

    def expired(self, now: float) -> list[Sequence]:
        """Those whose lease has ended; the caller ends and frees them."""
        late: list[Sequence] = []
        for key, (end, sequence) in self._leases.items():
            if end > now:
                break
            logger.warning("the hand-over of %s was not confirmed within %g s", key, EXPORT_LEASE_S)
            late.append(sequence)
        return late


def abort(target: KvExport, reason: str) -> None:
    """Tells an exporter that nothing more will come."""
    try:
        target.aborted(reason)
    except Exception:
        logger.exception("an exporter failed as it was told of the end: %s", reason)
