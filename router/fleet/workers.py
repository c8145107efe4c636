"""The workers a router uses: those that its sources list, as they come and go."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Collection, Sequence

from tandem.common.errors import TandemError
from tandem.common.fingerprint import SHOWN_DIGITS, shown
from tandem.proto import worker_pb2
from tandem.router.fleet.client import ConnectedAlready, WorkerClient, WorkerRefused
from tandem.router.fleet.health import eject_outliers
from tandem.router.fleet.reconcile import reconcile
from tandem.router.fleet.session import SILENCE_S, WorkerSession
from tandem.router.fleet.sources import Target, WorkerSource

log = logging.getLogger(__name__)

QUIET_S = 2.0
"""A worker that was not heard of for so long may be cut off: it gets nothing new."""
WATCH_AGAIN_S = 1.0
"""Pause after an unexpected error, until a source is followed again."""
COMPARE_S = 1.0
"""How often workers are compared with each other, to find outliers."""


class Fleet:
    """All workers of one model. Sessions of different KV namespaces never serve together."""

    def __init__(
        self,
        sources: Sequence[WorkerSource],
        router_id: str,
        silence_s: float = SILENCE_S,
        secret: bytes = b"",
        fingerprint: str = "",
    ) -> None:
        """`fingerprint`: digits with which that of every worker's model must begin; empty: the first worker decides."""
        self.sources = sources
        self._router_id = router_id
        self._silence_s = silence_s
        self._secret = secret
        self._fingerprint = fingerprint
        self._clients: dict[Target, WorkerClient] = {}
        self._by_role: dict[worker_pb2.Role.ValueType, list[WorkerClient]] = {}
        self._changed = asyncio.Event()
        self._compared_at = 0.0
        self._problems: dict[str, str] = {}
        """What was said of each source."""
        self._watchers: list[asyncio.Task[None]] = []
        self._stopped = False

    @property
    def clients(self) -> list[WorkerClient]:
        """All that are used, or are to be, and those that are leaving: decode workers first, each once."""
        return [client for client in self._clients.values() if not client.spare]

    def start(self) -> None:
        """Begins to connect, and to follow the sources."""
        self._follow()
        self._watchers = [
            asyncio.create_task(self._watch(source), name=f"workers of {source.name}") for source in self.sources
        ]

    async def stop(self) -> None:
        """Ends all sessions at once."""
        self._stopped = True
        for watcher in self._watchers:
            watcher.cancel()
        await asyncio.gather(*self._watchers, return_exceptions=True)
        await asyncio.gather(*(client.stop() for client in list(self._clients.values())))

    def sessions(self, role: worker_pb2.Role.ValueType) -> list[WorkerSession]:
        """Workers of `role` that take new requests and were heard of lately: the healthy ones, or all where none is."""
        now = time.monotonic()
        if now - self._compared_at >= COMPARE_S:
            self._compared_at = now
            self._eject_outliers(now)
        usable = [
            session
            for client in self._by_role.get(role, ())
            if (session := client.session) is not None and session.usable and session.silence.seconds < QUIET_S
        ]
        return [session for session in usable if session.health.available(now)] or usable

    @property
    def decode(self) -> list[WorkerSession]:
        return self.sessions(worker_pb2.ROLE_DECODE)

    @property
    def prefill(self) -> list[WorkerSession]:
        return self.sessions(worker_pb2.ROLE_PREFILL)

    @property
    def max_model_lens(self) -> list[int]:
        """Tokens that each connected decode worker can hold, healthy or not."""
        sessions = [client.session for client in self._by_role.get(worker_pb2.ROLE_DECODE, ())]
        return [
            session.info.max_model_len for session in sessions if session is not None and session.info.max_model_len
        ]

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
                # A worker that was quiet and is heard again announces nothing: look now and then.
                async with asyncio.timeout(min(left, 1.0)):
                    await self._changed.wait()
            except TimeoutError:
                continue

    async def _watch(self, source: WorkerSource) -> None:
        """Follows a source, whatever goes wrong inside it: what it listed last is in force."""
        while True:
            try:
                await source.watch(self._follow)
                return
            except Exception:
                log.exception("workers of the %s: an unexpected error; looking again", source.name)
                await asyncio.sleep(WATCH_AGAIN_S)

    def _follow(self) -> None:
        """Does what the sources say now."""
        if self._stopped:
            return
        for source in self.sources:
            if source.problem and self._problems.get(source.name) != source.problem:
                log.error("workers of the %s stay as they were: %s", source.name, source.problem)
            self._problems[source.name] = source.problem
        wanted = frozenset[Target]().union(*(source.wanted for source in self.sources))
        present = {target: client.leaving for target, client in self._clients.items()}
        changes = reconcile(wanted, present)
        for target in changes.come:
            self._clients[target] = client = WorkerClient(
                target, self._router_id, self, silence_s=self._silence_s, secret=self._secret
            )
            client.start()
        for target in changes.stay:
            self._clients[target].stay()
        self._sort()
        for target in changes.leave:
            log.info("worker %s is not listed any more; it finishes what it has", self._clients[target].name)
            self._clients[target].leave()

    def _sort(self) -> None:
        self._clients = dict(sorted(self._clients.items(), key=lambda item: (-item[0].role, item[0].address)))
        self._by_role = {
            role: [client for client in self._clients.values() if client.target.role == role]
            for role in (worker_pb2.ROLE_DECODE, worker_pb2.ROLE_PREFILL)
        }

    def _eject_outliers(self, now: float) -> None:
        kinds: dict[tuple[int, str], list[WorkerSession]] = {}
        for client in self._clients.values():
            if (session := client.session) is not None:
                kinds.setdefault((client.target.role, session.info.hardware_class), []).append(session)
        for sessions in kinds.values():
            ejected = eject_outliers([session.health for session in sessions], now)
            for session in sessions:
                if session.health in ejected:
                    log.warning("worker %s gets no requests for a while: %s", session.name, session.health.problem)

    # For the clients

    def changed(self) -> None:
        self._changed.set()

    def lost(self, client: WorkerClient) -> None:
        for source in self.sources:
            if client.target in source.wanted:
                source.look_again()

    def left(self, client: WorkerClient) -> None:
        """Forgets a client that has ended. A worker that was listed again meanwhile gets a new one."""
        if self._clients.get(client.target) is client:
            del self._clients[client.target]
            self._sort()
            self._follow()  # it may have been listed again meanwhile

    def check(self, info: worker_pb2.WorkerInfo) -> None:
        """Raises WorkerRefused for a worker of another model, or that cannot serve together with those that are
        connected."""
        if not info.fingerprint.hex().startswith(self._fingerprint):
            raise WorkerRefused(
                f"it has other weights or another tokenizer: its model's fingerprint is {shown(info.fingerprint)}, "
                f"that of this router's {self._fingerprint[:SHOWN_DIGITS]} (--model, or --model-fingerprint)"
            )
        for client in self._clients.values():
            other = client.session
            if other is None or not other.alive:
                continue
            if other.info.namespace != info.namespace:
                raise WorkerRefused(
                    f"its KV namespace {info.namespace.hex()[:16]} differs from {other.info.namespace.hex()[:16]} of "
                    f"{other.name}: another model, tokenizer, dtype or layout{self._which_is_right(info, other.info)}"
                )
            if other.info.compatibility != info.compatibility:
                raise WorkerRefused(f"its hand-over digest differs from that of {other.name}")
            if other.identity == (info.worker_id, info.worker_epoch):
                raise ConnectedAlready(f"{info.worker_id} is connected already, as {client.target.address}")

    def _which_is_right(self, info: worker_pb2.WorkerInfo, first: worker_pb2.WorkerInfo) -> str:
        """What to do where the first worker has decided which model it is."""
        if self._fingerprint or info.fingerprint == first.fingerprint:
            return ""
        return (
            f"; the first that came was believed, as --model has no weights here: give --model-fingerprint "
            f"({shown(info.fingerprint)} or {shown(first.fingerprint)})"
        )


def no_worker() -> TandemError:
    return TandemError("unavailable", "no decode worker is connected; try again shortly", retry_after_s=1.0)
