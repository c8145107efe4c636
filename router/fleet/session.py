"""One live session with one start of one worker: submits requests, takes their outputs, knows the worker's load.

Made by `workers.py`, used by `attempt.py`. A session never comes back: after a loss there is a new one, and everything
that was submitted through the old one is told so at once.
"""

from __future__ import annotations

import asyncio
import logging
from collections import deque
from collections.abc import Callable
from typing import Protocol

import grpc
import grpc.aio

from tandem.common.patience import Silence
from tandem.proto import worker_pb2
from tandem.router.fleet.health import WorkerHealth

log = logging.getLogger(__name__)

SILENCE_S = 8.0
"""A worker sends its status at least once a second; after this long without any message it counts as frozen."""


class Handler(Protocol):
    """Receives what happens to one submitted request. Called on the event loop; must not block or raise."""

    def on_output(self, output: worker_pb2.RequestOutput) -> None: ...

    def on_lost(self, reason: str) -> None:
        """The session broke before the request's last output."""


class Watcher(Protocol):
    """Keeps the books of one submitted request. Called before its handler."""

    def on_output(self, output: worker_pb2.RequestOutput) -> None: ...

    def on_end(self) -> None:
        """Finished, cancelled or lost; the last call."""


class Feed(Protocol):
    """Hears what a worker says about itself."""

    def on_status(self, status: worker_pb2.WorkerStatus) -> None: ...

    def on_cache(self, events: worker_pb2.CacheEvents) -> None: ...

    def on_closed(self) -> None:
        """The session is over; the last call."""


Call = grpc.aio.StreamStreamCall[worker_pb2.SessionRequest, worker_pb2.SessionResponse]
Key = tuple[str, int]


class WorkerSession:
    """Bounded: the outbox holds at most a few messages per request in flight, and the router bounds those."""

    def __init__(
        self,
        info: worker_pb2.WorkerInfo,
        call: Call,
        *,
        silence_s: float = SILENCE_S,
        health: WorkerHealth | None = None,
        changed: Callable[[], None] = lambda: None,
    ) -> None:
        """`health` outlives the session, where the same worker had one before. `changed` is called when it may have
        become `usable`."""
        self.info = info
        self.name: str = info.worker_id
        self.identity: tuple[str, int] = (info.worker_id, info.worker_epoch)
        self.health = health or WorkerHealth()
        self.status = worker_pb2.WorkerStatus()
        """The latest; an empty one until the first has come."""
        self.alive = True
        self.usable = False
        """Whether it takes new requests, as far as it has said."""
        self.silence = Silence(silence_s, self._give_up)
        """Since its last message."""
        self.stale_outputs = 0
        """Outputs of requests that had already ended here."""
        self._call = call
        self._changed = changed
        self._leaving = False
        self._handlers: dict[Key, tuple[Handler, Watcher | None]] = {}
        self._watchers: dict[Key, Watcher] = {}
        """Watchers of requests about to be submitted."""
        self._feed: Feed | None = None
        self._cached: set[bytes] = set()
        """What it holds, until somebody wants to know: as much as its cache has blocks."""
        self._outbox: deque[worker_pb2.SessionRequest] = deque()
        self._outbox_filled = asyncio.Event()
        self._frozen = False
        """Nothing was heard for too long."""

    @property
    def requests(self) -> int:
        """Requests that were submitted here and are not over."""
        return len(self._handlers)

    def leave(self) -> None:
        """Takes nothing new from now on, and ends once everything that was submitted is over."""
        self._leaving, self.usable = True, False
        self._end_if_left()

    def stay(self) -> None:
        """Takes back `leave`, unless the session has ended."""
        self._leaving = False  # its next status makes it usable

    def _end_if_left(self) -> None:
        if self._leaving and not self._handlers:
            self._call.cancel()

    def attach(self, feed: Feed) -> None:
        """Tells `feed` what is known, and from then on everything as it comes. Once per session."""
        feed.on_cache(worker_pb2.CacheEvents(reset=True, stored=b"".join(self._cached)))
        self._cached = set()
        feed.on_status(self.status)
        self._feed = feed

    def watch(self, key: worker_pb2.RequestKey, watcher: Watcher) -> None:
        """`watcher` follows the request that will be submitted as `key`."""
        self._watchers[key.request_id, key.epoch] = watcher

    def submit(self, message: worker_pb2.SessionRequest, handler: Handler) -> None:
        """Sends a Submit. Registers `handler` until the request's last output, `cancel`, or the loss of the session."""
        key = message.submit.key.request_id, message.submit.key.epoch
        self._handlers[key] = (handler, self._watchers.pop(key, None))
        self._send(message)

    def cancel(self, key: worker_pb2.RequestKey) -> None:
        """Ends a request here and on the worker. Nothing happens if it has ended already."""
        if self._end((key.request_id, key.epoch)):
            self._send(worker_pb2.SessionRequest(cancel=worker_pb2.Cancel(key=key)))

    def _end(self, key: Key) -> bool:
        entry = self._handlers.pop(key, None)
        if entry is None:
            return False
        if entry[1] is not None:
            entry[1].on_end()
        if self._leaving:
            asyncio.get_running_loop().call_soon(self._end_if_left)  # what is to be sent for it is sent before
        return True

    def handover_lost(self, key: worker_pb2.RequestKey, reason: str) -> None:
        """Tells a decode worker to compute the prompt of `key` itself."""
        if (key.request_id, key.epoch) in self._handlers:
            message = worker_pb2.HandoverLost(key=key, reason=reason)
            self._send(worker_pb2.SessionRequest(handover_lost=message))

    async def run(self) -> str:
        """Reads and writes until the session ends. Returns why it ended; every open request has been told."""
        writer = asyncio.create_task(self._write())
        reason = "router is stopping"
        self.silence.start()
        try:
            reason = await self._read()
        finally:
            self.alive = self.usable = False
            self.silence.stop()
            writer.cancel()
            self._call.cancel()
            handlers, self._handlers = self._handlers, {}
            for _, watcher in handlers.values():
                if watcher is not None:
                    watcher.on_end()
            if self._feed is not None:
                self._feed.on_closed()
            for handler, _ in handlers.values():
                handler.on_lost(f"{self.name}: {reason}")
        return reason

    def _send(self, message: worker_pb2.SessionRequest) -> None:
        if self.alive:
            self._outbox.append(message)
            self._outbox_filled.set()

    async def _write(self) -> None:
        try:
            while True:
                await self._outbox_filled.wait()
                while self._outbox:
                    await self._call.write(self._outbox.popleft())
                self._outbox_filled.clear()
        except (grpc.aio.AioRpcError, asyncio.InvalidStateError) as error:
            log.debug("%s: writing ended (%s); the reader says why", self.name, type(error).__name__)
            self._call.cancel()

    async def _read(self) -> str:
        try:
            async for response in self._call:
                self.silence.heard()
                self._dispatch(response)
        except grpc.aio.AioRpcError as error:
            return f"{error.code().name}: {(error.details() or '')[:200]}"
        except asyncio.CancelledError:
            if not self._call.cancelled() or being_cancelled():
                raise
            if self._frozen:
                return f"no message for {self.silence.seconds:g} s"
            if self._leaving:
                return "it has left the list of workers"
            return "the connection broke while writing"
        return "the worker closed the session"

    def _give_up(self) -> None:
        self._frozen = True
        self._call.cancel()

    def _dispatch(self, response: worker_pb2.SessionResponse) -> None:
        for output in response.outputs:
            key = output.key.request_id, output.key.epoch
            entry = self._handlers.get(key)
            if entry is None:
                self.stale_outputs += 1
                continue
            handler, watcher = entry
            if watcher is not None:
                watcher.on_output(output)
            if output.finish_reason:
                self._end(key)
            handler.on_output(output)
        if response.HasField("cache"):
            self._take_cache(response.cache)
        if response.HasField("status"):
            self.status = response.status
            if self._feed is not None:
                self._feed.on_status(response.status)
            self._note_usable()

    def _note_usable(self) -> None:
        before = self.usable
        self.usable = self.alive and not self._leaving and not self.status.draining
        if self.usable and not before:
            self._changed()

    def _take_cache(self, events: worker_pb2.CacheEvents) -> None:
        if self._feed is not None:
            self._feed.on_cache(events)
            return
        if events.reset:
            self._cached.clear()
        self._cached.difference_update(hashes(events.removed))
        self._cached.update(hashes(events.stored))


def hashes(joined: bytes) -> list[bytes]:
    """The block hashes of a cache event."""
    return [joined[start : start + 32] for start in range(0, len(joined), 32)]


def being_cancelled() -> bool:
    task = asyncio.current_task()
    return task is not None and task.cancelling() > 0
