"""A whole router in one object: fleet, HTTP and gRPC servers, and the order in which they start and drain."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import secrets
import socket
from collections.abc import Iterator

import uvicorn

from tandem.common.addresses import in_url
from tandem.common.errors import ConfigError
from tandem.common.fairness import ServiceCounters
from tandem.common.secret import read_secret
from tandem.router.batch.lane import BatchLane
from tandem.router.calls.accounts import Accounts
from tandem.router.calls.request_log import RequestLog
from tandem.router.fleet.session import SILENCE_S
from tandem.router.fleet.sources import open_sources
from tandem.router.fleet.workers import Fleet
from tandem.router.grpc_api.service import GrpcServer
from tandem.router.http.app import HttpApp
from tandem.router.metrics.router_metrics import RouterMetrics
from tandem.router.place import ALONE, RouterPlace, bind, cannot_listen, process_name
from tandem.router.service import Service
from tandem.router.settings import RouterConfig
from tandem.router.tenants.caller import ANYBODY, Caller
from tandem.router.tenants.tenants import Tenants
from tandem.router.text.served_model import ServedModel
from tandem.router.throughput import tell_regularly
from tandem.router.turns.deployment import deployment_of
from tandem.router.turns.shared_service import SharedCollector, SharedService
from tandem.router.turns.siblings import Siblings
from tandem.router.web.protocol import BoundedHttp

log = logging.getLogger(__name__)

KEEP_ALIVE_S = 75
"""An idle client connection stays open this long: longer than clients' pools, so that they never race a close."""
READY_POLL_S = 0.25
BACKLOG = 2048
"""Connections that wait to be taken; they are safe from the death of one router where several share the port."""


class Router:
    """`start`, then `stop`; or `serve_until(stopped)`. Raises ConfigError for settings that cannot work."""

    def __init__(self, config: RouterConfig, place: RouterPlace = ALONE, *, silence_s: float = SILENCE_S) -> None:
        sources = open_sources(config.decode_workers, config.prefill_workers, config.workers_file)
        if not config.decode_workers and config.workers_file is None:
            raise ConfigError(
                "--decode-workers: at least one decode worker is needed, such as unix:/run/decode-0.sock, or a file of "
                "workers (--workers-file)"
            )
        self.config = config
        self.place = place
        self.metrics = RouterMetrics()
        self.model = ServedModel.load(config)
        self.tenants = Tenants.open(
            config.tenants_file, config.api_keys_file, self.metrics.registry, api_keys=config.api_key
        )
        secret = read_secret(config.secret_file)
        counters = ServiceCounters()
        self._shared = (
            SharedService(config.redis, counters, prefix=f"tandem:{deployment_of(config, self.model.name, secret)}")
            if config.redis
            else None
        )
        self.accounts = Accounts(self.metrics.registry, self._shared.buckets if self._shared is not None else None)
        if self._shared is not None:
            self.metrics.registry.register(SharedCollector(self._shared))
            self._shared.buckets.routers = place.count  # those that are certain, until Redis tells of more
            if (tenants := self.tenants) is not None:
                self._shared.tenants = lambda: tenants.fingerprint
        self.fleet = Fleet(sources, secrets.token_hex(4), silence_s, secret, self.model.fingerprint)
        self.metrics.watch(self.fleet)
        self.siblings = Siblings(place.folder, place.index, place.count)
        self.service = Service(
            config, self.model, self.fleet, self.metrics, self.accounts, counters, self.siblings, secret
        )
        if self._shared is not None:
            self._shared.elders = self.service.admission.elders
        if config.storage is not None:
            self.service.batches = BatchLane(
                config.storage,
                self.service,
                caller_of=self._caller_of,
                room=lambda tokens: self.service.admission.idle,
            )
        if config.log_requests and config.log_level in ("debug", "info"):
            self.service.log = RequestLog(process_name(place))
        self.app = HttpApp(self.service, self.tenants, self.accounts)
        self.port = config.port
        self.grpc: GrpcServer | None = None
        self._server: _Server | None = None
        self._tasks: list[asyncio.Task[None]] = []

    @property
    def url(self) -> str:
        return f"http://{in_url(self.config.host)}:{self.port}"

    async def start(self) -> None:
        """Returns when both servers listen; workers connect in the background."""
        sockets = self._listen()
        self.port = sockets[0].getsockname()[1]
        self._server = _Server(
            uvicorn.Config(
                self.app,
                http=BoundedHttp,
                ws="none",
                lifespan="off",
                log_config=None,
                log_level="warning",
                access_log=False,
                server_header=False,
                proxy_headers=False,
                backlog=BACKLOG,
                timeout_keep_alive=KEEP_ALIVE_S,
                timeout_graceful_shutdown=max(1, round(self.config.drain_grace_s)),
            )
        )
        self._warn_of_own_limits()
        await self.siblings.start()
        if self._shared is not None:
            self._shared.start()
        self.fleet.start()
        if self.service.batches is not None:
            self.service.batches.start()
        self._tasks.append(asyncio.create_task(self._server.serve(sockets=sockets), name="http"))
        if self.config.grpc_port is not None:
            self.grpc = GrpcServer(
                self.service,
                self.tenants,
                self.accounts,
                self.config.host,
                self.config.grpc_port,
                shared=self.place.count > 1,
            )
            await self.grpc.start()
        self._tasks.append(asyncio.create_task(self._announce(), name="announce"))
        self._tasks.append(asyncio.create_task(self.service.pump_regularly(), name="admission"))
        if self.service.log is not None:
            self._tasks.append(asyncio.create_task(tell_regularly(self.service, self.service.log), name="throughput"))
        if self.tenants is not None:
            self._tasks.append(asyncio.create_task(self.tenants.watch(), name="tenants"))
        await self._server.listening.wait()

    async def stop(self) -> None:
        """Accepts nothing more, lets running requests finish within the grace period, then closes."""
        self.service.draining = True
        if self.service.batches is not None:
            await self.service.batches.stop()
        if self._server is not None:
            self._server.should_exit = True
            http, *others = self._tasks
            stopping = [http]
            if self.grpc is not None:
                stopping.append(asyncio.create_task(self.grpc.stop(self.config.drain_grace_s)))
            await asyncio.gather(*stopping, return_exceptions=True)
            for task in others:  # until here requests that wait for their turn still get it
                task.cancel()
            await asyncio.gather(*others, return_exceptions=True)
        if self.service.contexts is not None:
            await self.service.contexts.close()
        if self._shared is not None:
            await self._shared.close()
        await self.siblings.close()
        await self.fleet.stop()
        self.service.close()
        if self.service.log is not None:
            self.service.log.close()
        self.model.close()

    async def serve_until(self, stopped: asyncio.Event) -> None:
        """Starts the servers, waits for `stopped`, then drains for `drain_grace_s` at the most. Raises what `start`
        raises."""
        await self.start()
        await stopped.wait()
        log.info("draining: running requests have %g s to finish", self.config.drain_grace_s)
        await self.stop()

    def _listen(self) -> list[socket.socket]:
        """The port, and where the supervisor asks whether this process is well. Raises ConfigError."""
        host, port, path = self.config.host, self.config.port, self.place.health_path
        sockets = [bind(host, port) if self.place.listening < 0 else socket.socket(fileno=self.place.listening)]
        try:
            sockets[0].listen(BACKLOG)
        except OSError as error:
            raise cannot_listen(host, port, error) from error
        if path is not None:
            path.unlink(missing_ok=True)  # of a former life
            sockets.append(socket.socket(socket.AF_UNIX, socket.SOCK_STREAM))
            sockets[1].bind(str(path))
        return sockets

    def _warn_of_own_limits(self) -> None:
        if self.tenants is None or self.config.redis or self.place.count == 1 or self.place.index > 0:
            return
        if any(not caller.rates.unlimited for caller in self.tenants.roster.callers):
            count = self.place.count
            log.warning("tenants' limits hold for each of %d router processes; --redis makes them share", count)

    def _caller_of(self, tenant: str) -> Caller | None:
        """Who a tenant is now; None: nobody any more."""
        if self.tenants is None:
            return ANYBODY if tenant == ANYBODY.tenant else None
        return self.tenants.find(tenant)

    async def _announce(self) -> None:
        """Prints the ready line once, and keeps the gRPC health service honest."""
        said: bool | None = None
        printed = False
        while True:
            ready = self.service.ready
            if ready and not printed:
                printed = True
                print(f"tandem router ready: {self.url} serves {self.model.name}{self._details()}", flush=True)
            if ready != said and self.grpc is not None:
                await self.grpc.set_ready(ready)
            said = ready
            await asyncio.sleep(READY_POLL_S)

    def _details(self) -> str:
        grpc_text = f", grpc on port {self.grpc.port}" if self.grpc is not None else ""
        return grpc_text + (f", {self.place.count} routers" if self.place.count > 1 else "")


class _Server(uvicorn.Server):
    """Signals belong to `main.run`, which also has workers and gRPC to stop."""

    def __init__(self, config: uvicorn.Config) -> None:
        super().__init__(config)
        self.listening = asyncio.Event()

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        self.listening.set()

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield
