"""Settings of the router process."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

Disaggregate = Literal["auto", "always", "never"]


@dataclass(frozen=True, slots=True)
class RouterConfig:
    """What an operator turns. Everything else is a named constant beside the code that uses it."""

    model: str
    """Folder or hub id of the model: its tokenizer, chat template and limits are read, never its weights."""
    decode_workers: list[str] = field(default_factory=list)
    """gRPC targets of decode workers, such as `unix:/run/decode-0.sock` or `10.0.0.4:9100`. At least one."""
    prefill_workers: list[str] = field(default_factory=list)
    """gRPC targets of prefill workers. Empty: decode workers compute prompts themselves."""
    host: str = "127.0.0.1"
    """Address of the HTTP and gRPC servers."""
    port: int = 8000
    """Port of the HTTP server."""
    grpc_port: int | None = None
    """Port of the public gRPC service. None: off."""
    served_model_name: str | None = None
    """The name clients use. None: the last part of `model`."""
    tool_format: str = ""
    """How the model writes tool calls: hermes, llama3_json, mistral, mistral_named. Empty: as its template says."""
    api_keys_file: Path | None = None
    """File with one `name:sha256-hex-of-key` per line. None: no authentication."""
    tenants_file: Path | None = None
    """YAML file with tenants: keys or JWT claims, weight, limits, models. Read again when it changes. None: one tenant,
    or those of `api_keys_file`."""
    redis: str = ""
    """URL of a Redis that router replicas share: service counters and rate limits. Empty: each replica by itself."""
    kv_directory: str = ""
    """The KV store's directory, followed to know what is cached where: `redis://...` or the gRPC address of a store
    node. Empty: `kv_store`, where that is set."""
    kv_secret_file: str = ""
    """The store's secret, as its nodes have it. Empty: they ask for none."""
    replicas: int = 1
    """Router processes on this machine, which share the port."""
    ttft_slo_s: float | None = None
    """A request that would certainly wait longer than this for its first token is answered 503 at once. None: it waits
    in the queue."""
    max_queued_requests: int = 2048
    """Requests that wait for their turn; more are answered 503."""
    max_queued_tokens: int = 8_000_000
    """Prompt tokens of requests that wait for their turn; more are answered 503."""
    allowed_origins: list[str] | str = ""
    """Web pages that may use the HTTP API from a browser (CORS), separated by commas: `https://app.example.com`, `null`
    for pages from files, `*` for all. Empty: none."""
    storage: Path | None = None
    """Folder for uploaded files and batches (`/v1/files`, `/v1/batches`). None: there is no batch lane."""
    disaggregate: Disaggregate = "auto"
    """auto: use a prefill worker where that pays; always: wherever one is alive; never: decode workers do it all."""
    kv_store: str = ""
    """gRPC address of the store node that keeps named contexts, such as `unix:/run/kvstore.sock` or `10.0.0.4:9300`.
    Empty: no named contexts."""
    max_requests: int = 4096
    """Sequences in flight, waiting ones included (a request with n=4 counts four); more are answered 503. Bounds the
    router's memory."""
    max_body_bytes: int = 8 * 1024 * 1024
    """Size of a request body, bytes; larger ones are answered 413."""
    request_timeout_s: float = 600.0
    """Seconds from arrival to the last token."""
    worker_wait_s: float = 60.0
    """Seconds a request that lost its decode worker waits for another one."""
    keepalive_s: float = 15.0
    """Seconds of silence after which a stream gets a comment, so that proxies do not close it."""
    drain_grace_s: float = 30.0
    """Seconds that running requests get to finish after SIGTERM."""
    log_level: str = "info"
    """debug, info, warning or error."""

    @property
    def origins(self) -> list[str]:
        """Of `allowed_origins`, one by one."""
        given = self.allowed_origins
        texts = given.split(",") if isinstance(given, str) else given
        return [text.strip() for text in texts if text.strip()]
