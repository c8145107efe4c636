"""What an engine does while its executor computes a step."""

from __future__ import annotations

import time
from collections.abc import Callable, Collection
from dataclasses import dataclass

from tandem.common.fairness import LAST_BAND
from tandem.engine.guided import Guided
from tandem.engine.handover.announcer import LayerAnnouncer
from tandem.engine.schedule.plan import StepPlan
from tandem.engine.schedule.sequence import Sequence
from tandem.engine.store.loading import Gate


@dataclass(slots=True)
class Pulse:
    """What the engine thread and others tell each other: single values, read and written without a lock."""

    moved: float | None = None
    """time.monotonic() when the engine thread last got on with its work; None while it waits for some."""
    hurry: bool = False
    """A request of an earlier band than the last has come since the inbox was last emptied."""
    stopping: bool = False


class EngineWatch:
    """The `StepWatch` of one step: layers are announced and waited for, masks awaited, and the last band's steps given
    up for those who come."""

    def __init__(
        self, plan: StepPlan, pulse: Pulse, guided: Guided, announcer: LayerAnnouncer, gate: Gate | None
    ) -> None:
        self.before_attention: Callable[[int], None] | None = gate
        self.void: Collection[Sequence] = gate.broken if gate is not None else ()
        self._pulse = pulse
        self._guided = guided
        self._announcer = announcer
        exports = announcer.exports
        self._yields = gate is None and all(
            each.priority == LAST_BAND and each not in exports for each in plan.sequences
        )

    def layer_done(self, layer: int) -> None:
        self._pulse.moved = time.monotonic()
        self._announcer(layer)

    def gives_up(self) -> bool:
        return self._yields and self._pulse.hurry

    def not_sampled(self, sequences: list[Sequence], step_s: float) -> list[Sequence]:
        return self._guided.not_ready(sequences, step_s)

    def is_final(self, sequence: Sequence) -> bool:
        return sequence in self._announcer.exports

    def goes_on(self) -> bool:
        return not self._pulse.stopping
