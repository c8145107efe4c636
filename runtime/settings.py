"""Settings of `tandem serve`."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from tandem.common.errors import ConfigError
from tandem.engine.settings import EngineConfig
from tandem.kvstore.settings import StoreSettings

BUNDLED_MODEL = Path(__file__).resolve().parent.parent / "examples" / "small_model" / "model"
"""In a clone of the project; a wheel comes without it."""

MAX_ROUTERS = 64


@dataclass(frozen=True, slots=True, kw_only=True)
class ServeConfig(EngineConfig, StoreSettings):
    """The whole platform on this machine. Engine settings go to every worker, `kv_` settings to one store node that all
    of them share. Settings of the router that are not listed here are read from its environment variables, see
    `tandem router --help`."""

    model: str = ""
    """A folder in Hugging Face format, or a hub id (OWNER/NAME). Empty: the small model that comes with the project."""
    host: str = "127.0.0.1"
    """Address of the HTTP server. 0.0.0.0: reachable from other machines."""
    port: int = 8000
    """Port of the HTTP server. 0: any free one; the ready line says which."""
    grpc_port: int | None = None
    """Port of the gRPC API, `tandem.v1.Inference`. None: off."""
    api_keys_file: Path | None = None
    """File with one `name:sha256-hex-of-key` per line. None: no authentication."""
    tenants_file: Path | None = None
    """YAML file with tenants, their keys, weights and limits. None: one tenant, or `api_keys_file`'s."""
    allowed_origins: list[str] | str = ""
    """Web pages that may use the HTTP API from a browser (CORS), separated by commas: `https://app.example.com`, `null`
    for pages from files, `*` for all. Empty: none."""
    storage: Path | None = None
    """Folder for uploaded files and batches. None: no batch lane."""
    redis: str = ""
    """URL of a Redis in which routers share service counters and rate limits. Empty: each counts by itself."""
    routers: int = 1
    """Router processes, which share the port."""
    tool_format: str = ""
    """How the model writes tool calls: hermes, llama3_json, mistral, mistral_named. Empty: as its template says."""
    roles: Literal["disaggregated", "unified"] = "disaggregated"
    """unified: no prefill workers; decode workers compute prompts themselves."""
    prefill: int = 1
    """Prefill workers."""
    decode: int = 1
    """Decode workers."""
    disaggregate: Literal["auto", "always", "never"] | None = None
    """When the router uses a prefill worker. None: the router's own default."""
    kv_host_bytes: int = 512 << 20
    """Host memory of the store node, bytes; taken as it fills. 0: no store node."""
    kv_node: str = ""
    """Unix path of a store node that runs on this host already. Empty: `tandem serve` runs one."""
    drain_grace_s: float = 30.0
    """On Ctrl-C or SIGTERM: how long running requests may take before they are aborted."""
    log_level: Literal["debug", "info", "warning", "error"] = "info"
    """Of all processes."""

    def __post_init__(self) -> None:
        EngineConfig.__post_init__(self)  # zero-argument super() does not work in a slotted dataclass
        StoreSettings.__post_init__(self)
        if self.tenants_file is not None and self.api_keys_file is not None:
            raise ConfigError("--tenants_file and --api_keys_file: give one of them; tenants have keys, too")
        if self.decode < 1:
            raise ConfigError(f"--decode {self.decode}: at least one decode worker is needed")
        if not 1 <= self.routers <= MAX_ROUTERS:
            raise ConfigError(f"--routers {self.routers}: must be between 1 and {MAX_ROUTERS}")
        if self.prefill < 0:
            raise ConfigError(f"--prefill {self.prefill}: must not be negative")
        if not 0 <= self.port <= 65535:
            raise ConfigError(f"--port {self.port}: must be between 0 and 65535")
        if self.grpc_port is not None and not 0 <= self.grpc_port <= 65535:
            raise ConfigError(f"--grpc_port {self.grpc_port}: must be between 0 and 65535")
        if not self.model and not (BUNDLED_MODEL / "config.json").is_file():
            raise ConfigError("--model is missing: this installation comes without the small model, name a folder")

    @property
    def num_prefill(self) -> int:
        return 0 if self.roles == "unified" else self.prefill

    @property
    def model_folder(self) -> str:
        return self.model or str(BUNDLED_MODEL)

    def engine_settings(self) -> dict[str, object]:
        """Fields of EngineConfig as a worker's configuration file has them."""
        values = {field.name: getattr(self, field.name) for field in dataclasses.fields(EngineConfig)}
        return values | {"model": self.model_folder}

    def store_settings(self) -> dict[str, object]:
        """Fields of StoreSettings as a store node's configuration file has them."""
        return {field.name: getattr(self, field.name) for field in dataclasses.fields(StoreSettings)}
