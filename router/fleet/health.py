"""Which workers are left out because they are sick. Pure: the clock is passed in (s, monotonic).

Two judges, as in Envoy:

- the **circuit breaker** of each worker opens after `FAILURES_IN_A_ROW`. When its time is over one request at a time
  probes the worker; the first that is answered closes the circuit, one that fails opens it again, for twice as long;
- **outlier ejection** compares workers of one kind with each other: one with a far higher error rate, or a far longer
  time to first token, is left out for a while and comes back by itself. At most a third of them is out at a time.

A failure is a lost connection or an `internal` error; a refusal (draining, overloaded) is none. `computation_failed` is
a doubt: the request or the worker is at fault. The worker is where it befalls requests of `FAILURES_IN_A_ROW` tenants
and nobody is answered in between, so that no tenant's requests alone put a worker out. Whoever asks takes all workers
where none is available: a sick worker is better than none.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from statistics import median

FAILURES_IN_A_ROW = 3
FIRST_OUT_S = 5.0
LONGEST_OUT_S = 120.0
RECOVERED_S = 120.0
"""Time from a worker's return after which its next absence is short again."""
PROBE_S = 10.0
"""A probe that is not answered keeps the next one waiting no longer than this."""
HALF_LIFE_S = 30.0
"""Memory of answers and failures: half of it is gone after so long."""
LEAST_REQUESTS = 8.0
"""Nobody is an outlier by fewer requests (older ones count less)."""
ERROR_RATE = 0.2
ERROR_FACTOR = 3.0
"""An outlier fails at least this share of its requests, and so many times the share of the others."""
TTFT_FACTOR = 5.0
TTFT_EXCESS_S = 1.0
"""An outlier takes so many times as long as the median of the others, and so much longer."""
EJECTED_PART = 3
"""One in so many may be out, and one of two."""


@dataclass(slots=True, eq=False)
class WorkerHealth:
    """What is known of one worker: its circuit, and its recent answers (decayed sums)."""

    problem: str = ""
    """Why it is, or was last, left out."""
    _in_a_row: int = 0
    _out: bool = False
    """Not given requests until `_out_until`, and then only probes."""
    _out_until: float = 0.0
    _times_out: int = 0
    _probe_until: float = 0.0
    _counted_at: float = 0.0
    _doubted_by: set[str] = field(default_factory=set)
    """Tenants whose requests could not be computed since the last answer; fewer than FAILURES_IN_A_ROW."""
    _answers: float = 0.0
    _failures: float = 0.0
    _timed: float = 0.0
    _ttft_s: float = 0.0

    def available(self, now: float) -> bool:
        """Whether a request may be sent to it."""
        return not self._out or (now >= self._out_until and now >= self._probe_until)

    def started(self, now: float) -> None:
        """A request was sent to it."""
        if self._out:
            self._probe_until = now + PROBE_S

    def answered(self, now: float, ttft_s: float | None = None) -> None:
        """The first token has come; `ttft_s` where the time it took is this worker's own doing."""
        self._decay(now)
        self._answers += 1.0
        if ttft_s is not None:
            self._timed += 1.0
            self._ttft_s += ttft_s
        self._in_a_row = 0
        self._doubted_by.clear()
        if self._out and now >= self._out_until:
            self._out = False

    def failed(self, now: float) -> bool:
        """A request or the connection failed. Returns whether the worker is left out from now on because of it."""
        self._decay(now)
        self._failures += 1.0
        self._in_a_row += 1
        if self._out:
            if now >= self._out_until:
                self._leave_out(now, "it failed again")
            return False
        if self._in_a_row < FAILURES_IN_A_ROW:
            return False
        self._leave_out(now, f"{self._in_a_row} failures in a row")
        return True

    def doubted(self, now: float, tenant: str) -> bool:
        """A request of `tenant` could not be computed. Returns whether the worker is left out from now on because of
        it. A probe that ends so says nothing: the next one may come at once."""
        self._probe_until = 0.0
        if self._out and now < self._out_until:
            return False
        self._doubted_by.add(tenant)
        if len(self._doubted_by) < FAILURES_IN_A_ROW:
            return False
        was_out = self._out
        self._leave_out(now, f"requests of {FAILURES_IN_A_ROW} tenants, one after the other, could not be computed")
        return not was_out

    def _leave_out(self, now: float, problem: str) -> None:
        if now - self._out_until > RECOVERED_S:
            self._times_out = 0
        self._out, self.problem = True, problem
        self._out_until = now + min(FIRST_OUT_S * 2.0**self._times_out, LONGEST_OUT_S)
        self._times_out = min(self._times_out + 1, 16)
        self._probe_until = 0.0
        self._doubted_by.clear()
        self._answers = self._failures = self._timed = self._ttft_s = 0.0

    def _decay(self, now: float) -> None:
        kept = 0.5 ** (max(now - self._counted_at, 0.0) / HALF_LIFE_S)
        self._counted_at = now
        self._answers *= kept
        self._failures *= kept
        self._timed *= kept
        self._ttft_s *= kept


def eject_outliers(workers: Sequence[WorkerHealth], now: float) -> list[WorkerHealth]:
    """Leaves out those of `workers`, all of one kind, that are far worse than the others; returns them."""
    room = max(len(workers) // EJECTED_PART, 1 if len(workers) > 1 else 0)
    room -= sum(1 for worker in workers if worker._out)
    judged = [worker for worker in workers if not worker._out]
    for worker in judged:
        worker._decay(now)
    found = [(badness, index) for index, worker in enumerate(judged) if (badness := _badness(worker, judged))[0] > 0]
    ejected: list[WorkerHealth] = []
    for (_, problem), index in sorted(found, reverse=True)[: max(room, 0)]:
        judged[index]._leave_out(now, problem)
        ejected.append(judged[index])
    return ejected


def _badness(worker: WorkerHealth, judged: Sequence[WorkerHealth]) -> tuple[float, str]:
    """How many times worse than the others, and in what; 0 where it is no outlier."""
    others = [other for other in judged if other is not worker]
    requests = worker._answers + worker._failures
    rate = worker._failures / requests if requests >= LEAST_REQUESTS else 0.0
    of_others = sum(other._answers + other._failures for other in others)
    usual = sum(other._failures for other in others) / of_others if of_others >= LEAST_REQUESTS else 1.0
    if rate >= ERROR_RATE and rate >= ERROR_FACTOR * usual:
        return rate / max(usual, 1e-3), f"{rate:.0%} of its requests failed, {usual:.0%} of the others'"
    times = [other._ttft_s / other._timed for other in others if other._timed >= LEAST_REQUESTS]
    if worker._timed >= LEAST_REQUESTS and times:
        own, usual = worker._ttft_s / worker._timed, median(times)
        if own >= TTFT_FACTOR * usual and own >= usual + TTFT_EXCESS_S:
            return own / max(usual, 1e-3), f"first tokens after {own:.2g} s, the others' after {usual:.2g} s"
    return 0.0, ""
