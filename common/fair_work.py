"""Threads that tenants share: whose work took the least time so far is next, and each waits in a line of its own.

What one tenant sends, however much, takes places only from itself: another's work starts when the next piece of work
ends. So pieces have to be short, or a tenant's `share` of the places smaller than all. `common/fairness.py` says whose
turn it is, in seconds per weight.
"""

from __future__ import annotations

import asyncio
import threading
import time
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass, field
from functools import partial
from typing import Any, TypeVar

from tandem.common.errors import TandemError
from tandem.common.fair_queue import FairQueue
from tandem.common.fairness import ServiceCounters

EXPECTED_S = 0.005
"""Charged when work starts, until it is known how long it took: two that start together must see each other."""
_BAND = 0

T = TypeVar("T")


class _Job(Future[Any]):
    def __init__(self, owner: FairWork, tenant: str, weight: float, work: Callable[[], Any]) -> None:
        super().__init__()
        self.owner = owner
        self.tenant = tenant
        self.weight = weight
        self.work: Callable[[], Any] | None = work

    def cancel(self) -> bool:
        """Cancels the job and takes it from its owner's line, so that it counts against no share. False: it runs or has
        ended."""
        cancelled = super().cancel()
        if cancelled:
            self.owner.forget(self)
        return cancelled


@dataclass(slots=True)
class _Tenant:
    waiting: int = 0
    """Jobs that have not started."""
    entered: int = 0
    """Jobs in the queue or running: at most its share."""
    later: deque[_Job] = field(default_factory=deque)
    """Jobs that enter the queue when earlier ones have ended."""


class FairWork:
    """Runs functions in `places` threads, which are started when they are needed. For any thread or event loop."""

    def __init__(
        self,
        name: str,
        places: int,
        *,
        max_waiting: int,
        share: int | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """`max_waiting`: of one tenant; more are refused. `share`: places that one tenant may take; None: all."""
        self._name = name
        self._places = places
        self._max_waiting = max_waiting
        self._share = places if share is None else share
        self._clock = clock
        self._counters = ServiceCounters()
        self._queue: FairQueue[_Job] = FairQueue(self._counters)
        self._tenants: dict[str, _Tenant] = {}
        self._changed = threading.Condition()
        self._threads = 0
        self._idle = 0
        self._closed = False

    async def run(self, tenant: str, weight: float, function: Callable[..., T], *args: Any) -> T:
        """The result of `function(*args)`. Cancelled before its turn, it never runs. Raises TandemError `overloaded`,
        and what the function raises."""
        return await asyncio.wrap_future(self.submit(tenant, weight, function, *args))

    def submit(self, tenant: str, weight: float, function: Callable[..., T], *args: Any) -> Future[T]:
        """Raises TandemError `overloaded` where too much work of this tenant waits."""
        job = _Job(self, tenant, weight, partial(function, *args))
        with self._changed:
            if self._closed:
                raise TandemError("unavailable", "this process ends", retry_after_s=1.0)
            mine = self._tenants.setdefault(tenant, _Tenant())
            if mine.waiting >= self._max_waiting:
                problem = f"{mine.waiting} pieces of work of tenant `{tenant}` wait already ({self._name})"
                raise TandemError("overloaded", f"{problem}; try again shortly", retry_after_s=1.0)
            mine.waiting += 1
            if mine.entered < self._share:
                self._enter(job, mine)
            else:
                mine.later.append(job)
        return job

    def forget(self, job: _Job) -> None:
        """A job that was cancelled before it started."""
        with self._changed:
            mine = self._tenants.get(job.tenant)
            if mine is None:
                return
            if self._queue.remove(job, job.tenant, _BAND):
                mine.waiting -= 1
                self._leave(job.tenant, mine)
            elif job in mine.later:
                mine.waiting -= 1
                mine.later.remove(job)

    def waiting(self, tenant: str) -> int:
        """Work of a tenant that has not started."""
        mine = self._tenants.get(tenant)
        return 0 if mine is None else mine.waiting

    def close(self) -> None:
        """Lets running work end; what waits is cancelled. Idempotent."""
        with self._changed:
            self._closed = True
            waiting = [job for tenant in self._tenants for job in self._queue.line(tenant, _BAND)]
            waiting += [job for mine in self._tenants.values() for job in mine.later]
            self._changed.notify_all()
        for job in waiting:
            job.cancel()

    def _enter(self, job: _Job, mine: _Tenant) -> None:
        mine.entered += 1
        self._queue.push(job, job.tenant, _BAND)
        if self._idle >= len(self._queue):
            self._changed.notify()
        elif self._threads < self._places:
            threading.Thread(target=self._work, name=f"{self._name}-{self._threads}", daemon=True).start()
            self._threads += 1

    def _leave(self, tenant: str, mine: _Tenant) -> None:
        """One of its jobs is no longer in the queue or running."""
        mine.entered -= 1
        if mine.later:
            self._enter(mine.later.popleft(), mine)
        elif not mine.entered:
            del self._tenants[tenant]

    def _work(self) -> None:
        while (job := self._next()) is not None:
            started = self._clock()
            result, error = _outcome(job)
            with self._changed:
                took_s = self._clock() - started
                self._counters.charge(job.tenant, _BAND, took_s - EXPECTED_S, job.weight)
                self._leave(job.tenant, self._tenants[job.tenant])
            if error is not None:
                job.set_exception(error)
            elif not job.cancelled():
                job.set_result(result)
            del job, result, error  # before the next one is waited for: they may hold megabytes

    def _next(self) -> _Job | None:
        with self._changed:
            while (job := self._queue.pop()) is None:
                if self._closed:
                    return None
                self._idle += 1
                self._changed.wait()
                self._idle -= 1
            self._counters.charge(job.tenant, _BAND, EXPECTED_S, job.weight)
            self._tenants[job.tenant].waiting -= 1
            return job


def _outcome(job: _Job) -> tuple[Any, BaseException | None]:
    work, job.work = job.work, None
    if not job.set_running_or_notify_cancel():
        return None, None
    assert work is not None
    try:
        return work(), None
    except BaseException as error:  # it belongs to whoever waits for the work
        return None, error
