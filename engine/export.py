"""Announces each layer of a step to the exporters of its requests, while the step still computes the next layers."""

from __future__ import annotations

import logging
from collections.abc import Container

from tandem.engine.request import KvExport
from tandem.engine.schedule.plan import StepPlan
from tandem.engine.schedule.sequence import Sequence

logger = logging.getLogger(__name__)


class LayerAnnouncer:
    """The `on_layer` callback of one forward step. An exporter that raises is not called again, and harms nobody
    else."""

    def __init__(self, plan: StepPlan, late: Container[Sequence] = ()) -> None:
        """`late`: sequences that turn out, while the step runs, to have come too early (`store/loading.py`)."""
        self.broken: list[Sequence] = []
        """Whose exporter raised."""
        self._late = late
        self._rows: list[tuple[Sequence, KvExport, int, int]] = []
        for chunk in plan.chunks:
            if (export := chunk.sequence.request.kv_export) is not None:
                sequence, start = chunk.sequence, chunk.sequence.num_computed
                stop = sequence.ahead.first_gap(chunk.end)
                if sequence.gated and sequence.announced is not None:
                    start = sequence.announced  # rows that come from the store while the step runs
                self._rows.append((sequence, export, start, stop))

    def __call__(self, layer: int) -> None:
        for sequence, export, start, stop in self._rows:
            if sequence in self.broken or sequence in self._late:
                continue
            try:
                export.layer_ready(layer, start, stop)
            except Exception:
                logger.exception("the export of %s failed at layer %d", sequence.key, layer)
                self.broken.append(sequence)
