"""The life of one client request: its choices, from submission to the last token, whatever breaks on the way.

A `Call` holds every choice of a request (prompts x n). Worker outputs reach `Choice.on_output` on the event loop; the
front end reads with `Call.next` (streaming) or `Call.result`. All that arrived between two reads comes as one delta
per choice, so a slow client costs fewer, larger writes and bounded memory.
"""

from __future__ import annotations

import asyncio
import logging
import random
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any

from tandem.common.errors import TandemError
from tandem.router.calls.choice import CallContext, CallSpec, Choice, Delta
from tandem.router.turns.admission import Waiting

log = logging.getLogger(__name__)

STALLED_S = 30.0
"""Time that a call may take, after its deadline or a failure, to reach a client that reads slowly."""
MAX_BUFFERED_BYTES = 4 * 1024 * 1024
"""A client that leaves this much unread is cut off. An upper estimate, see `Choice.buffered_bytes`."""


SUBMITTING_S = 0.01
"""Time of one turn of the event loop."""


@dataclass(slots=True)
class Usage:
    """Tokens of a call, as answers report them. A prompt with several choices counts once."""

    prompt_tokens: int = 0
    completion_tokens: int = 0
    cached_by_tier: dict[str, int] = field(default_factory=dict)
    near_tokens: int = 0
    """Cached tokens whose KV is not exact."""

    @property
    def cached_tokens(self) -> int:
        return sum(self.cached_by_tier.values())


def account_of(call: Call) -> dict[str, Any]:
    """What the answer tells of a call that has gone well, where the client asked: see explain.py."""
    record, usage = call.spec.record, call.usage()
    record.cached_tokens, record.output_tokens = usage.cached_tokens, usage.completion_tokens
    record.finished("ok")
    return record.describe()


@asynccontextmanager
async def limited_sending(call: Call) -> AsyncIterator[None]:
    """Sends what a call produces. Raises TimeoutError where that goes on for STALLED_S after the call has failed."""
    try:
        async with asyncio.timeout(None) as limit:
            call.on_failed = lambda: limit.reschedule(asyncio.get_running_loop().time() + STALLED_S)
            yield
    finally:
        call.on_failed = None


class Call:
    """Make it, `start` it, read it, and `close` it in a `finally`. Used from one task."""

    def __init__(self, spec: CallSpec, context: CallContext) -> None:
        self.spec = spec
        self.context = context
        self.timeout_s = context.timeout_s if spec.timeout_s is None else min(spec.timeout_s, context.timeout_s)
        self.deadline = spec.arrived + self.timeout_s
        self.choices = [Choice(self, index, choice) for index, choice in enumerate(spec.choices)]
        self.error: TandemError | None = None
        self.on_failed: Callable[[], None] | None = None
        """Called once when it fails: its reader may be stuck with a client that takes nothing."""
        self._loop = asyncio.get_running_loop()
        self._waiter: asyncio.Future[None] | None = None
        self._unfinished = len(self.choices)
        self._ready: dict[int, Choice] = {}
        self._heard = False
        self._silent = False
        self._closed = False
        self._timer: asyncio.TimerHandle | None = None
        self._ticket = self._make_ticket()
        self._uncached_tokens = 0
        self._retries: set[asyncio.Task[None]] = set()

    @property
    def finished(self) -> bool:
        """Every choice has ended and been read."""
        return self._unfinished == 0 and not self._ready

    def start(self) -> None:
        """Joins the queue before the workers; where there is room every choice is submitted at once.

        Raises TandemError `overloaded`, or `unavailable` without a decode worker."""
        self._set_timer()
        self.context.admission.submit(self._ticket)

    async def next(self) -> list[Delta]:
        """New deltas in order of arrival; [] after a silence (send a keep-alive) or at the end (see `finished`).

        Raises TandemError when a choice failed, the deadline passed, or `fail` was called.
        """
        while self.error is None and not self._ready and self._unfinished and not self._silent:
            await self._wait()
        if self.error is not None:
            raise self.error
        self._silent = False
        ready, self._ready = self._ready, {}
        return [choice.take() for choice in ready.values()]

    async def result(self) -> list[Delta]:
        """One delta per choice, when all have ended. For calls that do not stream. Raises like `next`."""
        while self.error is None and self._unfinished:
            await self._wait()
        if self.error is not None:
            raise self.error
        self._ready.clear()
        return [choice.take() for choice in self.choices]

    def usage(self) -> Usage:
        """Each prompt counts once however many choices it has."""
        usage = Usage(self.spec.prompt_tokens, sum([choice.num_tokens for choice in self.choices]))
        for choice in {id(choice.spec.sequence.prompt): choice for choice in reversed(self.choices)}.values():
            for tier, tokens in choice.cached_by_tier.items():
                usage.cached_by_tier[tier] = usage.cached_by_tier.get(tier, 0) + tokens
        near: dict[int, int] = {}
        for choice in self.choices:
            prompt = id(choice.spec.sequence.prompt)
            near[prompt] = max(near.get(prompt, 0), choice.near_tokens)
        usage.near_tokens = sum(near.values())
        return usage

    def fail(self, error: TandemError) -> None:
        """Ends the call from outside, such as when the client has gone."""
        if self.error is None and not self._closed:
            self.error = error
            self._release()
            self._wake()
            if self.on_failed is not None:
                self.on_failed()

    def close(self) -> None:
        """Frees everything here and on the workers. What it has come to can still be read. Idempotent."""
        if not self._closed:
            self._closed = True
            self._release()
            del self._ticket  # it holds methods of this: a cycle would wait for the garbage collector
            for choice in self.choices:
                choice.close()

    def choice_ready(self, choice: Choice) -> None:
        """Tells the call that `choice` has something new. Fails the call where a client reads so slowly that too much
        is waiting."""
        self._heard = True
        if choice.finished:
            self._unfinished -= 1
        if self.spec.streaming:
            self._ready[choice.index] = choice
            if choice.buffered_bytes * len(self.choices) > MAX_BUFFERED_BYTES:
                self.fail(TandemError("cancelled", "the client reads too slowly"))
                return
        if self.spec.streaming or self._unfinished == 0:
            self._wake()

    def prompt_computed(self, choice: Choice) -> None:
        """Tells metrics and admission that the prompt of `choice` is computed, and how much of it was cached."""
        metrics = self.context.metrics
        metrics.prompt_tokens_seen += len(choice.spec.sequence.prompt.token_ids)
        metrics.cached_tokens_seen += sum(choice.cached_by_tier.values())
        self._uncached_tokens += len(choice.spec.sequence.prompt.token_ids) - sum(choice.cached_by_tier.values())
        self.context.admission.computed(self._ticket, self._uncached_tokens)

    def produced(self, tokens: int) -> None:
        self.context.metrics.output_tokens_seen += tokens
        self.context.admission.produced(self._ticket, tokens)

    def retry(self, choice: Choice, reason: str, *, fault: bool) -> None:
        task = self._loop.create_task(self._retry(choice, reason, fault))
        self._retries.add(task)
        task.add_done_callback(self._retries.discard)

    async def _retry(self, choice: Choice, reason: str, fault: bool) -> None:
        """Submits `choice` again. After a fault that takes a pause and a place in the budget; a worker that left in
        good order costs neither."""
        context, setbacks = self.context, choice.setbacks
        give_up_at = min((setbacks.since or time.monotonic()) + context.worker_wait_s, self.deadline)
        while True:
            if fault:
                await asyncio.sleep(setbacks.next_pause_s(random.random()))
            try:
                await context.dispatcher.fleet.wait_for_decode(give_up_at - time.monotonic(), setbacks.avoid)
                if not fault or context.retries.take(time.monotonic()):
                    choice.submit()
                    context.metrics.retries.inc()
                    return
            except TandemError as error:
                log.debug("request %s has no worker yet: %s", self.spec.request_id, error)
            except Exception:
                log.exception("request %s could not be started again", self.spec.request_id)
                self.fail(TandemError("internal", "an internal error; the router's log has more"))
                return
            if time.monotonic() >= give_up_at:
                self.fail(choice.lost(reason))
                return
            fault = True

    def _make_ticket(self) -> Waiting:
        sequence = self.spec.choices[0].sequence
        return Waiting(
            tenant=sequence.caller.tenant,
            weight=sequence.caller.weight,
            priority=sequence.priority,
            prompt_tokens=self.spec.prompt_tokens,
            deadline=self.deadline,
            cached_tokens=lambda: self.context.dispatcher.cached_tokens(sequence),
            granted=self._granted,
            refused=self.fail,
        )

    def _granted(self) -> None:
        self.spec.record.granted()
        self._submit(0)

    def _submit(self, first: int) -> None:
        """The choices from `first` on. Where there is much to hash and to send, the event loop turns in between."""
        pause_at = time.monotonic() + SUBMITTING_S
        for index in range(first, len(self.choices)):
            self.context.retries.request()
            self.choices[index].submit()
            if index + 1 < len(self.choices) and time.monotonic() > pause_at:
                self._loop.call_soon(self._submit_later, index + 1)
                return

    def _submit_later(self, first: int) -> None:
        if self._closed or self.error is not None:
            return
        try:
            self._submit(first)
        except TandemError as error:
            self.fail(error)
        except Exception:
            log.exception("request %s could not be started", self.spec.request_id)
            self.fail(TandemError("internal", "an internal error; the router's log has more"))

    async def _wait(self) -> None:
        self._waiter = self._loop.create_future()
        try:
            await self._waiter
        finally:
            self._waiter = None

    def _wake(self) -> None:
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)

    def _set_timer(self) -> None:
        """Sets the timer for the deadline, or for the next look whether a stream is silent."""
        left_s = max(0.0, self.deadline - time.monotonic())
        if self.spec.streaming and self.context.keepalive_s < left_s:
            self._timer = self._loop.call_later(self.context.keepalive_s, self._tick)
        else:
            self._timer = self._loop.call_later(left_s, self._expire)

    def _tick(self) -> None:
        if self._closed or self.error is not None:
            return
        self._silent = not self._heard
        self._heard = False
        self._set_timer()
        if self._silent:
            self._wake()

    def _expire(self) -> None:
        self.fail(TandemError("deadline_exceeded", f"not finished within {self.timeout_s:g} s"))

    def _release(self) -> None:
        self.context.admission.cancel(self._ticket)
        if self._timer is not None:
            self._timer.cancel()
        for task in self._retries:
            task.cancel()
        for choice in self.choices:
            choice.cancel()
