"""The gRPC service of a prefill or decode worker: sessions with routers in front, one engine behind.

Everything here runs on the event loop except `OutputBridge.put`.
What differs between the roles is a `Handover` (prefill/exporter.py, decode/importer.py).
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass
from typing import Protocol

import grpc
import grpc.aio
from opentelemetry import trace
from prometheus_client import generate_latest

from tandem.common.errors import TandemError
from tandem.common.telemetry import context_from_traceparent, process_registry, tracer
from tandem.engine.request import EngineRequest, FinishReason, RequestKey, RequestOutput
from tandem.engine.schedule.cache_events import CacheFollower, CacheLog
from tandem.engine.status import EngineStatus
from tandem.proto import worker_pb2, worker_pb2_grpc
from tandem.worker.metrics import WorkerMetrics
from tandem.worker.session import RouterSession, entries_of
from tandem.worker.wire import error_output, key_from_proto, output_to_proto, request_from_proto

log = logging.getLogger(__name__)

STATUS_TICK_S = 0.1
"""A changed status is sent at most this often."""
STATUS_SILENCE_S = 1.0
"""An unchanged one at least this often: routers take longer silence for a frozen worker."""
CACHE_TICK_S = 0.05
"""Changes of the prefix cache wait this long for company."""
ABORT_S = 2.0
"""Time for aborted requests to end and for their last outputs to reach the router."""


class WorkerEngine(Protocol):
    """What the server needs of engine.Engine; all safe from any thread."""

    @property
    def cache_log(self) -> CacheLog: ...
    def submit(self, request: EngineRequest) -> None: ...
    def cancel(self, key: RequestKey) -> None: ...
    def status(self) -> EngineStatus: ...


class Handover(Protocol):
    """One role's part in moving KV. Called on the event loop."""

    def attach(self, request: EngineRequest, submit: worker_pb2.Submit) -> None:
        """Sets kv_export or kv_import. Raises TandemError for a message that this role cannot serve."""

    def ended(self, key: RequestKey) -> None:
        """The request's last output is here, or it was never started."""

    def peer_lost(self, key: RequestKey, reason: str) -> None:
        """The router says that the other worker of this request is gone."""


@dataclass(slots=True)
class _Live:
    session: RouterSession
    span: trace.Span
    failure: tuple[str, str] | None = None
    """Error code and message that replace the cancellation which the server itself asked for."""


class WorkerServer(worker_pb2_grpc.WorkerServicer):
    """The gRPC servicer: takes requests of any number of routers into one engine, and sends each router the outputs of
    its own. Made on the event loop."""

    def __init__(
        self,
        engine: WorkerEngine,
        handover: Handover,
        info: worker_pb2.WorkerInfo,
        store_node: Callable[[], str] = str,
    ) -> None:
        """`store_node` returns the id of the KV store's home node, which may become known late; empty: none."""
        self._engine = engine
        self._handover = handover
        self._info = info
        self._store_node = store_node
        self.registry = process_registry()
        self.metrics: WorkerMetrics | None = None
        self._loop = asyncio.get_running_loop()
        self._sessions: set[RouterSession] = set()
        self._live: dict[RequestKey, _Live] = {}
        self._idle = asyncio.Event()
        self._idle.set()
        self._draining = False
        self.num_started = 0
        self._tickers = [asyncio.create_task(self._send_status()), asyncio.create_task(self._send_cache_events())]

    # The service

    async def GetInfo(
        self,
        request: worker_pb2.GetInfoRequest,
        context: grpc.aio.ServicerContext[worker_pb2.GetInfoRequest, worker_pb2.WorkerInfo],
    ) -> worker_pb2.WorkerInfo:
        """What this worker is, which a router asks before it opens a session."""
        self._info.store_node = self._store_node()
        return self._info

    async def Session(  # type: ignore[override]  # grpc.aio takes a coroutine that writes, too
        self,
        request_iterator: AsyncIterator[worker_pb2.SessionRequest],
        context: grpc.aio.ServicerContext[worker_pb2.SessionRequest, worker_pb2.SessionResponse],
    ) -> None:
        """Takes a router's messages and sends what becomes of them until one of the two ends it."""
        session = RouterSession(CacheFollower(self._engine.cache_log), self._end)
        session.set_status(self.status())
        self._sessions.add(session)
        reader = asyncio.create_task(self._read(session, request_iterator))
        try:
            while (response := await session.next_response()) is not None:
                await context.write(response)
            if session.overflowed:
                await context.abort(grpc.StatusCode.RESOURCE_EXHAUSTED, "the router did not read what it asked for")
        finally:
            reader.cancel()
            self._end(session)

    async def GetMetrics(
        self,
        request: worker_pb2.GetMetricsRequest,
        context: grpc.aio.ServicerContext[worker_pb2.GetMetricsRequest, worker_pb2.MetricsText],
    ) -> worker_pb2.MetricsText:
        """Prometheus text of this process."""
        text = await asyncio.to_thread(generate_latest, self.registry)
        return worker_pb2.MetricsText(text=text.decode())

    async def Drain(
        self,
        request: worker_pb2.DrainRequest,
        context: grpc.aio.ServicerContext[worker_pb2.DrainRequest, worker_pb2.DrainResponse],
    ) -> worker_pb2.DrainResponse:
        """Empties the worker for `tandem drain`, which may hang up: what runs goes on, and nothing new is taken."""
        finished, aborted = await self.drain(request.grace_s)
        return worker_pb2.DrainResponse(finished=finished, aborted=aborted)

    # For the process around it

    async def drain(self, grace_s: float) -> tuple[int, int]:
        """Admits nothing more; waits up to `grace_s` for what runs, then cancels it. Returns (finished, aborted)."""
        self._draining = True
        status = self.status()
        for session in self._sessions:
            session.set_status(status)
        waiting_for = set(self._live)
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(max(grace_s, 0.0)):
                await self._idle.wait()
        aborted = list(self._live)
        for key in aborted:
            self._fail(key, "unavailable", "the worker is shutting down")
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(ABORT_S):
                await self._idle.wait()
        return len(waiting_for) - len(aborted), len(aborted)

    async def close(self) -> None:
        """Ends all sessions."""
        for ticker in self._tickers:
            ticker.cancel()
        for session in list(self._sessions):
            session.close()
        await asyncio.gather(*self._tickers, return_exceptions=True)

    @property
    def num_live(self) -> int:
        return len(self._live)

    def status(self) -> worker_pb2.WorkerStatus:
        """What routers are told now."""
        now = self._engine.status()
        return worker_pb2.WorkerStatus(
            running=now.running,
            waiting=now.waiting,
            free_blocks=now.free_blocks,
            total_blocks=now.total_blocks,
            pending_prefill_tokens=now.pending_prefill_tokens,
            prefill_tokens_per_s=now.prefill_tokens_per_s,
            decode_step_s=now.decode_step_s,
            draining=self._draining,
            decoding=now.decoding,
            running_tokens=now.running_tokens,
            by_band=now.by_band,
        )

    def deliver(self, outputs: list[RequestOutput]) -> None:
        """Sorts the outputs of an engine step into the sessions they belong to."""
        for output in outputs:
            live = self._live.get(output.key)
            if live is None:
                continue
            if output.prompt is not None and not output.prompt.computed_by:
                output.prompt.computed_by = self._info.worker_id
            if live.failure is not None and output.finish_reason is FinishReason.CANCELLED:
                output.finish_reason = FinishReason.ERROR
                output.error_code, output.error_message = live.failure
            if self.metrics is not None:
                self.metrics.output(output)
            if output.finish_reason is not None:
                self._forget(live, output)
            live.session.add(output_to_proto(output), entries_of(output))

    # Inside

    async def _read(self, session: RouterSession, messages: AsyncIterator[worker_pb2.SessionRequest]) -> None:
        try:
            async for message in messages:
                if session.overflowed:
                    return
                match message.WhichOneof("kind"):
                    case "submit":
                        self._submit(session, message.submit)
                    case "cancel":
                        self._cancel(session, key_from_proto(message.cancel.key))
                    case "handover_lost":
                        key = key_from_proto(message.handover_lost.key)
                        if key in session.keys:
                            self._handover.peer_lost(key, message.handover_lost.reason or "the router said so")
                    case "hello":
                        session.router_id = message.hello.router_id
                        log.debug("router %s (version %s) is here", message.hello.router_id, message.hello.version)
                    case _:
                        log.warning("router %s sent a message of a kind this version does not know", session.router_id)
        except grpc.RpcError as error:
            log.info("router %s: the session broke (%s)", session.router_id, type(error).__name__)
        finally:
            session.close()

    def _submit(self, session: RouterSession, submit: worker_pb2.Submit) -> None:
        key = key_from_proto(submit.key)
        try:
            if not key.request_id:
                raise TandemError("invalid_request", "the request has no id")
            if key in self._live:
                raise TandemError("invalid_request", f"request {key.request_id} epoch {key.epoch} is running already")
            if self._draining:
                raise TandemError("unavailable", "the worker is draining")
            request = request_from_proto(submit)
        except TandemError as error:
            self._refuse(session, key, error)
            return
        span = tracer().start_span(
            f"{worker_pb2.Role.Name(self._info.role).removeprefix('ROLE_').lower()} request",
            context=context_from_traceparent(submit.traceparent),
            attributes={"request.id": key.request_id, "prompt.tokens": len(request.prompt_token_ids)},
        )
        self._live[key] = _Live(session, span)
        session.keys.add(key)
        self.num_started += 1
        self._idle.clear()
        try:
            self._handover.attach(request, submit)
            self._engine.submit(request)
        except TandemError as error:
            self._forget(self._live[key], error_output(key, error.code, error.message))
            self._refuse(session, key, error)

    def _refuse(self, session: RouterSession, key: RequestKey, error: TandemError) -> None:
        if self.metrics is not None:
            self.metrics.refused(error.code)
        session.add(output_to_proto(error_output(key, error.code, error.message)), 1)

    def _cancel(self, session: RouterSession, key: RequestKey) -> None:
        if key in session.keys:
            self._engine.cancel(key)

    def _fail(self, key: RequestKey, code: str, message: str) -> None:
        live = self._live.get(key)
        if live is not None and live.failure is None:
            live.failure = (code, message)
            self._engine.cancel(key)

    def _forget(self, live: _Live, last: RequestOutput) -> None:
        del self._live[last.key]
        live.session.keys.discard(last.key)
        if not self._live:
            self._idle.set()
        self._handover.ended(last.key)
        if last.finish_reason is not None:
            live.span.set_attribute("finish_reason", last.finish_reason.name.lower())
        if last.error_code:
            live.span.set_status(trace.StatusCode.ERROR, f"{last.error_code}: {last.error_message}")
        live.span.end()

    def _end(self, session: RouterSession) -> None:
        if session not in self._sessions:
            return
        self._sessions.discard(session)
        if session.overflowed:
            log.warning("router %s does not read; its session is ended", session.router_id)
            if self.metrics is not None:
                self.metrics.slow_session()
        if session.keys:
            log.info("cancelling the requests of router %s: %d", session.router_id, len(session.keys))
        for key in list(session.keys):
            self._engine.cancel(key)

    async def _send_status(self) -> None:
        sent_at, sent = 0.0, worker_pb2.WorkerStatus()
        while True:
            await asyncio.sleep(STATUS_TICK_S)
            if not self._sessions:
                continue
            status, now = self.status(), time.monotonic()
            if status != sent or now - sent_at >= STATUS_SILENCE_S:
                sent_at, sent = now, status
                for session in self._sessions:
                    session.set_status(status)

    async def _send_cache_events(self) -> None:
        while True:
            await asyncio.sleep(CACHE_TICK_S)
            for session in self._sessions:
                session.follow_cache()
