"""Serving speed: Tandem unified and disaggregated beside transformers, vLLM (CPU) and llama.cpp, on the same weights.

All servers are started once and stay idle while another is measured; rounds are interleaved (A B C A B C ...), every
engine computes with one thread, every prompt is new text, so that no prefix cache helps. Prints a table and JSON.

    python bench/serve.py                                  # ours only, plus the peers found in .peers/
    python bench/serve.py --systems unified,vllm --rounds 5 --only decode_16
    python bench/serve.py --out bench/results/serve.json

bench/peers/README.md says how to set the peers up.
"""

from __future__ import annotations

import argparse
import asyncio
import gzip
import json
import lzma
import os
import platform
import random
import statistics
import subprocess
import sys
import time
import urllib.request
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

from load import Result, closed_loop, open_loop
from systems import Job, Server, all_systems, dtype_here
from tokenizers import Tokenizer

ROOT = Path(__file__).resolve().parents[1]
Body = dict[str, Any]


@dataclass(frozen=True, slots=True)
class Workload:
    """`concurrency` 0: requests come at the times of a trace."""

    name: str
    requests: int
    prompt_tokens: int
    output_tokens: int
    concurrency: int


WORKLOADS = (
    Workload("ttft_256", 6, 256, 8, 1),
    Workload("ttft_1k", 6, 1024, 8, 1),
    Workload("ttft_1800", 6, 1800, 8, 1),
    Workload("decode_1", 2, 128, 128, 1),
    Workload("decode_8", 8, 128, 128, 8),
    Workload("decode_16", 16, 128, 128, 16),
    Workload("trace", 40, 0, 0, 0),
)


@dataclass(frozen=True, slots=True)
class Figures:
    """One workload on one system in one round. Times in milliseconds."""

    ttft_p50: float
    ttft_max: float
    tpot_p50: float
    gap_p99: float
    output_tokens_per_s: float
    prompt_tokens_per_s: float
    errors: int


class Prompts:
    """Token ids of real text, never the same twice."""

    def __init__(self, model: Path) -> None:
        tokenizer = Tokenizer.from_file(str(model / "tokenizer.json"))
        books = sorted((ROOT / "examples/small_model/corpus").glob("*.xz"))
        text = "\n".join(lzma.decompress(book.read_bytes()).decode()[5000:400_000] for book in books)
        self.ids = tokenizer.encode(text, add_special_tokens=False).ids
        self.rng = random.Random(0)

    def reseeded(self, seed: int) -> Prompts:
        self.rng.seed(seed)
        return self

    def take(self, count: int) -> list[int]:
        start = self.rng.randrange(len(self.ids) - count)
        return self.ids[start : start + count]


def trace_lengths(count: int, limit: int) -> list[tuple[int, int]]:
    """Prompt and output lengths of the Azure 2023 conversation trace (Splitwise, ISCA'24), cut to the context."""
    folder = Path(os.environ.get("TANDEM_TRACES", ROOT.parent / "shared/traces"))
    path = folder / "azure2023/AzureLLMInferenceTrace_conv.csv.gz"
    if not path.exists():
        return []
    with gzip.open(path, "rt") as lines:
        rows = [line.strip().split(",")[1:3] for line in list(lines)[1:]]
    picked = random.Random(7).sample(rows, count)
    return [(min(int(p), limit - 330), min(int(o), 300)) for p, o in picked]


def bodies_of(workload: Workload, prompts: Prompts, limit: int) -> tuple[list[Body], list[float]]:
    if workload.concurrency:
        lengths = [(workload.prompt_tokens, workload.output_tokens)] * workload.requests
    else:
        lengths = trace_lengths(workload.requests, limit)
    at, now = [], 0.0
    for _ in lengths:
        now += prompts.rng.expovariate(4.0)
        at.append(now)
    bodies: list[Body] = [
        {
            "prompt": prompts.take(count),
            "max_tokens": output,
            "temperature": 0,
            "ignore_eos": True,
        }
        for count, output in lengths
    ]
    return bodies, at


def percentile(values: Sequence[float], share: float) -> float:
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, int(share * len(ordered)))] if ordered else float("nan")


def figures(results: list[Result], wall: float, bodies: list[Body]) -> Figures:
    good = [result for result in results if not result.error]
    for result in results:
        if result.error:
            print("   error:", result.error, file=sys.stderr)
    prompt_tokens = sum(len(body["prompt"]) for body in bodies)
    return Figures(
        ttft_p50=1e3 * percentile([r.first for r in good], 0.5),
        ttft_max=1e3 * max((r.first for r in good), default=float("nan")),
        tpot_p50=1e3 * percentile([r.tpot for r in good], 0.5),
        gap_p99=1e3 * percentile([gap for r in good for gap in r.gaps], 0.99),
        output_tokens_per_s=sum(r.tokens for r in good) / wall,
        prompt_tokens_per_s=prompt_tokens / wall,
        errors=len(results) - len(good),
    )


async def measure_server(url: str, workload: Workload, bodies: list[Body], at: list[float]) -> Figures:
    if workload.concurrency:
        results, wall = await closed_loop(url, bodies, workload.concurrency)
    else:
        results, wall = await open_loop(url, bodies, at)
    return figures(results, wall, bodies)


def measure_job(job: Job, workload: Workload, bodies: list[Body]) -> Figures:
    """At concurrency 1 each prompt is a job of its own, so that its times do not contain its wait."""
    size = 1 if workload.concurrency == 1 else len(bodies)
    results, wall = [], 0.0
    for start in range(0, len(bodies), size):
        prompts = [body["prompt"] for body in bodies[start : start + size]]
        answer = job.run(prompts, workload.output_tokens)
        wall += answer["wall_s"][0]
        for first, last in zip(answer["ttft_s"], answer["finish_s"], strict=True):
            results.append(Result(first=first, last=last, tokens=workload.output_tokens))
    return figures(results, wall, bodies)


def wait_ready(system: Server, process: subprocess.Popen[bytes], url: str) -> None:
    deadline = time.monotonic() + 400
    while time.monotonic() < deadline:
        if process.poll() is not None:
            raise SystemExit(f"{system.name} exited with {process.returncode}; its log: {system.log}")
        try:
            with urllib.request.urlopen(url + system.ready_path, timeout=2) as answer:
                if answer.status == 200:
                    return
        except OSError:
            time.sleep(0.3)
    raise SystemExit(f"{system.name} was not ready in 400 s; its log: {system.log}")


def median_of(rounds: list[Figures]) -> dict[str, float]:
    rows = [asdict(row) for row in rounds]
    return {key: statistics.median(row[key] for row in rows) for key in rows[0]}


def spread_of(rounds: list[Figures], key: str) -> list[float]:
    values = [asdict(row)[key] for row in rounds]
    return [min(values), max(values)]


def machine() -> dict[str, object]:
    """What the figures depend on. The load is that of the last 15 minutes, this bench included."""
    info = Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").exists() else ""
    fields = dict(line.split(":", 1) for line in info.split("\n\n")[0].splitlines() if ":" in line)
    facts = {name.strip(): value.strip() for name, value in fields.items()}
    return {
        "cpu": facts.get("model name") or platform.processor() or platform.machine(),
        "family": facts.get("cpu family"),
        "cores": os.cpu_count(),
        "load": round(os.getloadavg()[2], 1),
        "dtype": dtype_here(),
        "torch": version("torch"),
        "python": sys.version,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, default=ROOT / "examples/small_model/model")
    parser.add_argument("--systems", default="", help="comma-separated; default: all that are set up")
    parser.add_argument("--only", default="", help="comma-separated workloads")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--limit", type=int, default=2048, help="context length of the model, tokens")
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    chosen = [name for name in options.systems.split(",") if name]
    systems = [s for s in all_systems(options.model) if (s.name in chosen if chosen else s.needs.exists())]
    workloads = [w for w in WORKLOADS if not options.only or w.name in options.only.split(",")]
    if not trace_lengths(1, options.limit):
        workloads = [w for w in workloads if w.concurrency]
        print("trace: left out, the traces are not here (set TANDEM_TRACES)", file=sys.stderr)
    running: dict[str, tuple[subprocess.Popen[bytes], str]] = {}
    prompts = Prompts(options.model)
    found: dict[str, dict[str, list[Figures]]] = {w.name: {s.name: [] for s in systems} for w in workloads}
    try:
        for system in systems:
            if isinstance(system, Server):
                print(f"starting {system.name} ...", file=sys.stderr)
                process, url = system.start()
                running[system.name] = (process, url)
                wait_ready(system, process, url)
        for number in range(options.rounds + 1):  # round 0 warms up and is not counted
            for index, workload in enumerate(workloads):
                bodies, at = bodies_of(workload, prompts.reseeded(100 * number + index), options.limit)
                for system in systems:
                    if isinstance(system, Server):
                        got = asyncio.run(measure_server(running[system.name][1], workload, bodies, at))
                    elif workload.concurrency:
                        got = measure_job(system, workload, bodies)
                    else:
                        continue
                    print(f"round {number} {workload.name:10} {system.name:14} {got}", file=sys.stderr)
                    if number:
                        found[workload.name][system.name].append(got)
    finally:
        for system in systems:
            if isinstance(system, Job):
                system.stop()
        for process, _ in running.values():
            process.terminate()
        for process, _ in running.values():
            try:
                process.wait(20)
            except subprocess.TimeoutExpired:
                process.kill()
    report(found, options.out, options.rounds)


def report(found: dict[str, dict[str, list[Figures]]], out: Path | None, rounds: int) -> None:
    table: dict[str, dict[str, object]] = {}
    print(
        f"{'workload':10} {'system':14} {'TTFT ms':>9} {'TPOT ms':>8} {'gap p99':>8} {'out tok/s':>10}"
        f" {'vs unified':>10}"
    )
    for workload, systems in found.items():
        base = systems.get("unified") or []
        for name, rows in systems.items():
            if not rows:
                continue
            middle = median_of(rows)
            ratio = ""
            if base:
                pairs = [a.output_tokens_per_s / b.output_tokens_per_s for a, b in zip(rows, base, strict=False)]
                ratio = f"{statistics.median(pairs):.2f}"
            spread = spread_of(rows, "output_tokens_per_s")
            known = {key: value for key, value in middle.items() if value == value}  # without NaN
            table.setdefault(workload, {})[name] = {**known, "spread": spread, "vs_unified": ratio}
            print(
                f"{workload:10} {name:14} {middle['ttft_p50']:9.1f} {middle['tpot_p50']:8.2f} {middle['gap_p99']:8.1f}"
                f" {middle['output_tokens_per_s']:10.0f} {ratio:>10}"
            )
    document = {"bench": "serve", "rounds": rounds, "machine": machine(), "medians": table}
    text = json.dumps(document, indent=1)
    if out:
        out.parent.mkdir(parents=True, exist_ok=True)
        out.write_text(text + "\n")
    else:
        print(text)


if __name__ == "__main__":
    main()
