"""The life of a worker process: bind, load, serve, drain on SIGTERM. Both roles use it; see prefill/worker.py."""

from __future__ import annotations

import asyncio
import faulthandler
import gc
import logging
import os
import re
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path

import grpc.aio
import torch
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_health.v1._async import HealthServicer
from grpc_reflection.v1alpha import reflection

import tandem
from tandem.common.addresses import beside
from tandem.common.credentials import SERVER_OPTIONS, add_port
from tandem.common.ending import LATE_S, end_within, ending_signals
from tandem.common.errors import ConfigError
from tandem.common.secret import check_reachable, read_secret
from tandem.common.telemetry import serve_metrics, set_up_logging, set_up_tracing
from tandem.engine.engine import Engine
from tandem.engine.model.model import num_parameters, weight_bytes
from tandem.engine.schedule.block_manager import IntegrityError
from tandem.engine.step.faults import DeviceLost
from tandem.engine.step.warmup import warm_up
from tandem.engine.store.cache import EngineStore
from tandem.handover import HAND_OVER, HandoverMetrics, HandoverStats, PeerIdentity, local_host_id
from tandem.kvstore.process.open import OpenStore, open_home
from tandem.proto import worker_pb2, worker_pb2_grpc
from tandem.worker.metrics import ShortageCounter, WorkerMetrics
from tandem.worker.server import Handover, WorkerServer
from tandem.worker.session import OutputBridge
from tandem.worker.settings import WorkerConfig

log = logging.getLogger(__name__)

SWITCH_INTERVAL_S = 0.0001
"""The engine thread takes the GIL back between two kernels; with Python's 5 ms it waits that long whenever the event
loop is busy. Measured at 300 steps/s with 16 streams: the step's Python part is 1.7 ms instead of 2.3 ms."""
SAVE_S = 5.0
"""How long a worker that ends waits for KV on its way to the store."""
STOP_S = 5.0
"""How long it waits for the engine's thread."""
IDLE_CHECK_S = 10.0
"""How often the engine's books are checked while there is nothing to do."""
STALLED_S = 60.0
"""An engine that takes longer for one layer does not come back: a kernel, a driver or a lock hangs."""
STALLED_STATUS = 70
"""Exit status of a worker whose engine hangs, or stopped because its books are wrong."""
DEVICE_LOST_STATUS = 71
"""Exit status of a worker whose device makes nothing but errors."""

_SERVER_OPTIONS = [*SERVER_OPTIONS, ("grpc.max_receive_message_length", 64 << 20)]
_SERVICE = worker_pb2.DESCRIPTOR.services_by_name["Worker"].full_name


class WorkerProcess:
    """`await load()`, build what the role needs from `engine`, then `await serve(...)`, which returns after a drain."""

    engine: Engine
    _opened: OpenStore | None = None
    _store: EngineStore | None = None

    def __init__(self, config: WorkerConfig, role: str) -> None:
        """`role` is prefill or decode. Raises ConfigError."""
        self.config = config
        self.role = role
        self.worker_id = config.named(role)
        self.epoch = time.time_ns()
        self.secret = read_secret(config.secret_file)
        check_reachable(self.secret, "--listen", config.listen)
        self._server = grpc.aio.server(options=_SERVER_OPTIONS)

    async def load(self) -> None:
        """Binds the address first, so that a mistake shows before minutes of loading. Raises ConfigError."""
        set_up_logging(self.worker_id, self.config.log_level)
        set_up_tracing(self.role, self.worker_id)
        for number in ending_signals():
            signal.signal(number, _leave_at_once)
        try:
            port = add_port(self._server, self.config.listen, self.secret)
        except RuntimeError as error:
            raise ConfigError(f"--listen {self.config.listen}: cannot be bound; is another process there?") from error
        self.address = self.config.listen
        if not self.config.listen.startswith("unix:"):
            self.address = f"{self.config.listen.rpartition(':')[0]}:{port}"
        self._bridge = OutputBridge(asyncio.get_running_loop())
        started = time.monotonic()
        self.engine = await asyncio.to_thread(self._load_engine)
        log.info("loaded %s in %.1f s", self.config.model, time.monotonic() - started)

    def _load_engine(self) -> Engine:
        config = self.config
        self._opened = open_home(config, self.worker_id, self.epoch)
        if self._opened is not None:
            self._store = EngineStore(
                self._opened.home,
                chunk_tokens=config.kv_chunk_tokens,
                worker_id=self.worker_id,
                model=config.served_model_name or Path(config.model).name,
                near_allowed=config.kv_near,
            )
        engine = Engine(config, self._bridge.put, self._store, end_without_device)
        engine.start_masks()
        sized = engine.config
        seconds = warm_up(engine.loaded, engine.pool, sized.max_num_seqs, sized.max_num_batched_tokens)
        log.debug("warmed up in %.1f s", seconds)
        return engine

    @property
    def identity(self) -> PeerIdentity:
        key = HAND_OVER.key(self.secret)
        return PeerIdentity(self.worker_id, self.epoch, self.engine.loaded.compatibility, key)

    async def serve(
        self,
        handover: Handover,
        transferred: Callable[[], HandoverStats],
        kv_endpoint: worker_pb2.KvEndpoint | None,
    ) -> None:
        """Serves until SIGTERM or SIGINT, drains, and returns; a second signal ends the process at once. `transferred`
        gives what has been handed over, for metrics."""
        service = WorkerServer(self.engine, handover, self._info(kv_endpoint), self._store_node)
        stats = self._store.stats if self._store else None
        service.metrics = WorkerMetrics(service.status, service.registry, stats)
        service.registry.register(ShortageCounter(self.engine))
        service.registry.register(HandoverMetrics(transferred))
        if self.config.metrics_port:
            serve_metrics(beside(self.config.listen), self.config.metrics_port, service.registry)
        self._bridge.deliver = service.deliver
        health = HealthServicer()
        health_pb2_grpc.add_HealthServicer_to_server(health, self._server)
        worker_pb2_grpc.add_WorkerServicer_to_server(service, self._server)
        names = (_SERVICE, health_pb2.DESCRIPTOR.services_by_name["Health"].full_name, reflection.SERVICE_NAME)
        reflection.enable_server_reflection(names, self._server)
        stopping = _signals(self.config.drain_grace_s + SAVE_S + STOP_S + LATE_S)
        self.engine.start()
        await self._server.start()
        for name in ("", _SERVICE):
            await health.set(name, health_pb2.HealthCheckResponse.SERVING)
        sys.setswitchinterval(SWITCH_INTERVAL_S)
        gc.collect()
        gc.freeze()
        log.info("%s worker %s listens on %s", self.role, self.worker_id, self.address)
        print(f"ready {self.worker_id} {self.address}", flush=True)  # the supervisor waits for this line
        checks = asyncio.create_task(self._check_when_idle(service))
        watchdog = asyncio.create_task(self._end_when_stalled(service))
        await stopping.wait()
        checks.cancel()
        await health.enter_graceful_shutdown()
        log.info("draining %d requests, for at most %g s", service.num_live, self.config.drain_grace_s)
        finished, aborted = await service.drain(self.config.drain_grace_s)
        log.info("drained: %d finished, %d aborted", finished, aborted)
        await self._check_integrity()
        await service.close()
        await self._server.stop(grace=1.0)
        await asyncio.to_thread(self._close_engine)
        watchdog.cancel()

    def _close_engine(self) -> None:
        if not self.engine.wait_saved(SAVE_S):
            log.warning("not all KV could be saved within %g s", SAVE_S)
        self.engine.stop(STOP_S)
        if self._opened is not None:
            self._opened.close()

    async def _check_when_idle(self, service: WorkerServer) -> None:
        checked = 0
        while True:
            await asyncio.sleep(IDLE_CHECK_S)
            if service.num_live == 0 and service.num_started != checked:
                checked = service.num_started
                await self._check_integrity()

    async def _end_when_stalled(self, service: WorkerServer) -> None:
        """Ends this process where its engine does not move, or has stopped for good. The event loop would go on saying
        that all is well. Without this process routers go on elsewhere at once, and whoever started it starts it
        again."""
        late = 0
        while late < 2:  # once is not enough: this process may have been stopped, and goes on only now
            await asyncio.sleep(STALLED_S / 30)
            if self.engine.is_broken:
                log.critical("the engine has stopped: this process ends, with %d requests", service.num_live)
                os._exit(STALLED_STATUS)
            late = late + 1 if self.engine.stalled_s >= STALLED_S else 0
        log.critical(
            "the engine has not moved for %.0f s: this process ends, with %d requests; where its threads are follows",
            self.engine.stalled_s,
            service.num_live,
        )
        faulthandler.dump_traceback()
        os._exit(STALLED_STATUS)

    async def _check_integrity(self) -> None:
        try:
            await asyncio.to_thread(self.engine.check_integrity)
        except IntegrityError:
            log.exception("the engine's books do not balance: this is a bug, and its memory may leak")

    def _info(self, kv_endpoint: worker_pb2.KvEndpoint | None) -> worker_pb2.WorkerInfo:
        engine, config = self.engine, self.config
        loaded = engine.loaded
        return worker_pb2.WorkerInfo(
            worker_id=self.worker_id,
            worker_epoch=self.epoch,
            role=worker_pb2.Role.Value(f"ROLE_{self.role.upper()}"),
            model=loaded.config.name,
            namespace=loaded.namespace,
            compatibility=loaded.compatibility,
            version=tandem.__version__,
            block_size=config.block_size,
            num_blocks=engine.status().total_blocks,
            max_model_len=engine.max_model_len,
            max_num_seqs=engine.config.max_num_seqs,
            vocab_size=loaded.config.vocab_size,
            kv_endpoint=kv_endpoint,
            host_id=local_host_id(),
            hardware_class=config.hardware_class or _hardware_class(loaded.device),
            num_parameters=num_parameters(loaded.config),
            weight_bytes=weight_bytes(loaded.config, loaded.dtype, config.quantization),
            kv_bytes_per_token=engine.pool.row_bytes * engine.pool.num_layers,
            chunk_tokens=self._store.chunk_tokens if self._store is not None else 0,
            sends_cache_events=True,
            row_invariant=loaded.row_invariant,
            fingerprint=loaded.fingerprint,
        )

    def _store_node(self) -> str:
        return self._opened.node_id if self._opened is not None else ""


def end_without_device(lost: DeviceLost) -> None:
    """Ends this process at once, so that routers go on elsewhere and whoever started it starts it again."""
    log.critical("the device can compute nothing any more: this process ends", exc_info=lost)
    os._exit(DEVICE_LOST_STATUS)


def _hardware_class(device: torch.device) -> str:
    if device.type != "cuda":
        return device.type
    return re.sub(r"[^a-z0-9]+", "-", torch.cuda.get_device_name(device).lower()).strip("-")


def _signals(most_s: float) -> asyncio.Event:
    """Set by the first SIGTERM or SIGINT, after which the process has `most_s` to end. The second ends it."""
    stopping = asyncio.Event()

    def arrived() -> None:
        """Begins draining at the first signal, with a limit of `most_s` seconds; the second one ends the process at
        once."""
        if stopping.is_set():
            os._exit(1)
        end_within(most_s)
        stopping.set()

    loop = asyncio.get_running_loop()
    for number in ending_signals():
        loop.add_signal_handler(number, arrived)
    return stopping


def _leave_at_once(number: int, frame: object) -> None:
    """While loading there is nothing to drain."""
    os._exit(0)
