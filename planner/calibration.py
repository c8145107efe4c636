"""Efficiencies of a roofline, found from measured times.

Few parameters, each within bounds, by the sum of the rows' errors |log(predicted / measured)|: an outlier moves that
sum little, and 20 ms of 10 count as much as 2 s of 1. The search goes along one parameter after the other, by steps
that are halved when none of them helps. It is deterministic.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace

from tandem.planner.roofline import Efficiency

BOUNDS: Mapping[str, tuple[float, float]] = {
    "compute": (0.02, 1.0),
    "memory": (0.02, 1.0),
    "link": (0.02, 1.0),
    "step_s": (1e-5, 0.2),
    "layer_s": (1e-7, 1e-2),
    "reduce_s": (1e-7, 1e-3),
    "request_s": (1e-7, 1e-2),
}
_FIRST_STEP, _LAST_STEP = 0.7, 0.01
_MAX_SWEEPS = 200

Predict = Callable[[Efficiency], float]


def calibrate(
    rows: Sequence[tuple[Predict, float]],
    start: Efficiency | None = None,
    parameters: Sequence[str] = tuple(BOUNDS),
) -> Efficiency:
    """The efficiencies under which the rows' predictions are nearest to what was measured.

    Args:
        rows: how a time is predicted, and the measured time. Times that are not positive and finite are left out.
        start: where the search begins, and the values of those that are not searched.
        parameters: those that are searched. What the rows say nothing of stays as it is.
    """
    kept = [(predict, math.log(seconds)) for predict, seconds in rows if 0.0 < seconds < math.inf]
    best = start or Efficiency()
    if not kept:
        return best

    def loss(efficiency: Efficiency) -> float:
        return sum(abs(math.log(predict(efficiency)) - measured) for predict, measured in kept)

    least, step = loss(best), _FIRST_STEP
    for _ in range(_MAX_SWEEPS):
        before = least
        for name in parameters:
            for factor in (math.exp(step), math.exp(-step)):
                low, high = BOUNDS[name]
                value = min(max(getattr(best, name), low) * factor, high)
                moved = replace(best, **{name: max(value, low)})
                error = loss(moved)
                if error < least * (1.0 - 1e-6):
                    best, least = moved, error
                    break
        if least >= before * (1.0 - 1e-4):
            step /= 2.0
            if step < _LAST_STEP:
                break
    return best
