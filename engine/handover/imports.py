"""Sequences whose KV comes from another worker: blocks are reserved for it, and what comes with the KV is taken in."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterable
from dataclasses import replace
from functools import partial

import torch

from tandem.engine.handover.reservation import Reservation
from tandem.engine.model.batch import KvPool
from tandem.engine.request import EngineRequest, RequestOutput
from tandem.engine.schedule.ranges import TokenRanges
from tandem.engine.schedule.scheduler import Scheduler
from tandem.engine.schedule.sequence import Phase, Sequence
from tandem.engine.step.runner import slots_of

logger = logging.getLogger(__name__)


class Imports:
    """Engine thread only."""

    def __init__(
        self,
        pool: KvPool,
        scheduler: Scheduler,
        vocab_size: int,
        *,
        post: Callable[[Iterable[Sequence], Callable[[], None]], None],
        joined: Callable[[Sequence, RequestOutput], None],
        failed: Callable[[Sequence], object],
    ) -> None:
        """`post` hands a call about some sequences to the engine thread. `joined` takes a sequence that is RUNNING with
        all its known tokens, and the output that came with them; `failed` one that is RUNNING without them."""
        self._pool = pool
        self._scheduler = scheduler
        self._vocab_size = vocab_size
        self._post = post
        self._joined = joined
        self._failed = failed
        self._reservations: dict[Sequence, Reservation] = {}

    def reserve(self, sequence: Sequence) -> None:
        """`sequence` got its blocks and is IMPORTING. Raises what the request's importer raises."""
        kv_import = sequence.request.kv_import
        if kv_import is None:
            raise ValueError(f"{sequence.key} imports nothing")
        slots = torch.from_numpy(slots_of(self._scheduler.blocks, sequence)).to(self._pool.storage.device)
        reservation = self._reservations[sequence] = Reservation(
            self._pool,
            slots,
            skip_tokens=sequence.num_computed,
            completed=lambda first: self._post((sequence,), partial(self._complete, sequence, first)),
            failed=lambda reason: self._post((sequence,), partial(self._fail, sequence, reason)),
        )
        kv_import.reserved(reservation)

    def forget(self, sequence: Sequence) -> None:
        """`sequence` ends: returns once nothing is written into its blocks any more."""
        if (reservation := self._reservations.pop(sequence, None)) is not None:
            reservation.close()

    def _complete(self, sequence: Sequence, first: RequestOutput) -> None:
        """All rows are there; `first` holds the token after the known ones."""
        if sequence.phase is not Phase.IMPORTING:
            return
        if len(first.token_ids) > 1 or any(token >= self._vocab_size for token in first.token_ids):
            self._fail(sequence, "the first output is none of this model")
            return
        inexact_from = first.prompt.inexact_from if first.prompt is not None else None
        if inexact_from is not None:  # what was here before is exact; what came was computed after rows that are not
            inexact_from = max(inexact_from, sequence.num_computed)
        del self._reservations[sequence]
        self._scheduler.join(sequence, TokenRanges.up_to(len(sequence.tokens)), inexact_from=inexact_from)
        self._scheduler.publish(sequence)
        start_index = sequence.num_output
        for token in first.token_ids:
            sequence.append(token)
        sequence.report, report = None, sequence.report
        self._joined(sequence, replace(first, key=sequence.key, start_index=start_index, prompt=first.prompt or report))

    def _fail(self, sequence: Sequence, reason: str) -> None:
        """The rows will not come: `sequence` computes them here."""
        if sequence.phase is not Phase.IMPORTING:
            return
        reservation = self._reservations.pop(sequence, None)
        if reservation is None:
            return
        logger.info("request %s computes its prompt here: %s", sequence.key, reason)
        if sequence.report is not None:
            sequence.report.recompute_reason = reason
            sequence.report.handover_s = time.monotonic() - reservation.made_at
        self._scheduler.join(sequence, TokenRanges.up_to(reservation.skip_tokens))
        self._failed(sequence)


def close(request: EngineRequest) -> None:
    """Tells the importer of `request`, if it has one, that it ended."""
    try:
        if request.kv_import is not None:
            request.kv_import.closed()
    except Exception:
        logger.exception("the importer of %s failed as it was told of the end", request.key)
