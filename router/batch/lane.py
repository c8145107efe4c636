"""The batch lane: which process runs batches, and when a line may start.

Of all router processes that share the storage one holds the lock and runs what is there; the others serve files and
batches, and take over when it ends. A line starts only while the workers have slots to spare that clients do not want.
"""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import logging
import os
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from prometheus_client import Counter, Gauge

from tandem.common.errors import TandemError
from tandem.router.batch.exchange import batch_caller
from tandem.router.batch.files import Storage
from tandem.router.batch.records import KEPT_S, BatchRecord
from tandem.router.batch.run import BatchRun, Host, Outcome
from tandem.router.batch.store import Index
from tandem.router.service import Service
from tandem.router.tenants.caller import Caller

log = logging.getLogger(__name__)

MAX_ACTIVE = 8
"""Batches that run at once, one of each tenant; the others wait for their turn."""
MAX_RUNNING = 256
"""Lines in flight in this process, and never more than half of `max_requests`."""
SLOT_SHARE = 0.75
"""Share of the workers' decode slots and KV blocks that batches may use; the rest is for clients who come meanwhile."""
POLL_S = 1.0
"""How often the index is looked at for new, cancelled and expired batches, and the lock is tried."""
TICK_S = 0.02
"""How often a line that may not start now asks again."""
SWEEP_S = 600.0


class BatchLane:
    """`start` on the event loop, `stop` before the fleet stops."""

    def __init__(
        self,
        folder: Path,
        service: Service,
        *,
        caller_of: Callable[[str], Caller | None],
        room: Callable[[int], bool] = lambda tokens: True,
    ) -> None:
        """`caller_of`: a tenant by name, None for one that is no more. `room`: whether a
        prompt of so many tokens could start without any client waiting.

        Raises ConfigError where the folder cannot be used.
        """
        self.storage = Storage(folder)
        self._service = service
        self._caller_of = caller_of
        self._room = room
        self._runs: dict[str, BatchRun] = {}
        """Runs by id of the batch; the first is the next one to start a line."""
        self._tasks: dict[str, asyncio.Task[None]] = {}
        self._main: asyncio.Task[None] | None = None
        self._changed = asyncio.Event()
        self._swept = 0.0
        self._polled = 0.0
        registry = service.metrics.registry
        self._lines = Counter(
            "tandem_router_batch_requests", "Requests of batches with a result", ["result"], registry=registry
        )
        Gauge("tandem_router_batch_requests_running", "Requests of batches in flight", registry=registry).set_function(
            lambda: sum(run.running for run in self._runs.values())
        )

    def start(self) -> None:
        self._main = asyncio.create_task(self._hold(), name="batch lane")

    async def stop(self) -> None:
        """Lines in flight are dropped; whoever runs their batch next runs them again. Idempotent."""
        if self._main is not None:
            self._main.cancel()
            await asyncio.gather(self._main, return_exceptions=True)
        await self.storage.close()

    def wake(self) -> None:
        """A batch is new or was cancelled."""
        self._polled = 0.0
        self._changed.set()

    async def _hold(self) -> None:
        """Works while this process holds the lock."""
        descriptor = os.open(self.storage.folder / "lane.lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            while not _locked(descriptor):  # noqa: ASYNC110 - the other end is another process
                await asyncio.sleep(POLL_S)
            await self._work()
        finally:
            await self._drop_all()
            os.close(descriptor)

    async def _work(self) -> None:
        while True:
            try:
                if time.monotonic() >= self._polled + POLL_S:
                    self._polled = time.monotonic()
                    await self._look()
                self._changed.clear()
                waiting = self._start_lines()
            except Exception as error:
                waiting = False
                log.error("the batch lane goes on in %g s: %s", POLL_S, error, exc_info=not _expected(error))
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._changed.wait(), TICK_S if waiting else POLL_S)

    async def _look(self) -> None:
        now = time.time()
        self._reap()
        for record in await self.storage.call(Index.unfinished):
            run = self._runs.get(record.id)
            early: Outcome | None = None
            if record.status == "cancelling":
                early = "cancelled"
            elif record.expires_at <= now:
                early = "expired"
            if run is None and (early or self._may_begin(record)):
                run = self._begin(record)
            if run is None:
                continue
            if early is not None:
                run.end(early)
            elif run.counts != record.counts:
                await self._note_counts(run)
        if time.monotonic() >= self._swept + SWEEP_S:
            self._swept = time.monotonic()
            await self.storage.sweep(kept_s=KEPT_S)

    def _may_begin(self, record: BatchRecord) -> bool:
        active = {run.record.tenant for run in self._runs.values()}
        return len(active) < MAX_ACTIVE and record.tenant not in active

    def _begin(self, record: BatchRecord) -> BatchRun:
        caller = self._caller_of(record.tenant)
        host = Host(self.storage, self._service, self._changed.set, lambda result: self._lines.labels(result).inc())
        run = BatchRun(record, None if caller is None else batch_caller(caller), host)
        self._runs[record.id] = run
        task = asyncio.create_task(run.run(), name=record.id)
        self._tasks[record.id] = task
        task.add_done_callback(lambda _: self.wake())
        return run

    def _reap(self) -> None:
        """Forgets batches that have ended. One that failed with the storage is found again, and begins anew."""
        for batch_id in [batch_id for batch_id, task in self._tasks.items() if task.done()]:
            error = self._tasks.pop(batch_id).exception()
            del self._runs[batch_id]
            if error is not None:
                log.error("%s begins again: %s", batch_id, error, exc_info=None if _expected(error) else error)

    async def _note_counts(self, run: BatchRun) -> None:
        counts = run.counts
        await self.storage.call(
            lambda index: index.update(
                run.record.id, lambda record: replace(record, counts=counts) if record.unfinished else record
            )
        )

    def _start_lines(self) -> bool:
        """Starts what may start, the batches in turn. Whether something is left that could start soon."""
        for run in self._runs.values():
            run.note_prompts()
        while True:
            able = ((run, tokens) for run in self._runs.values() if (tokens := run.next_tokens()) is not None)
            first, tokens = next(able, (None, 0))
            if first is None:
                return any(run.running for run in self._runs.values())
            if not self._spare() or not self._room(tokens):
                return True
            first.launch()
            self._runs[first.record.id] = self._runs.pop(first.record.id)  # the others are next

    def _spare(self) -> bool:
        service, runs = self._service, self._runs.values()
        running = sum(run.running for run in runs)
        if service.draining or running >= min(MAX_RUNNING, service.config.max_requests // 2):
            return False
        decode = service.batch_workers
        busy = sum(session.requests for session in decode) + service.admission.waiting_requests
        busy += sum(run.opening for run in runs)
        busy += service.admission.waiting_requests  # lines, too, that a worker has no room for yet
        slots = sum(session.info.max_num_seqs for session in decode)
        free = sum(session.status.free_blocks for session in decode)
        blocks = sum(session.status.total_blocks for session in decode)
        return busy < SLOT_SHARE * slots and free >= (1 - SLOT_SHARE) * blocks

    async def _drop_all(self) -> None:
        for task in self._tasks.values():
            task.cancel()
        await asyncio.gather(*self._tasks.values(), return_exceptions=True)
        self._tasks.clear()
        self._runs.clear()


def _locked(descriptor: int) -> bool:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        return False
    return True


def _expected(error: BaseException) -> bool:
    return isinstance(error, TandemError)
