"""What goes from the engine to the routers: outputs of a step, sorted into one session per router.

Everything here runs on the event loop except `OutputBridge.put`.
"""

from __future__ import annotations

import asyncio
import logging
import threading
from collections.abc import Callable

from tandem.engine.request import RequestKey, RequestOutput
from tandem.engine.schedule.cache_events import CacheFollower
from tandem.proto import worker_pb2

log = logging.getLogger(__name__)

MAX_UNSENT_ENTRIES = 1_000_000
"""Tokens and log-probabilities a session may leave unread before it is ended."""


class OutputBridge:
    """Carries outputs from the engine thread to the event loop with one wake-up per step."""

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self._loop = loop
        self._lock = threading.Lock()
        self._pending: list[RequestOutput] = []
        self.deliver: Callable[[list[RequestOutput]], None] = _discard

    def put(self, outputs: list[RequestOutput]) -> None:
        """Hands over what a step gave. Called on the engine thread."""
        with self._lock:
            wake = not self._pending
            self._pending.extend(outputs)
        if wake and not self._loop.is_closed():
            self._loop.call_soon_threadsafe(self._flush)

    def _flush(self) -> None:
        with self._lock:
            outputs, self._pending = self._pending, []
        self.deliver(outputs)


def _discard(outputs: list[RequestOutput]) -> None:
    log.warning("%d outputs before the server was ready are dropped", len(outputs))


class RouterSession:
    """One router's session: what it submitted, and what it has not been sent yet."""

    def __init__(self, cache: CacheFollower, overflow: Callable[[RouterSession], None]) -> None:
        """`overflow(self)` is called when the router has left too much unread."""
        self.router_id = "unknown"
        self.keys: set[RequestKey] = set()
        self.overflowed = False
        self._overflow = overflow
        self._outputs: list[worker_pb2.RequestOutput] = []
        self._entries = 0
        self._status: worker_pb2.WorkerStatus | None = None
        self._cache = cache
        self._cache_due = True
        self._filled = asyncio.Event()
        self._closed = False

    def add(self, message: worker_pb2.RequestOutput, entries: int) -> None:
        """Queues an output that takes about `entries` of memory; too many that are unread end the session."""
        if self._entries > MAX_UNSENT_ENTRIES and not self.overflowed:
            # What is being written blocks until the router reads or leaves; nothing can be said to it before that.
            self.overflowed = True
            self._outputs.clear()
            self.close()
            self._overflow(self)
        if not self.overflowed:
            self._outputs.append(message)
            self._entries += entries
            self._filled.set()

    def set_status(self, status: worker_pb2.WorkerStatus) -> None:
        self._status = status
        self._filled.set()

    def follow_cache(self) -> None:
        if self._cache.behind:
            self._cache_due = True
            self._filled.set()

    def close(self) -> None:
        """The router has said all it will say."""
        self._closed = True
        self._filled.set()

    async def next_response(self) -> worker_pb2.SessionResponse | None:
        """Everything since the last call, in one message; None when the session is over."""
        while not (self._outputs or self._status is not None or self._cache_due or self._closed):
            self._filled.clear()
            await self._filled.wait()
        if self._closed and not self._outputs:
            return None
        cache = self._cache.take() if self._cache_due else None
        response = worker_pb2.SessionResponse(outputs=self._outputs, status=self._status, cache=cache)
        self._outputs, self._entries, self._status, self._cache_due = [], 0, None, False
        return response


def entries_of(output: RequestOutput) -> int:
    """Roughly how much memory an unsent output takes, in tokens."""
    count = 1 + len(output.token_ids) + len(output.embedding) // 16
    for entries in (output.logprobs, output.prompt_logprobs):
        if entries:
            first = entries[-1]
            count += len(entries) * (1 + (len(first.top_ids) if first is not None else 0))
    return count
