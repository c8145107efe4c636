"""What a deployment has promised, and by how much a placement would miss it. Pure.

A request misses a target by the share that its estimate lies above it: 0 where the target is met, 1 where it takes
twice as long. What counts is the sum over everybody concerned: the request itself, and those that already decode
where it goes. Estimates are of the percentile that the deployment named, not means.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from statistics import NormalDist

from tandem.router.fleet.load import WorkerLoad
from tandem.router.settings import FrontDoorSettings

SPREAD = 0.3
"""Standard deviation of a first token's estimate, as a share of it: answers before it end early or late."""


@dataclass(frozen=True, slots=True)
class Targets:
    """Seconds; infinite where nothing was promised."""

    ttft_s: float = math.inf
    tpot_s: float = math.inf
    """Mean time of an answer's tokens after its first."""
    gap_s: float = math.inf
    """Between two tokens of an answer."""
    percentile: float = 95.0
    """Share, in percent, of requests that shall meet them, and of an answer's gaps."""

    @classmethod
    def stated(cls, config: FrontDoorSettings) -> Targets | None:
        """Those of a configuration; None where it states none."""
        seconds = (config.target_ttft_s, config.target_tpot_s, config.target_gap_s)
        if all(target is None for target in seconds):
            return None
        ttft_s, tpot_s, gap_s = (math.inf if target is None else target for target in seconds)
        return cls(ttft_s, tpot_s, gap_s, config.target_percentile)

    @property
    def deviations(self) -> float:
        """Standard deviations of a normal distribution, from the mean to the percentile."""
        return NormalDist().inv_cdf(self.percentile / 100.0)


@dataclass(frozen=True, slots=True)
class Aim:
    """What every way for one request is measured by."""

    targets: Targets
    output_tokens: int
    """Length of an average answer."""
    handover_wait_s: float
    """Until a prefill worker has computed what waits there: meanwhile it goes on handing over requests."""
    now: float


@dataclass(frozen=True, slots=True)
class Change:
    """What one placement does to a decode worker."""

    load: WorkerLoad
    stall_s: float
    """The prompt holds up each request that decodes there; 0 where it is computed elsewhere."""
    step_before_s: float
    step_after_s: float
    """One token for each request there, with this one."""


def missed(aim: Aim, ttft_s: float, change: Change) -> float:
    """How much the targets are missed with this placement, more than without it; of all requests together."""
    targets, load, now = aim.targets, change.load, aim.now
    steps = max(aim.output_tokens - 1, 1)
    # Those whose prompt a prefill worker finishes meanwhile are held up like those who decode already.
    share_arriving = ttft_s / aim.handover_wait_s if aim.handover_wait_s > ttft_s else 1.0
    others = load.decoding + load.foreign_decoding + load.handed_over * share_arriving
    life_s = steps * change.step_after_s
    total = _over(ttft_s * (1.0 + targets.deviations * SPREAD), targets.ttft_s)
    if targets.tpot_s < math.inf:
        before_s, after_s = (
            load.stalls.total_s(now, life_s, more, targets.deviations) for more in (0.0, change.stall_s)
        )
        own = _over(change.step_after_s + before_s / steps, targets.tpot_s)
        theirs = _over(change.step_after_s + after_s / steps, targets.tpot_s)
        total += own + others * (theirs - _over(change.step_before_s + before_s / steps, targets.tpot_s))
    if targets.gap_s < math.inf:
        late = load.stalls.count_in(now, life_s) + 1.0
        counts = change.stall_s if late > (1.0 - targets.percentile / 100.0) * steps else 0.0
        total += _over(change.step_after_s, targets.gap_s)
        total += others * (
            _over(change.step_after_s + counts, targets.gap_s) - _over(change.step_before_s, targets.gap_s)
        )
    return total


def _over(estimate_s: float, target_s: float) -> float:
    return max(0.0, estimate_s / target_s - 1.0)
