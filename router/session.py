"""One live connection to one start of one worker: submits requests, takes their outputs, knows the worker's load.

Made by `workers.py`, used by `attempt.py`. A session never comes back: after a loss there is a new one, and everything
that was submitted through the old one is told so at once.
"""

from __future__ import annotations

import asyncio
import logging
from collections import deque
from typing import Protocol

import grpc
import grpc.aio

from tandem.proto import worker_pb2

log = logging.getLogger(__name__)

SILENCE_S = 8.0
"""A worker sends its status at least once a second; after this long without any message it counts as frozen."""


class Handler(Protocol):
    """Receives what happens to one submitted request. Called on the event loop; must not block or raise."""

    def on_output(self, output: worker_pb2.RequestOutput) -> None: ...

    def on_lost(self, reason: str) -> None:
        """The session broke before the request's last output."""


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
    ) -> None:
        self.info = info
        self.status = worker_pb2.WorkerStatus()
        self.alive = True
        self.picks = 0
        """Requests ever submitted; breaks ties between equally loaded workers."""
        self.stale_outputs = 0
        """Outputs of requests that had already ended here."""
        self._call = call
        self._silence_s = silence_s
        self._handlers: dict[Key, tuple[Handler, int]] = {}
        self._tokens = 0
        self._foreign_requests = 0
        self._foreign_tokens = 0
        self._outbox: deque[worker_pb2.SessionRequest] = deque()
        self._outbox_filled = asyncio.Event()

    @property
    def name(self) -> str:
        return self.info.worker_id

    @property
    def identity(self) -> tuple[str, int]:
        return self.info.worker_id, self.info.worker_epoch

    @property
    def usable(self) -> bool:
        return self.alive and not self.status.draining

    @property
    def requests(self) -> int:
        """Requests on the worker: ours counted at once, other routers' as of its last status."""
        return len(self._handlers) + self._foreign_requests

    @property
    def prompt_tokens(self) -> int:
        """Prompt tokens of unfinished requests, counted in the same way. Meaningful for prefill workers."""
        return self._tokens + self._foreign_tokens

    def submit(self, submit: worker_pb2.Submit, handler: Handler) -> None:
        """Registers `handler` until the request's last output, `forget`, or the loss of the session."""
        tokens = len(submit.prompt_token_ids)
        self._handlers[submit.key.request_id, submit.key.epoch] = (handler, tokens)
        self._tokens += tokens
        self.picks += 1
        self._send(worker_pb2.SessionRequest(submit=submit))

    def cancel(self, key: worker_pb2.RequestKey) -> None:
        """Ends a request here and on the worker. Nothing happens if it has ended already."""
        if self.forget(key):
            self._send(worker_pb2.SessionRequest(cancel=worker_pb2.Cancel(key=key)))

    def forget(self, key: worker_pb2.RequestKey) -> bool:
        entry = self._handlers.pop((key.request_id, key.epoch), None)
        if entry is None:
            return False
        self._tokens -= entry[1]
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
        try:
            reason = await self._read()
        finally:
            self.alive = False
            writer.cancel()
            self._call.cancel()
            handlers, self._handlers, self._tokens = self._handlers, {}, 0
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
        while True:
            try:
                async with asyncio.timeout(self._silence_s):
                    response = await self._call.read()
            except TimeoutError:
                return f"no message for {self._silence_s:g} s"
            except grpc.aio.AioRpcError as error:
                return f"{error.code().name}: {(error.details() or '')[:200]}"
            except asyncio.CancelledError:
                if self._call.cancelled() and not _being_cancelled():
                    return "the connection broke while writing"
                raise
            if not isinstance(response, worker_pb2.SessionResponse):  # grpc.aio.EOF
                return "the worker closed the session"
            self._dispatch(response)

    def _dispatch(self, response: worker_pb2.SessionResponse) -> None:
        for output in response.outputs:
            key = output.key
            entry = self._handlers.get((key.request_id, key.epoch))
            if entry is None:
                self.stale_outputs += 1
                continue
            if output.finish_reason:
                self.forget(key)
            entry[0].on_output(output)
        if response.HasField("status"):
            self.status = status = response.status
            self._foreign_requests = max(0, status.running + status.waiting - len(self._handlers))
            self._foreign_tokens = max(0, status.pending_prefill_tokens - self._tokens)


def _being_cancelled() -> bool:
    task = asyncio.current_task()
    return task is not None and task.cancelling() > 0
