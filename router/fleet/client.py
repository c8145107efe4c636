"""One worker of the fleet: connects to its target, keeps a session, reconnects after a loss, until it leaves."""

from __future__ import annotations

import asyncio
import logging
import random
import time
from typing import Protocol

import grpc
import grpc.aio

import tandem
from tandem.common.credentials import open_aio_channel, remedy
from tandem.proto import worker_pb2, worker_pb2_grpc
from tandem.router.fleet.health import WorkerHealth
from tandem.router.fleet.session import SILENCE_S, WorkerSession, being_cancelled
from tandem.router.fleet.sources import Target

log = logging.getLogger(__name__)

CONNECT_TIMEOUT_S = 5.0
PATIENCE_S = 30.0
"""A worker that was never there may be loading for so long before the log says that it is out of reach."""
RETRY_MIN_S = 0.1
RETRY_MAX_S = 0.5
MAX_PROBLEM = 500
"""Characters."""
REFUSED_RETRY_S = 5.0
"""A refused worker can only be mended by a restart of it."""

_CHANNEL_OPTIONS = [
    ("grpc.use_local_subchannel_pool", 1),
    ("grpc.initial_reconnect_backoff_ms", 100),
    # Despite its name: how long connecting may take. A worker that shares its cores may need seconds for a handshake.
    ("grpc.min_reconnect_backoff_ms", round(1000 * CONNECT_TIMEOUT_S)),
    ("grpc.max_reconnect_backoff_ms", 1000),
    ("grpc.max_receive_message_length", 64 * 1024 * 1024),
    ("grpc.max_send_message_length", 64 * 1024 * 1024),
]

ROLE_NAMES = {worker_pb2.ROLE_PREFILL: "prefill", worker_pb2.ROLE_DECODE: "decode"}


class WorkerRefused(Exception):
    """The process behind a target is not a worker this router may use."""


class ConnectedAlready(WorkerRefused):
    """The worker behind a target is used through another one, such as its address in the other family."""


class FleetOfClient(Protocol):
    """What a client needs of its fleet."""

    def check(self, info: worker_pb2.WorkerInfo) -> None:
        """Raises WorkerRefused."""

    def changed(self) -> None:
        """A session has begun, ended, or become usable."""

    def lost(self, client: WorkerClient) -> None:
        """A session broke."""

    def left(self, client: WorkerClient) -> None:
        """The client has ended; the last call."""


class WorkerClient:
    """Keeps a session to whatever process answers at `target`. `session` is None while there is none."""

    def __init__(
        self, target: Target, router_id: str, fleet: FleetOfClient, *, silence_s: float = SILENCE_S, secret: bytes = b""
    ) -> None:
        self.target = target
        self.session: WorkerSession | None = None
        self.health = WorkerHealth()
        self.name = target.address
        """The worker's id, once it has told it."""
        self.problem = ""
        """Why there is no session; empty: there is one, or it has not been tried yet."""
        self.spare = False
        """The worker is used through another target."""
        self.leaving = False
        """Takes nothing new, and ends when what runs there is over."""
        self._secret = secret
        self._stub: worker_pb2_grpc.WorkerAsyncStub | None = None
        self._router_id = router_id
        self._fleet = fleet
        self._silence_s = silence_s
        self._task: asyncio.Task[None] | None = None
        self._patient_until = 0.0
        self._told = ""
        """Why it cannot be reached, as the log has it."""
        self._pause_s = RETRY_MIN_S

    @property
    def role_name(self) -> str:
        return ROLE_NAMES[self.target.role]

    def start(self) -> None:
        self._task = asyncio.create_task(self._run(), name=f"worker {self.target.address}")
        self._task.add_done_callback(lambda _: self._fleet.left(self))

    def leave(self) -> None:
        """Gives it nothing new. `FleetOfClient.left` is called once what runs there is over."""
        self.leaving = True
        if self.session is not None:
            self.session.leave()
        elif self._task is not None:
            self._task.cancel()

    def stay(self) -> None:
        """Takes back `leave`."""
        self.leaving = False
        if self.session is not None:
            self.session.stay()

    async def stop(self) -> None:
        """Ends at once, whatever runs there."""
        if self._task is not None:
            self._task.cancel()
            await asyncio.gather(self._task, return_exceptions=True)

    async def metrics(self, timeout_s: float) -> str | None:
        """Prometheus text. None: no answer within `timeout_s`."""
        if self._stub is None:
            return None
        try:
            return (await self._stub.GetMetrics(worker_pb2.GetMetricsRequest(), timeout=timeout_s)).text
        except (grpc.aio.AioRpcError, grpc.aio.UsageError):
            return None
        except asyncio.CancelledError:  # by this task's owner, or with the channel
            if being_cancelled():
                raise
            return None

    async def _run(self) -> None:
        """Until it has left. Each session has a channel of its own, and so has each attempt after one that nobody
        answered: a connection whose other end has gone in silence looks whole, and its name is not looked up again."""
        log.info("waiting for worker %s", self.target.address)
        self._patient_until = time.monotonic() + PATIENCE_S
        while not self.leaving:
            try:
                await self._use_a_channel()
            except Exception:
                self.problem = "an unexpected error; the router's log has more"
                log.exception("worker %s: an unexpected error; trying on", self.target.address)
            if not self.leaving:
                await self._pause()

    async def _use_a_channel(self) -> None:
        async with open_aio_channel(self.target.address, self._secret, _CHANNEL_OPTIONS) as channel:
            self._stub = worker_pb2_grpc.WorkerStub(channel)
            try:
                while await self._attempt(self._stub):
                    await self._pause()
            finally:
                self._stub = None

    async def _pause(self) -> None:
        await asyncio.sleep(self._pause_s * random.uniform(0.8, 1.2))
        self._pause_s = min(2 * self._pause_s, RETRY_MAX_S)

    async def _attempt(self, stub: worker_pb2_grpc.WorkerAsyncStub) -> bool:
        """One session, if it can be had. Returns whether its channel is as good as new."""
        try:
            info = await stub.GetInfo(worker_pb2.GetInfoRequest(), timeout=CONNECT_TIMEOUT_S)
            self._patient_until = 0.0
            self.problem = f"lost: {await self._serve(stub, info)}"
            self._pause_s = RETRY_MIN_S
        except WorkerRefused as error:
            self._refused(error)
            return True
        except grpc.aio.AioRpcError as error:
            self._unreachable(error)
            return error.code() != grpc.StatusCode.DEADLINE_EXCEEDED
        except TimeoutError:
            self.problem = "it accepted a session but does not read it"
            log.info("worker %s accepted a session but does not read it; trying on", self.target.address)
        return False

    def _refused(self, error: WorkerRefused) -> None:
        problem = f"refused: {error}"[:MAX_PROBLEM]
        self.spare = isinstance(error, ConnectedAlready)
        if self.problem != problem:
            log.log(logging.INFO if self.spare else logging.ERROR, "worker %s is %s", self.target.address, problem)
        self.problem = problem
        self._pause_s = RETRY_MAX_S if self.spare else REFUSED_RETRY_S

    def _unreachable(self, error: grpc.aio.AioRpcError) -> None:
        details = error.details() or ""
        hint = remedy(details, self._secret)
        self.problem = f"{error.code().name}: {details[:200]}{hint}"
        if self.problem != self._told and (hint or time.monotonic() >= self._patient_until):
            log.info("worker %s cannot be reached (%s); trying on", self.target.address, self.problem)
            self._told = self.problem

    def _check(self, info: worker_pb2.WorkerInfo) -> None:
        """Raises WorkerRefused."""
        if info.role != self.target.role:
            raise WorkerRefused(
                f"it is a {ROLE_NAMES.get(info.role, 'nameless')} worker, configured as {self.role_name}"
            )
        self._fleet.check(info)

    async def _serve(self, stub: worker_pb2_grpc.WorkerAsyncStub, info: worker_pb2.WorkerInfo) -> str:
        """Keeps a session until it ends. Returns why it did. Raises WorkerRefused."""
        self._check(info)
        call = stub.Session()
        try:
            hello = worker_pb2.Hello(router_id=self._router_id, version=tandem.__version__)
            async with asyncio.timeout(CONNECT_TIMEOUT_S):
                await call.write(worker_pb2.SessionRequest(hello=hello))
            self._check(info)  # another worker may have connected meanwhile
            self.session = session = WorkerSession(
                info, call, silence_s=self._silence_s, health=self.health, changed=self._fleet.changed
            )
            self.name, self.problem, self._told, self.spare = info.worker_id, "", "", False
            log.info("worker %s is %s, epoch %d", self.target.address, info.worker_id, info.worker_epoch)
            self._fleet.changed()
            reason = await session.run()
            if self.leaving:
                log.info("worker %s has left", info.worker_id)
                return reason
            if not session.status.draining and self.health.failed(time.monotonic()):
                log.warning("worker %s gets no requests for a while: %s", info.worker_id, self.health.problem)
        finally:
            call.cancel()
            self.session = None
            self._fleet.changed()
        log.warning("lost worker %s: %s", info.worker_id, reason)
        self._fleet.lost(self)
        return reason
