"""Which processes `tandem serve` runs, with which settings: pure, no processes here."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from tandem.common.checkpoint import model_name
from tandem.engine.settings import EngineConfig
from tandem.kvstore.settings import StoreSettings
from tandem.router.settings import FrontDoorSettings
from tandem.runtime.devices import deal_out
from tandem.runtime.settings import ServeConfig

_KNOWN_TO_WORKERS = ("kv_chunk_tokens", "secret_file", "kv_near")
"""Settings of the store that workers need; the rest is between the node and its tiers."""


@dataclass(frozen=True, slots=True)
class ProcessSpec:
    """One process: `tandem COMMAND --config FILE`, where FILE holds `settings`."""

    name: str
    command: str
    settings: dict[str, object]
    place: int = 0
    """A router's place: which of those that share the port."""


def served_name(config: ServeConfig) -> str:
    """The model's name in the API."""
    return config.served_model_name or model_name(config.model_folder)


def processes_of(
    config: ServeConfig, run_directory: Path, port: int, free_on_gpus: Sequence[int] = ()
) -> list[ProcessSpec]:
    """The store node first, which ends last; then the workers, the routers last. `port` is theirs, already chosen.

    `free_on_gpus` are bytes. Raises ConfigError where the workers do not fit.
    """
    store = _store_of(config, run_directory)
    shared = config.part(EngineConfig) | {
        "model": config.model_folder,
        "served_model_name": served_name(config),
        "drain_grace_s": config.drain_grace_s,
        "log_level": config.log_level,
        "metrics_port": 0,
        "kv_store_socket": store[0].settings["kv_store_socket"] if store else config.kv_store_socket,
        **{name: getattr(config, name) for name in _KNOWN_TO_WORKERS},
    }
    roles = ["prefill"] * config.prefill + ["decode"] * config.decode
    seats = deal_out(
        len(roles),
        free_on_gpus,
        device=config.device,
        gpu_memory_bytes=config.gpu_memory_bytes,
        kv_cache_bytes=config.kv_cache_bytes,
    )
    workers: list[ProcessSpec] = []
    for index, (role, seat) in enumerate(zip(roles, seats, strict=True)):
        name = f"{role}-{index if role == 'prefill' else index - config.prefill}"
        own: dict[str, object] = {"worker_id": name, "listen": f"unix:{run_directory / name}.sock"}
        workers.append(ProcessSpec(name, role, shared | own | dataclasses.asdict(seat)))
    router: dict[str, object] = config.part(FrontDoorSettings) | {
        "model": config.model_folder,
        "served_model_name": served_name(config),
        "port": port,
        "secret_file": config.secret_file,
        "prefill_workers": [worker.settings["listen"] for worker in workers if worker.command == "prefill"],
        "decode_workers": [worker.settings["listen"] for worker in workers if worker.command == "decode"],
    }
    if store:
        router["kv_store_address"] = store[0].settings["listen"]
    return [*store, *workers, *routers_of(router, config.routers)]


def routers_of(settings: dict[str, object], count: int) -> list[ProcessSpec]:
    """`count` routers with the same settings, each with a place of its own."""
    names = ["router"] if count == 1 else [f"router-{index}" for index in range(count)]
    return [ProcessSpec(name, "router", settings, index) for index, name in enumerate(names)]


def _store_of(config: ServeConfig, run_directory: Path) -> list[ProcessSpec]:
    if config.kv_store_socket or not config.kv_host_bytes:
        return []
    own: dict[str, object] = {
        "node_id": f"kvstore-{config.kv_peer_listen}" if config.kv_peer_listen else "kvstore",
        "listen": f"unix:{run_directory / 'kvstore.sock'}",
        "kv_store_socket": str(run_directory / "kvstore.kv"),
        "kv_quotas": _quotas(config),
        "drain_grace_s": config.drain_grace_s,
        "log_level": config.log_level,
        "metrics_port": 0,
    }
    return [ProcessSpec("kvstore", "kvstore", config.part(StoreSettings) | own)]


def _quotas(config: ServeConfig) -> dict[str, float]:
    """Shares of the store by tenant; the tenants file goes before the setting. Raises ConfigError."""
    if config.tenants_file is None:
        return config.kv_quotas
    from tandem.router.tenants.tenant_file import read_tenants

    tenants = read_tenants(config.tenants_file, {}).callers
    return config.kv_quotas | {each.tenant: each.kv_quota for each in tenants if each.kv_quota is not None}


def ready_text(config: ServeConfig, url: str, seconds: float) -> str:
    """What the user sees once everything runs: where it is, and ways to try it."""
    name = served_name(config)
    kind = f"{config.prefill} prefill + {config.decode} decode" if config.prefill else f"{config.decode} unified"
    variable = "TANDEM_API_KEY" if config.api_key else "OPENAI_API_KEY"
    header = f'    -H "Authorization: Bearer ${variable}" \\\n' if config.needs_key else ""
    key = f'os.environ["{variable}"]' if config.needs_key else '"none"'
    imports = "import os\n  " if config.needs_key else ""
    grpc = f"\n  gRPC              port {config.grpc_port}" if config.grpc_port is not None else ""
    return f"""\
Tandem is ready: {url} serves {name} ({kind}, started in {seconds:.1f} s)

  curl -N {url}/v1/chat/completions -H 'Content-Type: application/json' \\
{header}    -d '{{"model": "{name}", "stream": true, "messages": [{{"role": "user", "content": "Who are you?"}}]}}'

  {imports}from openai import OpenAI
  client = OpenAI(base_url="{url}/v1", api_key={key})
  reply = client.chat.completions.create(
      model="{name}", messages=[{{"role": "user", "content": "Who are you?"}}]
  )
  print(reply.choices[0].message.content)

  At the terminal   tandem chat, tandem status
  API               {url}/docs
  Metrics           {url}/metrics{grpc}
  Ctrl-C stops it.
"""
