"""What an engine says about itself: for placement, metrics and people."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from tandem.engine.schedule.scheduler import Scheduler

_DECAY = 0.9


@dataclass(frozen=True, slots=True)
class EngineStatus:
    """The load of an engine at one moment."""

    running: int
    """Requests with KV blocks: computed, waiting for an import, or kept for a hand-over."""
    waiting: int
    free_blocks: int
    """Free, or cached and evictable."""
    total_blocks: int
    pending_prefill_tokens: int
    """Prompt tokens to be computed here."""
    prefill_tokens_per_s: float
    """Measured over recent steps; 0 before any."""
    decode_step_s: float
    """Seconds of a recent decode step; 0 before any."""
    decoding: int
    """Requests that take one token per step."""
    running_tokens: int
    """Tokens whose KV those read in every step."""
    by_band: Mapping[int, int] = field(default_factory=dict)
    """Running and waiting requests by priority."""

    @classmethod
    def of(cls, scheduler: Scheduler, meter: StepMeter) -> EngineStatus:
        """The status right now; from any thread."""
        decoding, running_tokens = scheduler.decode_load()
        return cls(
            running=scheduler.num_running,
            waiting=scheduler.num_waiting,
            free_blocks=scheduler.blocks.available_blocks,
            total_blocks=scheduler.blocks.usable_blocks,
            pending_prefill_tokens=scheduler.pending_prefill_tokens,
            prefill_tokens_per_s=meter.prefill_tokens_per_s,
            decode_step_s=meter.decode_step_s,
            decoding=decoding,
            running_tokens=running_tokens,
            by_band=scheduler.by_band(),
        )


class StepMeter:
    """Speeds over recent steps, decayed exponentially. Written by the engine thread, readable from any."""

    def __init__(self) -> None:
        self.decode_step_s = 0.0
        self._prefill_tokens = 0.0
        self._prefill_s = 0.0

    @property
    def prefill_tokens_per_s(self) -> float:
        seconds = self._prefill_s
        return self._prefill_tokens / seconds if seconds > 0 else 0.0

    def add(self, decodes: int, prefill_tokens: int, seconds: float) -> None:
        """A step took `seconds`. Of a mixed step, what a decode step usually takes is not counted as prefill."""
        if prefill_tokens:
            if decodes:
                seconds -= min(self.decode_step_s, seconds / 2)
            self._prefill_tokens = self._prefill_tokens * _DECAY + prefill_tokens
            self._prefill_s = self._prefill_s * _DECAY + seconds
        elif decodes:
            previous = self.decode_step_s or seconds
            self.decode_step_s = previous * _DECAY + seconds * (1 - _DECAY)
