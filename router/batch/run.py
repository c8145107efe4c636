"""One batch while it runs: reads its lines, orders them, runs each when the lane says so, and ends it."""

from __future__ import annotations

import asyncio
import logging
import random
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import BinaryIO, Literal

from tandem.common.errors import TandemError
from tandem.router.batch.exchange import BATCH_ENDPOINTS, Answer, LineExchange
from tandem.router.batch.files import Storage, broken
from tandem.router.batch.lines import (
    Line,
    Results,
    answered_line,
    read_lines,
    request_json,
    unanswered_line,
)
from tandem.router.batch.order import Item, LineOrder
from tandem.router.batch.records import BatchError, BatchRecord, Counts, FileRecord
from tandem.router.batch.store import Index
from tandem.router.calls.generate import Call
from tandem.router.service import Service
from tandem.router.tenants.caller import Caller

log = logging.getLogger(__name__)

Outcome = Literal["completed", "failed", "cancelled", "expired"]

MAX_ATTEMPTS = 3
"""Attempts of a line whose worker was lost, or which took too long."""
PATIENT_CODES = frozenset({"overloaded", "unavailable", "rate_limit_exceeded"})
"""Not the line's fault: it is tried again until the batch expires."""
COUNTED_CODES = frozenset({"worker_lost", "deadline_exceeded"})
MAX_PAUSE_S = 30.0
PLANNING_SHARE = 0.25
"""Share of the event loop's time that goes at most to looking at lines; the rest is for clients."""

_REASONS: dict[Outcome, str] = {
    "cancelled": "the batch was cancelled before this request had an answer",
    "expired": "the batch expired before this request had an answer",
    "failed": "the batch failed before this request had an answer",
}


@dataclass(frozen=True, slots=True)
class Host:
    """What a batch needs from the lane."""

    storage: Storage
    service: Service
    wake: Callable[[], None]
    """Something has changed: there may be a line to start."""
    ended: Callable[[str], None]
    """A line has its result: `completed` or `failed`."""


class BatchRun:
    """`run` in a task; `note_prompts`, `next_tokens` and `launch` from the lane."""

    def __init__(self, record: BatchRecord, caller: Caller | None, host: Host) -> None:
        """`caller` None: the tenant is no more."""
        self.record = record
        self.running = 0
        """Lines in flight."""
        self._caller = caller
        self._host = host
        self._results: Results | None = None
        self._input: BinaryIO | None = None
        self._lines: list[Line] = []
        self._prompt_tokens: list[int] = []
        self._errors: list[BatchError] = []
        self._order: LineOrder | None = None
        self._left = 0
        """Lines without a result."""
        self._attempts: dict[int, int] = {}
        self._pause_until = 0.0
        self._troubles = 0
        """Since the last good answer."""
        self._calls: dict[int, Call] = {}
        self._tasks: set[asyncio.Task[None]] = set()
        self._outcome: Outcome = "completed"
        self._over = asyncio.Event()

    @property
    def opening(self) -> int:
        """Lines in flight that no worker counts yet."""
        return self.running - len(self._calls)

    @property
    def counts(self) -> Counts:
        return self._results.counts(len(self._lines)) if self._results is not None else self.record.counts

    async def run(self) -> None:
        """Until the batch has ended. Raises TandemError where the storage fails: run it again later, as a new one."""
        try:
            await self._open()
            if not self._over.is_set():
                await self._put_in_order()
            await self._over.wait()
            await self._stop_lines()
            await self._finish()
        finally:
            await self._stop_lines()
            if self._results is not None:
                self._results.close()
            if self._input is not None:
                self._input.close()

    def end(self, outcome: Outcome) -> None:
        """Ends it early."""
        if not self._over.is_set():
            self._outcome = outcome
            self._over.set()

    def next_tokens(self) -> int | None:
        """Prompt tokens of the line that would start now; None: there is none."""
        if self._order is None or self._over.is_set() or time.monotonic() < self._pause_until:
            return None
        index = self._order.peek()
        return None if index is None else self._prompt_tokens[index]

    def launch(self) -> None:
        """Starts the line that `next_tokens` has told of."""
        index = self._order.next() if self._order is not None else None
        assert index is not None
        self.running += 1
        task = asyncio.create_task(self._line(index), name=f"{self.record.id} line {index}")
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    def note_prompts(self) -> None:
        """Frees lines that wait for another one's prompt: a first token says that its KV is there."""
        for index, call in self._calls.items():
            if self._order is not None and self._order.awaited(index) and call.choices[0].num_tokens:
                self._order.computed(index)

    # The beginning

    async def _open(self) -> None:
        record, storage = self.record, self._host.storage
        paths = storage.path(record.output_name), storage.path(record.error_name)
        self._results = await storage.call(lambda _: Results(*paths))
        limit = self._host.service.config.max_body_bytes
        try:
            self._input = await asyncio.to_thread(storage.path(record.input_file_id).open, "rb")
            self._lines, self._errors = await asyncio.to_thread(read_lines, self._input, record.endpoint, limit)
        except FileNotFoundError:
            self._errors = [BatchError("file_not_found", "the input file is gone", param="input_file_id")]
        except OSError as error:
            raise broken(error) from error
        if self._caller is None and not self._errors:
            self._errors = [BatchError("permission_denied", f"there is no tenant `{record.tenant}` any more")]
        if record.endpoint not in BATCH_ENDPOINTS:
            self._errors = [BatchError("invalid_endpoint", f"{record.endpoint} is not served", param="endpoint")]
        if self._errors:
            self.end("failed")
            self._lines = self._lines if self._caller is None else []

    async def _put_in_order(self) -> None:
        """Looks at every line that has no result, and says which is next."""
        assert self._results is not None
        done = self._results.done
        self._lines.sort(key=lambda line: line.custom_id in done)
        self._left = sum(line.custom_id not in done for line in self._lines)
        items: list[Item] = []
        for index in range(self._left):
            started = time.monotonic()
            items.append(await self._exchange(index).look_at())
            await asyncio.sleep((time.monotonic() - started) * (1 / PLANNING_SHARE - 1))
            if self._over.is_set():
                return
        self._prompt_tokens = [item.prompt_tokens for item in items]
        order = await asyncio.to_thread(LineOrder, items)

        def begun(record: BatchRecord) -> BatchRecord:
            if record.status != "validating":
                return record
            return replace(record, status="in_progress", in_progress_at=int(time.time()), counts=self.counts)

        self.record = await self._host.storage.call(lambda index: index.update(self.record.id, begun))
        self._order = order
        if self._left == 0:
            self._over.set()
        self._host.wake()

    # A line

    async def _line(self, index: int) -> None:
        try:
            answer = await self._answer(index)
            if not self._again(index, answer) and not await self._write(index, answer):
                self._put_back(index)
        except Exception:
            log.exception("%s: a request could not be run; it is tried again", self.record.id)
            self._put_back(index)
        finally:
            self.running -= 1
            self._host.wake()

    async def _answer(self, index: int) -> Answer:
        def opened(call: Call) -> None:
            self._calls[index] = call

        try:
            return await self._exchange(index).answer(opened)
        finally:
            self._calls.pop(index, None)

    def _again(self, index: int, answer: Answer) -> bool:
        """Whether it runs once more, later."""
        code = answer.error.code if answer.error is not None else ""
        if code in COUNTED_CODES:
            attempts = self._attempts[index] = self._attempts.get(index, 0) + 1
            if attempts >= MAX_ATTEMPTS:
                return False
        elif code not in PATIENT_CODES:
            self._troubles = 0
            return False
        self._put_back(index, (answer.error.retry_after_s if answer.error is not None else None) or 0.0)
        return True

    async def _write(self, index: int, answer: Answer) -> bool:
        """False where the storage fails."""
        results, line = self._results, self._lines[index]
        assert results is not None
        failed = answer.error is not None or answer.status >= 300
        request_id = self._request_id(index)

        def write(_: Index) -> None:
            text = answered_line(line.custom_id, request_id, answer.status, answer.body)
            results.add(line.custom_id, text, failed=failed)

        try:
            await self._host.storage.call(write)
        except TandemError as error:
            log.error("%s: a result could not be written, its request runs again: %s", self.record.id, error)
            return False
        assert self._order is not None
        self._order.computed(index)
        self._host.ended("failed" if failed else "completed")
        self._left -= 1
        if self._left == 0:
            self._over.set()
        return True

    def _put_back(self, index: int, pause_s: float = 0.0) -> None:
        assert self._order is not None
        self._order.put_back(index)
        self._troubles += 1
        backoff_s = min(MAX_PAUSE_S, 0.25 * 2 ** min(self._troubles, 10)) * random.uniform(0.5, 1.0)
        self._pause_until = time.monotonic() + min(MAX_PAUSE_S, max(pause_s, backoff_s))

    def _exchange(self, index: int) -> LineExchange:
        assert self._caller is not None
        assert self._input is not None
        line, read = self._lines[index], partial(request_json, self._input, self._lines[index])
        host, request_id = self._host, self._request_id(index)
        return LineExchange(host.service, self.record.endpoint, self._caller, request_id, line.length, read)

    def _request_id(self, index: int) -> str:
        return f"{self.record.id}-{self._lines[index].offset:x}"

    # The end

    async def _stop_lines(self) -> None:
        tasks = list(self._tasks)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    async def _finish(self) -> None:
        """Everything without a result gets an error; both files appear together with the batch's last status."""

        def finalizing(record: BatchRecord) -> BatchRecord:
            if record.status not in ("validating", "in_progress"):
                return record
            return replace(record, status="finalizing", finalizing_at=int(time.time()), counts=self.counts)

        storage = self._host.storage
        self.record = await storage.call(lambda index: index.update(self.record.id, finalizing))
        if self.record.status == "cancelling":
            self._outcome = "cancelled"
        self.record = await storage.call(self._settle)
        log.info("%s: %s, %s", self.record.id, self.record.status, self.record.counts)

    def _settle(self, index: Index) -> BatchRecord:
        results, record, now = self._results, self.record, int(time.time())
        assert results is not None
        for line in self._lines:
            if line.custom_id not in results.done:
                text = unanswered_line(line.custom_id, f"batch_{self._outcome}", _REASONS[self._outcome])
                results.add(line.custom_id, text, failed=True)
        files: list[FileRecord] = []
        sizes = results.finish()
        for name, kind, size in zip((record.output_name, record.error_name), ("output", "error"), sizes, strict=True):
            if size:
                filename = f"{record.id}_{kind}.jsonl"
                expires_at = now + record.output_expires_after_s
                files.append(FileRecord(name, record.tenant, filename, "batch_output", size, now, expires_at))
            else:
                self._host.storage.path(name).unlink(missing_ok=True)
        names = {file.id for file in files}

        def end(stored: BatchRecord) -> BatchRecord:
            """The record of the ended batch. Only result files that have a line are named in it."""
            return replace(
                stored,
                status=self._outcome,
                ended_at=now,
                counts=self.counts,
                errors=tuple(self._errors),
                output_file_id=record.output_name if record.output_name in names else None,
                error_file_id=record.error_name if record.error_name in names else None,
            )

        return index.update(record.id, end, files)
