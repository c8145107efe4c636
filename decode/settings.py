"""Settings of a decode worker."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from tandem.common.errors import ConfigError
from tandem.common.settings import Group
from tandem.kvstore.settings import split_address
from tandem.worker.settings import WorkerConfig


@dataclass(frozen=True, slots=True, kw_only=True)
class DecodeConfig(WorkerConfig):
    """An engine, its address, and where prefill workers deliver KV."""

    basics: ClassVar[Group]
    listen: str = "127.0.0.1:9200"
    """Address of the gRPC service: HOST:PORT, or unix:/path for routers on the same host."""
    handover_listen: str = ""
    """HOST:PORT where prefill workers of other hosts deliver KV; they are told this very address. Empty:
    this host only."""

    def __post_init__(self) -> None:
        WorkerConfig.__post_init__(self)
        if self.handover_listen:
            host, _ = split_address(self.handover_listen, "handover_listen")
            if host in ("0.0.0.0", "::"):
                raise ConfigError(
                    f"handover_listen {self.handover_listen}: prefill workers are told this address, so it must be one "
                    "they can reach, not a wildcard"
                )
