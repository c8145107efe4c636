"""What a client notices of a batch: first tokens and tokens of one stream after the other, idle and beside each kind.

    python bench/batch_beside.py                                     # three topologies, all kinds of batches
    python bench/batch_beside.py --topologies unified --kinds prompts,outputs --rounds 5

Idle and busy rounds alternate, so that a noisy machine hits both; what counts is their ratio. `fresh` prompts have not
been seen before, `cached` ones go on from one long prompt whose KV is there when the batch comes. Batches that are
larger than a round are cancelled at its end; `batch_tokens_per_s` is what they got (prompt and output) beside the
client, and `alone` what they get without one. Prints a table and JSON.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import platform
import random
import re
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import httpx
from load import Result, stream
from systems import ROOT, Server

from tandem.engine.model.config import ModelConfig

MODEL = ROOT / "src/tandem/small_model"
Body = dict[str, Any]
TOPOLOGIES = {
    "unified": ("--prefill", "0"),
    "1P+1D": ("--prefill", "1", "--decode", "1"),
    "two": ("--prefill", "0", "--decode", "2"),
}
PROMPT_TOKENS, CACHED_TOKENS, OUTPUT_TOKENS = 128, 1_000, 16
PAUSE_S = 0.05
"""Between two requests of the client, on average."""
READY_S = 60.0
VOCABULARY = ModelConfig.from_folder(MODEL).vocab_size


class Lines:
    """Bodies of batches; prompts are random tokens, so that no cache helps."""

    def __init__(self, seed: int) -> None:
        self.random = random.Random(seed)

    def prompt(self, tokens: int) -> list[int]:
        return [self.random.randrange(10, VOCABULARY) for _ in range(tokens)]

    def prompts(self) -> tuple[str, Body]:
        return "/v1/completions", {"prompt": self.prompt(1_500), "max_tokens": 4, "ignore_eos": True}

    def outputs(self) -> tuple[str, Body]:
        return "/v1/completions", {"prompt": self.prompt(64), "max_tokens": 1_500, "ignore_eos": True}

    def many(self) -> tuple[str, Body]:
        return "/v1/completions", {"prompt": self.prompt(200), "max_tokens": 100, "n": 16, "ignore_eos": True}

    def embeddings(self) -> tuple[str, Body]:
        return "/v1/embeddings", {"input": [self.prompt(500) for _ in range(16)]}

    def structured(self) -> tuple[str, Body]:
        names = [f"field_{self.random.randrange(10**6)}" for _ in range(8)]
        properties = {name: {"type": "string", "maxLength": 60} for name in names}
        schema = {"type": "object", "properties": properties, "required": names}
        wanted = {"type": "json_schema", "json_schema": {"name": "answer", "schema": schema}}
        text = "".join(self.random.choice("abcdefgh ") for _ in range(400))
        messages = [{"role": "user", "content": text}]
        return "/v1/chat/completions", {"messages": messages, "max_tokens": 300, "response_format": wanted}


KINDS: dict[str, tuple[Callable[[Lines], tuple[str, Body]], int]] = {
    "prompts": (Lines.prompts, 600),
    "outputs": (Lines.outputs, 300),
    "many": (Lines.many, 200),
    "embeddings": (Lines.embeddings, 150),
    "structured": (Lines.structured, 300),
}
"""Kinds and numbers of lines: more than a round takes."""


@dataclass(slots=True)
class Times:
    """In seconds, of all requests of a kind."""

    first: list[float] = field(default_factory=list)
    per_token: list[float] = field(default_factory=list)
    errors: int = 0

    def add(self, result: Result) -> None:
        if result.error:
            self.errors += 1
            print("   error:", result.error, file=sys.stderr)
            return
        self.first.append(result.first)
        self.per_token.append(result.tpot)


@dataclass(frozen=True, slots=True)
class Row:
    """Milliseconds, and ratios of the p95 to the idle one."""

    topology: str
    kind: str
    prompts: str
    idle_first_p50: float
    idle_first_p95: float
    first_p50: float
    first_p95: float
    first_ratio: float
    idle_token_p95: float
    token_p95: float
    token_ratio: float
    requests: int
    errors: int
    batch_tokens_per_s: float
    alone_tokens_per_s: float


class Platform:
    """A server that runs, and its only client."""

    def __init__(self, url: str, seed: int) -> None:
        self.url = url
        self.lines = Lines(seed)
        self.shared = self.lines.prompt(CACHED_TOKENS)
        self.http = httpx.AsyncClient(base_url=url, timeout=120.0, trust_env=False)

    async def ready(self) -> None:
        end = time.monotonic() + READY_S
        while True:
            try:
                if (await self.http.get("/readyz")).status_code == 200:
                    return
            except httpx.TransportError:
                pass
            if time.monotonic() > end:
                raise SystemExit("the platform did not start")
            await asyncio.sleep(0.1)

    async def metric(self, name: str, *labels: str) -> float:
        text = (await self.http.get("/metrics")).text
        rows = re.findall(rf"^{name}(\{{.*\}})? (\S+)$", text, re.MULTILINE)
        return sum(float(value) for found, value in rows if all(label in found for label in labels))

    async def worked(self) -> float:
        """Prompt tokens of ended requests, and generated tokens, so far."""
        prompts = await self.metric("tandem_router_prompt_tokens_total")
        return prompts + await self.metric("tandem_worker_generated_tokens_total")

    async def begin(self, kind: str) -> str:
        """A batch whose lines run."""
        make, count = KINDS[kind]
        made = [make(self.lines) for _ in range(count)]
        rows = (
            json.dumps({"custom_id": str(index), "method": "POST", "url": url, "body": body})
            for index, (url, body) in enumerate(made)
        )
        files = {"file": ("in.jsonl", "\n".join(rows).encode())}
        file = (await self.http.post("/v1/files", data={"purpose": "batch"}, files=files)).json()
        body = {"input_file_id": file["id"], "endpoint": made[0][0], "completion_window": "24h"}
        batch: str = (await self.http.post("/v1/batches", json=body)).json()["id"]
        await self._until(lambda running: running > 0)
        return batch

    async def end(self, batch: str) -> None:
        await self.http.post(f"/v1/batches/{batch}/cancel")
        await self._until(lambda running: running == 0)

    async def _until(self, wanted: Callable[[float], bool]) -> None:
        end = time.monotonic() + READY_S
        while not wanted(await self.metric("tandem_router_batch_requests_running")):
            if time.monotonic() > end:
                raise SystemExit("the batch neither began nor ended")
            await asyncio.sleep(0.05)

    async def round(self, requests: int, times: dict[str, Times]) -> None:
        for index in range(requests):
            for name in ("fresh", "cached"):
                head = self.shared if name == "cached" else []
                body = {
                    "prompt": [*head, *self.lines.prompt(PROMPT_TOKENS if not head else 32)],
                    "max_tokens": OUTPUT_TOKENS,
                    "temperature": 0,
                    "ignore_eos": True,
                }
                result = await stream(self.url, body)
                if index or name == "fresh":  # the first of a round brings back what another round may have evicted
                    times[name].add(result)
                await asyncio.sleep(self.lines.random.expovariate(1 / PAUSE_S))


def percentile(values: list[float], share: float) -> float:
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, int(share * len(ordered)))] * 1000 if ordered else float("nan")


async def measure(running: Platform, topology: str, kind: str, options: argparse.Namespace) -> list[Row]:
    idle: dict[str, Times] = {name: Times() for name in ("fresh", "cached")}
    busy: dict[str, Times] = {name: Times() for name in ("fresh", "cached")}
    got: list[float] = []
    alone: list[float] = []
    for _ in range(options.rounds):
        await running.round(options.requests, idle)
        batch = await running.begin(kind)
        before, began = await running.worked(), time.monotonic()
        await asyncio.sleep(options.alone)
        now = await running.worked()
        alone.append((now - before) / (time.monotonic() - began))
        before, began = now, time.monotonic()
        await running.round(options.requests, busy)
        got.append((await running.worked() - before) / (time.monotonic() - began))
        await running.end(batch)
    return [row(topology, kind, name, idle[name], busy[name], got, alone) for name in idle]


def row(topology: str, kind: str, name: str, idle: Times, busy: Times, got: list[float], alone: list[float]) -> Row:
    idle_first, first = percentile(idle.first, 0.95), percentile(busy.first, 0.95)
    idle_token, token = percentile(idle.per_token, 0.95), percentile(busy.per_token, 0.95)
    return Row(
        topology,
        kind,
        name,
        idle_first_p50=round(percentile(idle.first, 0.5), 1),
        idle_first_p95=round(idle_first, 1),
        first_p50=round(percentile(busy.first, 0.5), 1),
        first_p95=round(first, 1),
        first_ratio=round(first / idle_first, 2),
        idle_token_p95=round(idle_token, 2),
        token_p95=round(token, 2),
        token_ratio=round(token / idle_token, 2),
        requests=len(busy.first),
        errors=idle.errors + busy.errors,
        batch_tokens_per_s=round(sum(got) / len(got)),
        alone_tokens_per_s=round(sum(alone) / len(alone)),
    )


async def run(url: str, topology: str, options: argparse.Namespace) -> list[Row]:
    running = Platform(url, options.seed)
    async with running.http:
        await running.ready()
        await running.round(10, {name: Times() for name in ("fresh", "cached")})  # warm
        rows: list[Row] = []
        for kind in options.kinds:
            for each in await measure(running, topology, kind, options):
                rows.append(each)
                print(
                    f"{topology:8} {kind:11} {each.prompts:7} "
                    f"first {each.idle_first_p95:6.1f} -> {each.first_p95:6.1f} "
                    f"(p50 {each.idle_first_p50:.1f} -> {each.first_p50:.1f}), x{each.first_ratio:.2f}; "
                    f"token {each.idle_token_p95:5.2f} -> {each.token_p95:5.2f}, x{each.token_ratio:.2f}; "
                    f"batch {each.batch_tokens_per_s}/s, alone {each.alone_tokens_per_s}/s; errors {each.errors}",
                    file=sys.stderr,
                    flush=True,
                )
        return rows


def machine() -> dict[str, object]:
    text = Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").exists() else ""
    name = re.search(r"model name\s*: (.*)", text)
    return {
        "cpu": name.group(1) if name else platform.processor(),
        "cores": os.cpu_count(),
        "load_average": os.getloadavg(),
        "flags": [flag for flag in ("avx2", "avx512f", "avx512_bf16", "amx_bf16") if flag in text],
    }


def tell(result: dict[str, object], out: Path | None) -> None:
    text = json.dumps(result, indent=1)
    print(text)
    if out:
        out.write_text(text + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    names = lambda text: text.split(",")  # noqa: E731
    parser.add_argument("--topologies", type=names, default=list(TOPOLOGIES))
    parser.add_argument("--kinds", type=names, default=list(KINDS))
    parser.add_argument("--rounds", type=int, default=3, help="idle and busy, alternating")
    parser.add_argument("--requests", type=int, default=25, help="of each sort of prompt, in a round")
    parser.add_argument("--alone", type=float, default=2.0, help="seconds of batch without a client, per round")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    before = machine()
    rows: list[Row] = []
    for topology in options.topologies:
        with tempfile.TemporaryDirectory(prefix="tandem-bench-") as folder:
            flags = [*TOPOLOGIES[topology], "--storage", folder, "--log-level", "warning"]
            command = [sys.executable, "-m", "tandem.runtime.cli", "serve", str(MODEL), *flags]
            server = Server(f"beside-{topology}", lambda port, c=command: [*c, "--port", str(port)], ROOT)
            process, url = server.start()
            try:
                rows += asyncio.run(run(url, topology, options))
            finally:
                process.terminate()
                process.wait()
    result = {"machine": before, "load_after": os.getloadavg(), "rows": [asdict(each) for each in rows]}
    tell(result, options.out)


if __name__ == "__main__":
    main()
