"""Announces each layer of a step to the exporters of its requests, while the step still computes the next layers."""

from __future__ import annotations

import logging

from tandem.engine.request import KvExport
from tandem.engine.scheduler import StepPlan
from tandem.engine.sequence import Sequence

logger = logging.getLogger(__name__)


class LayerAnnouncer:
    """The `on_layer` callback of one forward step. An exporter that raises is not called again, and harms nobody
    else."""

    def __init__(self, plan: StepPlan) -> None:
        self.broken: list[Sequence] = []
        """Whose exporter raised."""
        self._rows: list[tuple[Sequence, KvExport, int, int]] = []
        for chunk in plan.chunks:
            if (export := chunk.sequence.request.kv_export) is not None:
                start = chunk.sequence.num_computed
                self._rows.append((chunk.sequence, export, start, start + chunk.num_tokens))

    def __bool__(self) -> bool:
        return bool(self._rows)

    def __call__(self, layer: int) -> None:
        for sequence, export, start, stop in self._rows:
            if sequence in self.broken:
                continue
            try:
                export.layer_ready(layer, start, stop)
            except Exception:
                logger.exception("the export of %s failed at layer %d", sequence.key, layer)
                self.broken.append(sequence)
