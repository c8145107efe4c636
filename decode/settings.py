"""Settings of a decode worker."""

from __future__ import annotations

from dataclasses import dataclass

from tandem.common.errors import ConfigError
from tandem.engine.worker_settings import WorkerConfig
from tandem.kvstore.settings import split_address


@dataclass(frozen=True, slots=True, kw_only=True)
class DecodeConfig(WorkerConfig):
    """An engine, its address, and where prefill workers deliver KV."""

    listen: str = "127.0.0.1:9200"
    """Address of the gRPC service: HOST:PORT, or unix:/path for routers on the same host."""
    kv_unix: str = ""
    """Path of the socket where prefill workers of this host deliver KV through shared memory. Empty: a new one in a
    private temporary folder."""
    kv_listen: str = ""
    """HOST:PORT where prefill workers of other hosts deliver KV; they are told this very address. Empty:
    this host only."""
    handover_timeout_s: float = 3.0
    """A request whose prefill worker has not opened its KV stream after this time is computed here."""

    def __post_init__(self) -> None:
        WorkerConfig.__post_init__(self)
        if self.handover_timeout_s <= 0:
            raise ConfigError(f"handover_timeout_s {self.handover_timeout_s}: must be positive")
        if self.kv_listen:
            host, _ = split_address(self.kv_listen, "kv_listen")
            if host in ("0.0.0.0", "::"):
                raise ConfigError(
                    f"kv_listen {self.kv_listen}: prefill workers are told this address, so it must be one they can "
                    "reach, not a wildcard"
                )
