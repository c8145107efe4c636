"""Settings that prefill and decode workers share, besides those of their engine."""

from __future__ import annotations

import os
import socket
from dataclasses import dataclass
from typing import ClassVar, Literal

from tandem.common.errors import ConfigError
from tandem.common.settings import Group
from tandem.engine.settings import EngineConfig
from tandem.kvstore.settings import StoreSettings, split_address


@dataclass(frozen=True, slots=True, kw_only=True)
class WorkerConfig(EngineConfig, StoreSettings):
    """An engine, where it can be reached, and the KV store it uses."""

    basics: ClassVar[Group]
    listen: str = "127.0.0.1:9100"
    """Address of the gRPC service: HOST:PORT, or unix:/path for routers on the same host."""
    worker_id: str = ""
    """Name in logs, metrics and reports. Empty: made of role, host and process id."""

    process: ClassVar[Group]
    """Process: how it ends, and what it tells."""
    drain_grace_s: float = 30.0
    """How long running requests may take after SIGTERM before they are aborted, and go on elsewhere."""
    hardware_class: str = ""
    """Workers of one class are equally fast: a router learns their speeds together. Empty: the GPU's name, such as
    "nvidia-h100", or "cpu". Name it where equal names do not mean equal speeds."""
    metrics_port: int = 0
    """Port of Prometheus metrics on the loopback device (on all interfaces if `listen` is not local). 0: none."""
    log_level: Literal["debug", "info", "warning", "error"] = "info"
    """Level of this project's own loggers."""

    def __post_init__(self) -> None:
        EngineConfig.__post_init__(self)  # zero-argument super() does not work in a slotted dataclass
        StoreSettings.__post_init__(self)
        if self.drain_grace_s < 0:
            raise ConfigError(f"drain_grace_s {self.drain_grace_s}: must not be negative")
        if not self.listen.startswith("unix:"):
            split_address(self.listen, "listen")

    def named(self, role: str) -> str:
        """The worker's id."""
        return self.worker_id or f"{role}-{socket.gethostname()}-{os.getpid()}"
