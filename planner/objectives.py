"""What a deployment promises (its SLO) and what is asked of it: the planner's two inputs beside the hardware."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Protocol

from tandem.common.errors import ConfigError
from tandem.planner.lengths import Lengths


@dataclass(frozen=True, slots=True)
class Slo:
    """Goals that `percentile` percent of the requests meet. Infinite: no goal."""

    ttft_s: float = math.inf
    tpot_s: float = math.inf
    percentile: float = 95.0

    def __post_init__(self) -> None:
        """Raises ConfigError for goals that nothing could meet."""
        for name, value in (("ttft", self.ttft_s), ("tpot", self.tpot_s)):
            if not value > 0:
                raise ConfigError(f"slo.{name}: {value} is not a time; it must be more than 0 seconds")
        if not 1 <= self.percentile <= 99.99:
            raise ConfigError(f"slo.percentile: {self.percentile} must be between 1 and 99.99")


@dataclass(frozen=True, slots=True)
class Demand:
    """Traffic to plan for."""

    requests_per_s: float = 0.0
    prompt_tokens: Lengths = field(default_factory=Lengths)
    output_tokens: Lengths = field(default_factory=Lengths)
    cached_share: float = 0.0
    """Share of the prompt tokens whose KV is found in a cache."""
    burstiness: float = 1.0
    """Squared coefficient of variation of the times between arrivals: 1 for Poisson."""

    def __post_init__(self) -> None:
        """Raises ConfigError: the field that makes no sense."""
        if not 0 <= self.requests_per_s < math.inf:
            raise ConfigError(f"demand.requestsPerSecond: {self.requests_per_s} must be finite and not negative")
        if not 0 <= self.cached_share <= 1:
            raise ConfigError(f"demand.cachedShare: {self.cached_share} must be between 0 and 1")
        if not 0 <= self.burstiness < math.inf:
            raise ConfigError(f"demand.burstiness: {self.burstiness} must be finite and not negative")
        if self.requests_per_s > 0 and not (self.prompt_tokens.points and self.output_tokens.points):
            raise ConfigError("demand: has a rate, but no prompt or output lengths")


class Replica(Protocol):
    """How fast one replica of a pool is: what the planner asks of a `planner.performance.Performance`."""

    def prefill_s(self, uncached_tokens: float, context_tokens: float = 0.0) -> float:
        """Seconds to compute a prompt's uncached tokens behind `context_tokens` whose KV is there, alone and in one
        step."""

    def decode_step_s(self, batch: float, kv_tokens: float) -> float:
        """Seconds of a step that gives `batch` requests a token each and reads `kv_tokens` of KV in all."""

    def transfer_s(self, link: str, tokens: float) -> float:
        """Seconds to move the KV of `tokens` over a link: handover, host, disk, peer or remote; infinite over any
        other."""

    @property
    def kv_tokens(self) -> float:
        """Tokens of KV that its memory holds; 0 where the weights do not fit."""
