"""Who it is that makes a step raise.

A step can be repeated until its result is taken: it has written KV that is written again, and nothing else.
"""

from __future__ import annotations

import logging
from collections.abc import Callable

from tandem.common.errors import TandemError
from tandem.engine.schedule.plan import StepPlan
from tandem.engine.schedule.sequence import Sequence
from tandem.engine.step.executor import StepResult, StepWatch

logger = logging.getLogger(__name__)


def compute_in_parts(plan: StepPlan, compute: Callable[[StepPlan], StepResult], watch: StepWatch) -> StepResult:
    """Computes `plan`, which has raised, in halves, and in halves of those that raise: fewer than twice as many steps
    as there are sequences. One alone has a second chance: what raised may have been a passing lack of memory."""
    result = StepResult(StepPlan())
    final = [sequence for sequence in plan.sequences if watch.is_final(sequence)]
    result.failed += [(each, TandemError("unavailable", "the step that computed the prompt failed")) for each in final]
    plan.drop(final)
    raised: list[tuple[Sequence, Exception]] = []
    any_computed = False
    left = _smaller(plan) if len(plan.sequences) > 1 else [plan]
    while left and watch.goes_on():
        part = left.pop()
        try:
            computed = compute(part)
        except Exception as error:
            if len(part.sequences) > 1:
                left += _smaller(part)
            elif part.sequences:
                raised.append((part.sequences[0], error))
        else:
            result.add(computed)
            any_computed = True
    # Where nothing could be computed it may as well be this worker that fails: others can try.
    code = "computation_failed" if any_computed else "internal"
    for sequence, reason in raised:
        logger.error("request %s failed alone", sequence.key, exc_info=reason)
        result.failed.append((sequence, failure(reason, code)))
    return result


def failure(error: Exception, code: str = "computation_failed") -> TandemError:
    """What the request that made `error` is told."""
    return TandemError(code, f"computing the request failed ({type(error).__name__})")


def _smaller(plan: StepPlan) -> list[StepPlan]:
    """Halves; the last one is the first to compute."""
    first, second = plan.halves()
    return [second, first]
