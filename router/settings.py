"""Settings of the router process."""

from __future__ import annotations

import math
import re
import string
from dataclasses import dataclass, field
from pathlib import Path
from typing import ClassVar, Literal

from tandem.common.errors import ConfigError
from tandem.common.settings import Group

Disaggregate = Literal["auto", "always", "never"]
MAX_ROUTERS = 64
_DEPLOYMENT = re.compile(r"[A-Za-z0-9._-]{0,64}")


@dataclass(frozen=True, kw_only=True)  # no slots: a slotted class cannot inherit from two others with fields
class FrontDoorSettings:
    """What an operator turns at `tandem router` and, under the same names, at `tandem serve`. Everything else is a
    named constant beside the code that uses it."""

    basics: ClassVar[Group]
    """Basics"""
    host: str = "127.0.0.1"
    """Address of the HTTP and gRPC servers. 0.0.0.0: reachable from other machines."""
    port: int = 8000
    """Port of the HTTP server. 0: any free one; the ready line says which."""
    api_key: list[str] = field(default_factory=list, repr=False)
    """A key that clients must send; they are one tenant. Better in TANDEM_API_KEY, or in a file: others on this machine
    can read command lines. None: no authentication."""

    access: ClassVar[Group]
    """Access: tenants with keys, limits and shares."""
    api_keys_file: Path | None = None
    """File with one `name:sha256-hex-of-key` per line. None: no authentication."""
    tenants_file: Path | None = None
    """YAML file with tenants: keys or JWT claims, weight, limits, models (docs/tenants.md). Read again when it changes.
    None: one tenant, or those of `api_keys_file`."""
    redis: str = ""
    """URL of a Redis that routers share: service counters and limits. Empty: each router by itself."""
    deployment: str = ""
    """Routers with the same name share in `redis`, others do not: name each deployment of a model there. Empty: made of
    the model's name, configuration and tokenizer, and of the secret."""

    door: ClassVar[Group]
    """Front door: what is served to clients, and how."""
    grpc_port: int | None = None
    """Port of the gRPC API, `tandem.v1.Inference`. None: off."""
    routers: int = 1
    """Router processes on this machine, which share the port."""
    allowed_origins: list[str] = field(default_factory=list)
    """Web pages that may use the HTTP API from a browser (CORS): `https://app.example.com`, `null` for pages from
    files, `*` for all. Empty: none."""
    storage: Path | None = None
    """Folder for uploaded files and batches (`/v1/files`, `/v1/batches`). None: there is no batch lane."""
    tool_format: str = ""
    """How the model writes tool calls: hermes, llama3_json, mistral, mistral_named. Empty: as its template says."""
    max_body_bytes: int = 8 * 1024 * 1024
    """Size of a request body; larger ones are answered 413."""

    queue: ClassVar[Group]
    """Queue: who waits, for how long, and which worker is chosen."""
    disaggregate: Disaggregate = "auto"
    """auto: use a prefill worker where that pays; always: wherever one is alive; never: decode workers do it all."""
    target_ttft_s: float | None = None
    """Time to the first token that is promised to clients. Requests go where this and the other targets are missed
    least; nothing is refused for it. None: no such promise, and with no target at all the cheapest way is taken."""
    target_tpot_s: float | None = None
    """Mean time of an answer's later tokens that is promised (TPOT; some call it inter-token latency). None: no such
    promise."""
    target_gap_s: float | None = None
    """Wait between two tokens of an answer that is promised, at `target_percentile` of its tokens. None: no such
    promise."""
    target_percentile: float = 95.0
    """Percent of requests that shall meet the targets: how cautious placement is."""
    max_queued_requests: int = 2048
    """Requests that wait for their turn; more are answered 503."""
    max_queued_tokens: int = 8_000_000
    """Prompt tokens of requests that wait for their turn; more are answered 503."""
    max_requests: int = 4096
    """Sequences in flight, waiting ones included (a request with n=4 counts four); more are answered 503. Bounds the
    router's memory."""
    max_index_blocks: int = 4_000_000
    """Blocks of KV that the router remembers where they are: as many as its workers have, but no more than this. A
    million takes about 130 MB; what does not fit counts as not cached."""
    ttft_slo_s: float | None = None
    """A request that would certainly wait longer than this for its first token is answered 503 at once. None: it waits
    in the queue."""
    request_timeout_s: float = 600.0
    """Longest time from arrival to the last token."""
    worker_wait_s: float = 60.0
    """How long a request waits for a decode worker while there is none, or after it has lost its own."""

    process: ClassVar[Group]
    """Process: how it ends, and what it tells."""
    drain_grace_s: float = 30.0
    """How long running requests may take after Ctrl-C or SIGTERM before they are aborted."""
    log_requests: bool = True
    """One line in the log per request (no prompts, no keys) and one every 10 s of work. False: none."""
    log_level: Literal["debug", "info", "warning", "error"] = "info"
    """Level of this project's own loggers."""

    def __post_init__(self) -> None:
        names = [name for name in ("tenants_file", "api_keys_file", "api_key") if getattr(self, name)]
        if len(names) > 1:
            raise ConfigError(f"{' and '.join(names)}: give one of them; tenants have keys, too")
        if not all(self.api_key):
            raise ConfigError("api_key: must not be empty")
        if not _DEPLOYMENT.fullmatch(self.deployment):
            raise ConfigError(
                f"--deployment {self.deployment[:80]!r}: may have 64 letters, digits, dots, dashes and underscores"
            )
        if not 1 <= self.routers <= MAX_ROUTERS:
            raise ConfigError(f"--routers {self.routers}: must be between 1 and {MAX_ROUTERS}")
        if not 0 <= self.port <= 65535:
            raise ConfigError(f"--port {self.port}: must be between 0 and 65535")
        if self.grpc_port is not None and not 0 <= self.grpc_port <= 65535:
            raise ConfigError(f"grpc_port {self.grpc_port}: must be between 0 and 65535")
        if self.grpc_port == 0 and self.routers > 1:
            raise ConfigError("grpc_port 0: several routers share a port, name one")
        for setting in (
            "max_body_bytes",
            "max_queued_requests",
            "max_queued_tokens",
            "max_requests",
            "max_index_blocks",
        ):
            if getattr(self, setting) < 1:
                raise ConfigError(f"{setting} {getattr(self, setting)}: must be at least 1")
        if self.request_timeout_s <= 0:
            raise ConfigError(f"request_timeout_s {self.request_timeout_s:g}: must be positive")
        if self.ttft_slo_s is not None and self.ttft_slo_s <= 0:
            raise ConfigError(f"ttft_slo_s {self.ttft_slo_s:g}: must be positive")
        for setting in ("target_ttft_s", "target_tpot_s", "target_gap_s"):
            target = getattr(self, setting)
            if target is not None and not 0 < target < math.inf:
                raise ConfigError(f"{setting} {target:g}: must be a positive number of seconds")
        if not 50 <= self.target_percentile < 100:
            raise ConfigError(f"target_percentile {self.target_percentile:g}: must be at least 50 and below 100")
        for setting in ("drain_grace_s", "worker_wait_s"):
            if getattr(self, setting) < 0:
                raise ConfigError(f"{setting} {getattr(self, setting):g}: must not be negative")


@dataclass(frozen=True, kw_only=True)
class RouterConfig(FrontDoorSettings):
    """A front door, the model it speaks for, and the workers behind it."""

    basics: ClassVar[Group]
    model: str
    """Folder or hub id of the model: its tokenizer, chat template and limits are read, never its weights."""
    served_model_name: str | None = None
    """The name clients use. None: the last part of `model`, or tandem-small for the model that comes with the
    project."""
    decode_workers: list[str] = field(default_factory=list)
    """Decode workers: `unix:/run/decode-0.sock`, `10.0.0.4:9200`, or `dns:NAME:PORT` for all addresses of a name, which
    is looked up again and again. At least one, here or in `workers_file`."""
    prefill_workers: list[str] = field(default_factory=list)
    """Prefill workers, in the same way. Empty: decode workers compute prompts themselves."""
    workers_file: Path | None = None
    """YAML file with more workers, `decode: [10.0.0.4:9200]` and `prefill: []`, which is read again when it changes.
    None: there is none."""

    model_fingerprint: str = ""
    """First digits of the fingerprint of the model, as workers log it when they start: workers of another one are
    refused. Empty: that of `model`, where its weights are there; without them the first worker decides."""

    store: ClassVar[Group]
    """Store: the KV store whose contents placement goes by."""
    kv_store_address: str = ""
    """gRPC address of the store node that keeps named contexts, such as `unix:/run/kvstore.sock` or `10.0.0.4:9300`.
    Empty: no named contexts."""
    kv_directory: str = ""
    """The KV store's directory, followed to know what is cached where: `redis://...` or the gRPC address of a store
    node. Empty: `kv_store_address`, where that is set."""
    secret_file: str = ""
    """File with the deployment's secret, which workers and store nodes have, too. Empty: the variable TANDEM_SECRET
    holds it; without either they must ask for none."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if set(self.model_fingerprint.lower()) - set(string.hexdigits):
            raise ConfigError(f"model_fingerprint {self.model_fingerprint!r}: must be hexadecimal digits")
