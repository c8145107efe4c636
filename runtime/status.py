"""`tandem status`: whether a server is up, and what it is doing."""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import ClassVar

from prometheus_client.parser import text_string_to_metric_families

from tandem.common.errors import ConfigError
from tandem.common.settings import Group, parse_settings
from tandem.runtime.client import Client, ClientSettings, ServerError

EXAMPLES = (
    ("the server that runs here", "tandem status"),
    ("for programs", "tandem status --json"),
    ("a server elsewhere, looked at for five seconds", "tandem status --url http://10.0.0.5:8000 --over-s 5"),
)

Samples = dict[tuple[str, str, str], float]
"""Values by metric, worker and role; others are summed up."""


@dataclass(frozen=True, slots=True, kw_only=True)
class StatusConfig(ClientSettings):
    """Settings of `tandem status`."""

    basics: ClassVar[Group]
    json: bool = False
    """Print JSON."""
    over_s: float = 1.0
    """How long it looks, to tell tokens per second. 0: one look, no rates."""

    def __post_init__(self) -> None:
        if not 0 <= self.over_s <= 3600:
            raise ConfigError(f"over_s {self.over_s:g}: must be between 0 and an hour")


@dataclass(frozen=True, slots=True)
class Worker:
    """A worker as the router's metrics show it."""

    name: str
    role: str
    connected: bool
    draining: bool
    """It takes nothing new."""
    problem: str
    """Why it is not connected; empty: nothing is known."""
    running: int
    waiting: int
    kv_used: float
    """Share of the KV pool that running and cached sequences take, 0 to 1."""
    row_invariant: bool
    """What it computes for a request has the same bits whatever runs beside it."""


@dataclass(frozen=True, slots=True)
class Status:
    """What a server is doing: the JSON that `--json` prints."""

    url: str
    ready: bool
    model: str
    version: str
    workers: list[Worker]
    in_flight: int
    queued: int
    prompt_tokens_per_s: float | None
    output_tokens_per_s: float | None


SETTINGS = StatusConfig


def main(argv: Sequence[str]) -> int:
    """Exit status: 0 when the server is ready, 1 when it is not or cannot be reached. Raises ConfigError."""
    config = parse_settings(
        StatusConfig,
        argv,
        command="tandem status",
        description="Says whether a server is up, what its workers do, and how fast. Ends with status 1 if it is not "
        "ready to serve.",
        examples=EXAMPLES,
    )
    try:
        status = read_status(Client(config), config.over_s)
    except ServerError as error:
        print(json.dumps({"ready": False, "error": str(error)}) if config.json else f"tandem status: {error}")
        return 1
    print(json.dumps(asdict(status), indent=2) if config.json else as_text(status))
    return 0 if status.ready else 1


def read_status(client: Client, over_s: float) -> Status:
    """Raises ServerError."""
    ready = json.loads(client.get("/readyz", well=(200, 503)))
    models = json.loads(client.get("/v1/models"))["data"]
    first, started = _samples(client.get("/metrics")), time.monotonic()
    last = first
    if over_s:
        time.sleep(over_s)
        last = _samples(client.get("/metrics"))
    seconds = time.monotonic() - started

    def rate(name: str) -> float | None:
        return (_total(last, name) - _total(first, name)) / seconds if over_s else None

    return Status(
        url=client.url,
        ready=ready["status"] == "ready",
        model=models[0]["id"] if models else "",
        version=json.loads(client.get("/version"))["version"],
        workers=[_worker(each, last) for each in ready["workers"]],
        in_flight=round(_total(last, "tandem_router_sequences_in_flight")),
        queued=round(_total(last, "tandem_router_waiting_requests")),
        prompt_tokens_per_s=rate("tandem_router_prompt_tokens_total"),
        output_tokens_per_s=rate("tandem_router_completion_tokens_total"),
    )


def as_text(status: Status) -> str:
    """What people read: a line for the server, one for each worker, and what there is to do."""
    state = "ready" if status.ready else "NOT READY"
    lines = [f"{status.url} is {state}: {status.model}, Tandem {status.version}", ""]
    lines.append(f"{'worker':<16}{'role':<10}{'running':>9}{'waiting':>9}{'KV used':>9}")
    for worker in status.workers:
        figures = f"{worker.running:>9}{worker.waiting:>9}{worker.kv_used:>9.0%}"
        if not worker.connected:
            figures = f"     away  {worker.problem}".rstrip()
        elif worker.draining:
            figures += "  draining"
        lines.append(f"{worker.name or '?':<16}{worker.role:<10}{figures}")
    lines += ["", f"in flight {status.in_flight}, queued {status.queued}"]
    if status.output_tokens_per_s is not None and status.prompt_tokens_per_s is not None:
        lines[-1] += f", {status.prompt_tokens_per_s:.0f} prompt and {status.output_tokens_per_s:.0f} output tokens/s"
    others = [worker.name for worker in status.workers if worker.connected and not worker.row_invariant]
    if others:
        lines.append(
            f"the bits of an output may depend on what runs beside it on {', '.join(others)} "
            "(--batch-invariant true: nowhere)"
        )
    return "\n".join(lines)


def _samples(text: str) -> Samples:
    samples: Samples = {}
    for family in text_string_to_metric_families(text):
        for sample in family.samples:
            key = (sample.name, sample.labels.get("worker", ""), sample.labels.get("role", ""))
            samples[key] = samples.get(key, 0.0) + sample.value
    return samples


def _total(samples: Samples, name: str) -> float:
    return sum(value for (found, _, _), value in samples.items() if found == name)


def _worker(reported: dict[str, object], samples: Samples) -> Worker:
    name, role = str(reported["worker"] or reported["target"]), str(reported["role"])

    def value(field: str) -> float:
        return samples.get((f"tandem_worker_{field}", name, role), 0.0)

    blocks = value("total_blocks")
    used = 1 - value("free_blocks") / blocks if blocks else 0.0
    return Worker(
        name,
        role,
        bool(reported["connected"]),
        bool(reported["draining"]),
        str(reported["problem"] or ""),
        round(value("running")),
        round(value("waiting")),
        used,
        bool(reported.get("row_invariant")),
    )
