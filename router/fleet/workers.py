"""The workers a router knows: connects to each, keeps a session, reconnects after a loss, refuses strangers."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import random
import time
from collections.abc import Callable, Collection, Iterable

import grpc
import grpc.aio

import tandem
from tandem.common.credentials import open_aio_channel, remedy
from tandem.common.errors import TandemError
from tandem.proto import worker_pb2, worker_pb2_grpc
from tandem.router.fleet.health import WorkerHealth, eject_outliers
from tandem.router.fleet.session import SILENCE_S, WorkerSession

log = logging.getLogger(__name__)

CONNECT_TIMEOUT_S = 5.0
PATIENCE_S = 30.0
"""A worker that was never there may be loading for so long before it is said to be out of reach."""
RETRY_MIN_S = 0.1
RETRY_MAX_S = 0.5
REFUSED_RETRY_S = 5.0
"""A refused worker can only be mended by a restart of it."""
COMPARE_S = 1.0
"""How often workers are compared with each other, to find outliers."""

_CHANNEL_OPTIONS = [
    ("grpc.use_local_subchannel_pool", 1),
    ("grpc.initial_reconnect_backoff_ms", 100),
    # Despite its name: how long connecting may take. A worker that shares its cores may need seconds for a handshake.
    ("grpc.min_reconnect_backoff_ms", round(1000 * CONNECT_TIMEOUT_S)),
    ("grpc.max_reconnect_backoff_ms", 1000),
    ("grpc.max_receive_message_length", 64 * 1024 * 1024),
    ("grpc.max_send_message_length", 64 * 1024 * 1024),
]

_ROLE_NAMES = {worker_pb2.ROLE_PREFILL: "prefill", worker_pb2.ROLE_DECODE: "decode"}


class WorkerRefused(Exception):
    """The process behind a target is not a worker this router may use."""


class WorkerClient:
    """Keeps a session to whatever process answers at `target`. `session` is None while there is none."""

    def __init__(
        self,
        target: str,
        role: worker_pb2.Role.ValueType,
        router_id: str,
        *,
        check: Callable[[worker_pb2.WorkerInfo], None],
        changed: Callable[[], None],
        silence_s: float = SILENCE_S,
        secret: bytes = b"",
    ) -> None:
        self.target = target
        self._secret = secret
        self.role = role
        self.session: WorkerSession | None = None
        self.health = WorkerHealth()
        self.name = target
        """The worker's id, once it has told it."""
        self._stub: worker_pb2_grpc.WorkerAsyncStub | None = None
        self._router_id = router_id
        self._check = check
        self._changed = changed
        self._silence_s = silence_s
        self._task: asyncio.Task[None] | None = None

    @property
    def role_name(self) -> str:
        return _ROLE_NAMES[self.role]

    def start(self) -> None:
        self._task = asyncio.create_task(self._run(), name=f"worker {self.target}")

    async def stop(self) -> None:
        if self._task is not None:
            self._task.cancel()
            await asyncio.gather(self._task, return_exceptions=True)

    async def metrics(self, timeout_s: float) -> str | None:
        """Prometheus text. None: no answer within `timeout_s`."""
        if self._stub is None:
            return None
        with contextlib.suppress(grpc.aio.AioRpcError):
            return (await self._stub.GetMetrics(worker_pb2.GetMetricsRequest(), timeout=timeout_s)).text
        return None

    async def _run(self) -> None:
        async with open_aio_channel(self.target, self._secret, _CHANNEL_OPTIONS) as channel:
            self._stub = stub = worker_pb2_grpc.WorkerStub(channel)
            pause = RETRY_MIN_S
            said = ""
            patient_until = time.monotonic() + PATIENCE_S
            log.info("waiting for worker %s", self.target)
            while True:
                try:
                    info = await stub.GetInfo(worker_pb2.GetInfoRequest(), timeout=CONNECT_TIMEOUT_S)
                    patient_until = 0.0
                    await self._serve(stub, info)
                    pause, said = RETRY_MIN_S, ""
                except WorkerRefused as error:
                    if said != str(error):
                        log.error("worker %s is refused: %s", self.target, error)
                    said, pause = str(error), REFUSED_RETRY_S
                except grpc.aio.AioRpcError as error:
                    details = error.details() or ""
                    hint = remedy(details, self._secret)
                    problem = f"{error.code().name}: {details[:200]}{hint}"
                    if time.monotonic() < patient_until and not hint:
                        problem = ""
                    elif said != problem:
                        log.info("worker %s cannot be reached (%s); trying on", self.target, problem)
                    said = problem
                except TimeoutError:
                    log.info("worker %s accepted a session but does not read it; trying on", self.target)
                except Exception:
                    log.exception("worker %s: an unexpected error; trying on", self.target)
                await asyncio.sleep(pause * random.uniform(0.8, 1.2))
                pause = min(2 * pause, RETRY_MAX_S)

    def _check_worker(self, info: worker_pb2.WorkerInfo) -> None:
        """Raises WorkerRefused."""
        if info.role != self.role:
            raise WorkerRefused(
                f"it is a {_ROLE_NAMES.get(info.role, 'nameless')} worker, configured as {_ROLE_NAMES[self.role]}"
            )
        self._check(info)

    async def _serve(self, stub: worker_pb2_grpc.WorkerAsyncStub, info: worker_pb2.WorkerInfo) -> None:
        self._check_worker(info)
        call = stub.Session()
        try:
            hello = worker_pb2.Hello(router_id=self._router_id, version=tandem.__version__)
            async with asyncio.timeout(CONNECT_TIMEOUT_S):
                await call.write(worker_pb2.SessionRequest(hello=hello))
            self._check_worker(info)  # another worker may have connected meanwhile
            self.session = session = WorkerSession(info, call, silence_s=self._silence_s, health=self.health)
            self.name = info.worker_id
            log.info("worker %s is %s, epoch %d", self.target, info.worker_id, info.worker_epoch)
            self._changed()
            reason = await session.run()
            if not session.status.draining and self.health.failed(time.monotonic()):
                log.warning("worker %s gets no requests for a while: %s", info.worker_id, self.health.problem)
        finally:
            call.cancel()
            self.session = None
            self._changed()
        log.warning("lost worker %s: %s", info.worker_id, reason)


class Fleet:
    """All workers of one model. Sessions of different KV namespaces never serve together."""

    def __init__(
        self,
        decode_targets: Iterable[str],
        prefill_targets: Iterable[str],
        router_id: str,
        silence_s: float = SILENCE_S,
        secret: bytes = b"",
    ) -> None:
        targets = [(target, worker_pb2.ROLE_DECODE) for target in decode_targets]
        targets += [(target, worker_pb2.ROLE_PREFILL) for target in prefill_targets]
        self.clients = [
            WorkerClient(
                target,
                role,
                router_id,
                check=self._check,
                changed=self._wake,
                silence_s=silence_s,
                secret=secret,
            )
            for target, role in targets
        ]
        self._by_role = {role: [client for client in self.clients if client.role == role] for role in _ROLE_NAMES}
        self._changed = asyncio.Event()
        self._compared_at = 0.0

    def start(self) -> None:
        for client in self.clients:
            client.start()

    async def stop(self) -> None:
        await asyncio.gather(*(client.stop() for client in self.clients))

    def sessions(self, role: worker_pb2.Role.ValueType) -> list[WorkerSession]:
        """Connected workers of `role` that take new requests: the healthy ones, or all where none is."""
        now = time.monotonic()
        if now - self._compared_at >= COMPARE_S:
            self._compared_at = now
            self._eject_outliers(now)
        usable = [
            session for client in self._by_role[role] if (session := client.session) is not None and session.usable
        ]
        return [session for session in usable if session.health.available(now)] or usable

    @property
    def decode(self) -> list[WorkerSession]:
        return self.sessions(worker_pb2.ROLE_DECODE)

    @property
    def max_model_lens(self) -> list[int]:
        """Of the connected decode workers, healthy or not."""
        sessions = [client.session for client in self._by_role[worker_pb2.ROLE_DECODE]]
        return [
            session.info.max_model_len for session in sessions if session is not None and session.info.max_model_len
        ]

    @property
    def prefill(self) -> list[WorkerSession]:
        return self.sessions(worker_pb2.ROLE_PREFILL)

    async def wait_for_decode(self, timeout_s: float, avoid: Collection[tuple[str, int]] = ()) -> None:
        """Returns once a decode worker outside `avoid` is connected.

        Raises TandemError `unavailable` after `timeout_s`.
        """
        deadline = time.monotonic() + timeout_s
        while all(session.identity in avoid for session in self.decode):
            left = deadline - time.monotonic()
            if left <= 0:
                raise no_worker()
            self._changed.clear()
            try:
                # A worker that stops draining announces nothing: look again now and then.
                async with asyncio.timeout(min(left, 1.0)):
                    await self._changed.wait()
            except TimeoutError:
                continue

    def _eject_outliers(self, now: float) -> None:
        kinds: dict[tuple[int, str], list[WorkerSession]] = {}
        for client in self.clients:
            if (session := client.session) is not None:
                kinds.setdefault((client.role, session.info.hardware_class), []).append(session)
        for sessions in kinds.values():
            ejected = eject_outliers([session.health for session in sessions], now)
            for session in sessions:
                if session.health in ejected:
                    log.warning("worker %s gets no requests for a while: %s", session.name, session.health.problem)

    def _wake(self) -> None:
        self._changed.set()

    def _check(self, info: worker_pb2.WorkerInfo) -> None:
        for client in self.clients:
            other = client.session
            if other is None or not other.alive:
                continue
            if other.info.namespace != info.namespace:
                raise WorkerRefused(
                    f"its KV namespace {info.namespace.hex()[:16]} differs from {other.info.namespace.hex()[:16]} of "
                    f"{other.name}: another model, tokenizer, dtype or layout"
                )
            if other.info.compatibility != info.compatibility:
                raise WorkerRefused(f"its hand-over digest differs from that of {other.name}")
            if other.identity == (info.worker_id, info.worker_epoch):
                raise WorkerRefused(f"worker id {info.worker_id} is connected already, as {client.target}")


def no_worker() -> TandemError:
    return TandemError("unavailable", "no decode worker is connected; try again shortly", retry_after_s=1.0)
