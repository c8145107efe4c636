"""`tandem kvstore`: one store node as a process of its own, which workers of the host share and other nodes read.

Loads no torch. The node, its data plane and its registration come from `open.py`; here are gRPC control, metrics, and
the life of the process: bind, open, serve, drain on SIGTERM.
"""

from __future__ import annotations

import contextlib
import gc
import logging
import os
import signal
import socket
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import ClassVar, Literal

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_health.v1.health import HealthServicer
from grpc_reflection.v1alpha import reflection

from tandem.common.addresses import beside
from tandem.common.credentials import SERVER_OPTIONS, add_port
from tandem.common.ending import LATE_S, end_within, ending_signals
from tandem.common.errors import ConfigError
from tandem.common.scratch import scratch_folder
from tandem.common.secret import check_reachable, read_secret
from tandem.common.settings import Group
from tandem.common.telemetry import process_registry, serve_metrics, set_up_logging
from tandem.kvstore.contexts.contexts import open_shelf
from tandem.kvstore.directory import EmbeddedDirectory, add_directory_service, open_directory
from tandem.kvstore.process.metrics import StoreMetrics
from tandem.kvstore.process.open import open_node, read_encryption_key
from tandem.kvstore.process.service import KvNodeService
from tandem.kvstore.settings import StoreSettings, split_address
from tandem.proto import kvdirectory_pb2, kvnode_pb2, kvnode_pb2_grpc

log = logging.getLogger(__name__)

STOP_S = 5.0
"""Time to close what is open, after the drain."""
SWITCH_INTERVAL_S = 0.0005
"""A look-up takes 20 us. With Python's 5 ms it waits that long whenever another thread (write-back, the directory, the
disk's index) is at work."""
_THREADS = 8
_SERVICE = kvnode_pb2.DESCRIPTOR.services_by_name["KvNode"].full_name
_DIRECTORY = kvdirectory_pb2.DESCRIPTOR.services_by_name["KvDirectory"].full_name
_HEALTH = health_pb2.DESCRIPTOR.services_by_name["Health"].full_name


@dataclass(frozen=True, slots=True, kw_only=True)
class KvStoreConfig(StoreSettings):
    """A store node and where it can be reached."""

    basics: ClassVar[Group]
    """Basics"""
    listen: str = "127.0.0.1:9300"
    """Address of the gRPC service (control, and the directory if this node has it): HOST:PORT, or unix:/path."""
    kv_store_socket: str = ""
    """Unix path where workers and nodes of this host reach this node; give workers the same. Empty: a new one in a
    private temporary folder."""
    kv_host_bytes: int = 1 << 30
    """Host memory for KV. Taken as it fills, then kept."""
    node_id: str = ""
    """Name in logs, the directory and reports. Empty: made of host and process id."""

    process: ClassVar[Group]
    """Process: how it ends, and what it tells."""
    drain_grace_s: float = 10.0
    """On SIGTERM: how long the node may take to write what is not on a lower tier yet."""
    metrics_port: int = 0
    """Port of Prometheus metrics on the loopback device (on all interfaces if `listen` is not local). 0: none."""
    log_level: Literal["debug", "info", "warning", "error"] = "info"
    """Level of this project's own loggers."""

    def __post_init__(self) -> None:
        StoreSettings.__post_init__(self)  # zero-argument super() does not work in a slotted dataclass
        if self.kv_host_bytes <= 0:
            raise ConfigError(f"kv_host_bytes {self.kv_host_bytes}: a store node needs host memory")
        if self.drain_grace_s < 0:
            raise ConfigError(f"drain_grace_s {self.drain_grace_s}: must not be negative")
        if not self.listen.startswith("unix:"):
            split_address(self.listen, "listen")


def serve(config: KvStoreConfig) -> None:
    """Serves until SIGTERM or SIGINT, drains, and returns; a second signal ends the process at once. Raises
    ConfigError."""
    node_id = config.node_id or f"kvstore-{socket.gethostname()}-{os.getpid()}"
    set_up_logging(node_id, config.log_level)
    stopping = _signals(config.drain_grace_s + STOP_S + LATE_S)
    secret = read_secret(config.secret_file)
    check_reachable(secret, "--listen", config.listen)
    server = grpc.server(ThreadPoolExecutor(_THREADS, "kv-control"), options=SERVER_OPTIONS)
    address = _bind(server, config.listen, secret)
    with contextlib.ExitStack() as stack:
        unix_path = config.kv_store_socket or str(stack.enter_context(scratch_folder()) / "node.sock")
        embeds = config.kv_directory in ("", config.listen, address)
        directory = EmbeddedDirectory() if embeds else open_directory(config.kv_directory, secret)
        store = open_node(
            config, node_id, time.time_ns(), unix_path=unix_path, grpc_address=address, directory=directory
        )
        contexts = None
        try:
            encryption_key = read_encryption_key(config.kv_encryption_key_file)
            contexts = open_shelf(store.node, config.kv_disk, config.kv_chunk_tokens, encryption_key)
            contexts.start()
            registry = process_registry()
            StoreMetrics(store.stats, registry)
            if config.metrics_port:
                serve_metrics(beside(config.listen), config.metrics_port, registry)
            kvnode_pb2_grpc.add_KvNodeServicer_to_server(KvNodeService(store, directory, contexts, registry), server)
            if isinstance(directory, EmbeddedDirectory):
                add_directory_service(server, directory)
            health = HealthServicer()
            health_pb2_grpc.add_HealthServicer_to_server(health, server)
            names = (_SERVICE, _HEALTH, reflection.SERVICE_NAME, *([_DIRECTORY] if embeds else []))
            reflection.enable_server_reflection(names, server)
            server.start()
            for name in ("", _SERVICE):
                health.set(name, health_pb2.HealthCheckResponse.SERVING)
            sys.setswitchinterval(SWITCH_INTERVAL_S)
            gc.collect()
            gc.freeze()
            log.info("store node %s listens on %s, for workers of this host on %s", node_id, address, unix_path)
            log.info("the directory is %s", "here" if embeds else f"at {config.kv_directory}")
            print(f"ready {node_id} {address}", flush=True)  # the supervisor waits for this line
            stopping.wait()
            health.enter_graceful_shutdown()
            log.info("draining, for at most %g s", config.drain_grace_s)
            if not store.node.flush(config.drain_grace_s):
                log.warning("not everything was written to the lower tiers in time")
        finally:
            server.stop(grace=1.0).wait()
            if contexts is not None:
                contexts.close()
            store.close()


def _bind(server: grpc.Server, listen: str, secret: bytes) -> str:
    """Binds before anything else, so that a mistake shows at once. The address for clients."""
    try:
        port = add_port(server, listen, secret)
    except RuntimeError as error:
        raise ConfigError(f"--listen {listen}: cannot be bound; is another process there?") from error
    return listen if listen.startswith("unix:") else f"{listen.rpartition(':')[0]}:{port}"


def _signals(most_s: float) -> threading.Event:
    """Set by the first SIGTERM or SIGINT, after which the process has `most_s` to end. The second ends it."""
    stopping = threading.Event()

    def arrived(number: int, frame: object) -> None:
        """Begins draining at the first signal, with a limit of `most_s` seconds; the second one ends the process at
        once."""
        if stopping.is_set():
            os._exit(1)
        end_within(most_s)
        stopping.set()

    for number in ending_signals():
        signal.signal(number, arrived)
    return stopping
