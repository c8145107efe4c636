"""Announces each layer of a step to the exporters of its requests, while the step still computes the next layers."""

from __future__ import annotations

from collections.abc import Container, Mapping
from dataclasses import dataclass

from tandem.engine.request import KvExport
from tandem.engine.schedule.plan import StepPlan
from tandem.engine.schedule.sequence import Sequence


@dataclass(slots=True)
class Export:
    """One sequence whose KV goes to another worker."""

    target: KvExport
    announced: int | None = None
    """Leading tokens that the exporter knows to be there in all layers; set by the first announcement and by those of
    loaded tokens. None: it has not begun and reads no block."""


class LayerAnnouncer:
    """The `on_layer` callback of one forward step. An exporter that raises is not called again, and harms nobody
    else."""

    def __init__(self, plan: StepPlan, exports: Mapping[Sequence, Export], late: Container[Sequence] = ()) -> None:
        """`exports` of sequences that have begun. `late`: sequences that turn out, while the step runs, to have come
        too early (`store/loading.py`)."""
        self.exports = exports
        self.broken: dict[Sequence, Exception] = {}
        """Whose exporter raised, and what."""
        self._late = late
        self._rows: list[tuple[Sequence, KvExport, int, int]] = []
        if exports:
            for sequence in plan.decodes:
                self._add(sequence, sequence.num_computed + 1)
            for chunk in plan.chunks:
                self._add(chunk.sequence, chunk.sequence.ahead.first_gap(chunk.end))

    def _add(self, sequence: Sequence, stop: int) -> None:
        """The KV of all tokens of `sequence` below `stop` will be there after this step."""
        if (export := self.exports.get(sequence)) is not None:
            start = sequence.num_computed
            if sequence.gated and export.announced is not None:
                start = export.announced  # rows that come from the store while the step runs
            self._rows.append((sequence, export.target, start, stop))

    def __call__(self, layer: int) -> None:
        for sequence, export, start, stop in self._rows:
            if sequence in self.broken or sequence in self._late:
                continue
            try:
                export.layer_ready(layer, start, stop)
            except Exception as error:
                self.broken[sequence] = error
