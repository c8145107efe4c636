"""Where requests go: our placement beside Dynamo's router core and three simple policies, on one pool of mock workers.

    python bench/placement.py --trace TRACE.jsonl.gz [--dynamo PYTHON] [--repeats 3] [--parts ...] [--json FILE]

The trace is in Mooncake's format (`timestamp` in ms, `input_length`, `output_length`, `hash_ids` of blocks of 512
tokens on a prefix chain). PYTHON is an interpreter that can import `ai-dynamo-runtime`; without it that peer is left
out. Prints a table on stderr and JSON on stdout.

Every policy sees the same requests and the same workers in virtual time (`mock_pool.py`); `placement_peers.py` has the
others. Ours is the router's own: `router.placement.place` over its prefix index, load accounts and performance model.
What the parts and figures mean: `docs/placement.md`.
"""

from __future__ import annotations

import argparse
import gzip
import json
import platform
import random
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from itertools import groupby
from pathlib import Path
from typing import Protocol, get_args

from mock_pool import Job, MockPool, MockWorker, Policy, Request, Timing
from placement_ours import Known, Ours
from placement_peers import DYNAMO, Dynamo, LeastLoaded, LongestPrefix, RoundRobin

from tandem.planner.perf_model import ModelShape
from tandem.router.settings import Disaggregate

BATCHED_S = 3.0
"""Requests with equal timestamps are spread over the time to the next one, this long at most."""
H100_8B = Timing(0.0064, 1.644e-5, 3.6e-10, 1.2e-5, 4.1e-8, link_token_s=5.2e-6)
"""Llama-3.1-8B on one H100. Against the table that `docs/placement.md` names: prompts of 2,048 to 16,384 tokens within
1 % (of 512: a third too slow), decoding of 1 to 128 sequences within 4 %."""
A100_70B = Timing()
"""Llama-3.1-70B on four A100: prompts of 512 to 16,384 tokens within 6 %, decoding of 1 to 128 sequences within 7 %."""
HARDWARE = {"h100-8b": H100_8B, "a100-70b": A100_70B}
KNOWN = {
    H100_8B: Known("nvidia-h100", ModelShape(8_030_000_000, 16_060_000_000, 131_072)),
    A100_70B: Known("nvidia-a100-sxm4-80gb", ModelShape(70_600_000_000, 141_200_000_000, 327_680)),
}
"""What those workers would say of themselves. Of four devices they name one: the performance model learns the rest."""


class Closable(Policy, Protocol):
    def close(self) -> None: ...


Maker = Callable[[MockPool, int], Closable]
"""From the pool and the number of the repeat."""


@dataclass(frozen=True, slots=True)
class Result:
    part: str
    policy: str
    repeats: int
    token_hit: float
    """Share of prompt tokens that were cached where the prompt was computed."""
    ttft_mean_s: float
    ttft_p50_s: float
    ttft_p99_s: float
    tpot_p50_s: float
    tpot_p99_s: float
    latency_mean_s: float
    """From arrival to the last token."""
    last_s: float
    """From the first arrival to the last token."""
    most_requests: float
    """On one worker, over the mean; of the workers that may answer."""
    most_computed: float
    """Prompt tokens computed by one worker, over the mean; of the workers that compute prompts."""
    handed_over: float
    """Share of requests."""
    token_hit_range: tuple[float, float]
    ttft_p99_range_s: tuple[float, float]


def read_trace(path: Path) -> list[Request]:
    with gzip.open(path, "rt") as lines:
        rows = [json.loads(line) for line in lines]
    times = spread([row["timestamp"] / 1000 for row in rows])
    return [
        Request(at, row["input_length"], max(1, row["output_length"]), tuple(row["hash_ids"]))
        for at, row in zip(times, rows, strict=True)
    ]


def spread(times: Sequence[float]) -> list[float]:
    """Timestamps that come in batches, evenly over the time until the next batch."""
    batches = [(at, len(list(same))) for at, same in groupby(times)]
    out: list[float] = []
    for index, (at, count) in enumerate(batches):
        gap = batches[index + 1][0] - at if index + 1 < len(batches) else 0.0
        out += [at + min(gap, BATCHED_S) * i / count for i in range(count)]
    return out


def faster(requests: Sequence[Request], rate: float) -> list[Request]:
    return [replace(request, arrival_s=request.arrival_s / rate) for request in requests]


def moved(requests: Sequence[Request], repeat: int) -> list[Request]:
    """Arrivals moved by up to 0.1 s, otherwise in each repeat; not at all in the first."""
    rng = random.Random(repeat)
    late = [
        replace(request, arrival_s=request.arrival_s + rng.uniform(0.0, 0.1 * bool(repeat))) for request in requests
    ]
    return sorted(late, key=lambda request: request.arrival_s)


def with_shared_start(requests: Sequence[Request]) -> list[Request]:
    """Every prompt gets the same block in front of it."""
    return [
        replace(request, prompt_tokens=request.prompt_tokens + 512, blocks=(-1, *request.blocks))
        for request in requests
    ]


def herd(count: int, gap_s: float, unique: bool) -> list[Request]:
    """Prompts of 2,048 tokens in blocks of 16, all equal; `unique`: each with 16 tokens of its own behind."""
    shared = tuple(range(128))
    return [
        Request(i * gap_s, 2048 + 16 * unique, 128, (*shared, 1000 + i) if unique else shared) for i in range(count)
    ]


def summary(
    part: str, name: str, repeats: int, jobs: Sequence[Job], workers: Sequence[MockWorker], computing: int = 0
) -> Result:
    """`computing`: workers, the first ones, that only compute prompts."""
    ttft = sorted(job.first_token_s - job.request.arrival_s for job in jobs)
    tpot = sorted(
        (job.finished_s - job.first_token_s) / (job.request.output_tokens - 1)
        for job in jobs
        if job.request.output_tokens > 1
    )
    answered = [0] * len(workers)
    for job in jobs:
        answered[job.decode] += 1
    hit = sum(job.cached_tokens for job in jobs) / sum(job.request.prompt_tokens for job in jobs)
    p99 = quantile(ttft, 0.99)
    return Result(
        part=part,
        policy=name,
        repeats=repeats,
        token_hit=hit,
        ttft_mean_s=statistics.fmean(ttft),
        ttft_p50_s=quantile(ttft, 0.5),
        ttft_p99_s=p99,
        tpot_p50_s=quantile(tpot, 0.5),
        tpot_p99_s=quantile(tpot, 0.99),
        latency_mean_s=statistics.fmean(job.finished_s - job.request.arrival_s for job in jobs),
        last_s=max(job.finished_s for job in jobs) - jobs[0].request.arrival_s,
        most_requests=over_mean(answered[computing:]),
        most_computed=over_mean([worker.computed_tokens for worker in workers if worker.computed_tokens]),
        handed_over=sum(job.prefill is not None for job in jobs) / len(jobs),
        token_hit_range=(hit, hit),
        ttft_p99_range_s=(p99, p99),
    )


def quantile(ordered: Sequence[float], share: float) -> float:
    return ordered[round(share * (len(ordered) - 1))]


def over_mean(counts: Sequence[int]) -> float:
    return max(counts) / statistics.fmean(counts)


COLUMNS = (
    "part",
    "policy",
    "token hit",
    "TTFT mean, s",
    "p50",
    "p99",
    "TPOT p50, ms",
    "p99",
    "latency mean, s",
    "requests max/mean",
    "computed max/mean",
    "all done, s",
)


def row(result: Result) -> str:
    cells = (
        result.part,
        result.policy,
        f"{result.token_hit:.3f}",
        f"{result.ttft_mean_s:.3f}",
        f"{result.ttft_p50_s:.3f}",
        f"{result.ttft_p99_s:.3f}",
        f"{1e3 * result.tpot_p50_s:.1f}",
        f"{1e3 * result.tpot_p99_s:.1f}",
        f"{result.latency_mean_s:.3f}",
        f"{result.most_requests:.2f}",
        f"{result.most_computed:.2f}",
        f"{result.last_s:.1f}",
    )
    return f"| {' | '.join(cells)} |"


@dataclass(frozen=True, slots=True)
class Part:
    """One table: some requests on one pool, under several policies."""

    name: str
    hardware: Timing
    workers: int
    block_tokens: int
    requests: list[Request]


@dataclass(frozen=True, slots=True)
class Run:
    part: Part
    policy: str
    make: Maker
    repeats: int = 1
    moved: bool = False
    """Whether repeats get other arrivals. Dynamo's core breaks ties at random: its repeats differ as it is."""
    computing: int = 0
    """Workers, the first ones, that only compute prompts."""

    def measure(self) -> Result:
        part, runs, started = self.part, [], time.perf_counter()
        for repeat in range(self.repeats):
            pool = MockPool(part.workers, part.hardware, block_tokens=part.block_tokens)
            policy = self.make(pool, repeat)
            jobs = pool.run(moved(part.requests, repeat) if self.moved else part.requests, policy)
            policy.close()
            runs.append(summary(part.name, self.policy, self.repeats, jobs, pool.workers, self.computing))
        hits, tails = [run.token_hit for run in runs], [run.ttft_p99_s for run in runs]
        result = replace(
            sorted(runs, key=lambda run: run.ttft_p99_s)[len(runs) // 2],
            token_hit=statistics.median(hits),
            token_hit_range=(min(hits), max(hits)),
            ttft_p99_range_s=(min(tails), max(tails)),
        )
        print(f"{row(result)}  ({time.perf_counter() - started:.0f} s)", file=sys.stderr, flush=True)
        return result


def unified(part: Part, dynamo: Path | None, repeats: int, *, move: bool) -> list[Run]:
    """Every worker computes prompts and answers. `move`: ours is repeated, too, with arrivals moved a little."""
    known = KNOWN[part.hardware]
    runs = [
        Run(part, "ours", lambda pool, repeat: Ours(pool, repeat, known), repeats if move else 1, move),
        Run(part, "ours, cache events", lambda pool, repeat: Ours(pool, repeat, known, cache_events=True)),
        Run(part, "ours, hardware unknown", lambda pool, repeat: Ours(pool, repeat, Known())),
        Run(part, "round robin", lambda pool, repeat: RoundRobin(pool.workers)),
        Run(part, "least loaded", lambda pool, repeat: LeastLoaded(pool.workers)),
        Run(part, "longest prefix", lambda pool, repeat: LongestPrefix(pool.workers)),
    ]
    if dynamo is not None:
        runs += [Run(part, name, partial(_dynamo, part, dynamo, env), repeats) for name, env in DYNAMO.items()]
    return runs


def _dynamo(part: Part, python: Path, env: dict[str, str], pool: MockPool, repeat: int) -> Dynamo:
    return Dynamo(python, part.workers, pool.workers[0].cache.capacity, part.block_tokens, env)


def pairs(part: Part) -> list[Run]:
    """Ours with prefill workers, against as many workers that do both."""
    ways: list[tuple[int, Disaggregate]] = [(0, "never")]
    ways += [(prefills, mode) for prefills in (4, 6, 8) for mode in get_args(Disaggregate) if mode != "never"]
    return [
        Run(
            part,
            f"{n}P + {part.workers - n}D, {mode}" if n else f"{part.workers} aggregated",
            partial(_pairs, KNOWN[part.hardware], n, mode),
            computing=n,
        )
        for n, mode in ways
    ]


def _pairs(known: Known, prefills: int, mode: Disaggregate, pool: MockPool, repeat: int) -> Ours:
    return Ours(pool, repeat, known, prefills=prefills, disaggregate=mode)


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--trace", type=Path, required=True)
    options = parser.parse_args()
    trace = read_trace(options.trace)
    traces = [
        Part("trace, 8B on H100", H100_8B, 10, 512, trace),
        Part("trace x 4, 8B on H100", H100_8B, 10, 512, faster(trace, 4)),
        Part("trace, 70B on A100", A100_70B, 10, 512, trace),
        Part("block 0 shared, 8B on H100", H100_8B, 10, 512, with_shared_start(trace)),
    ]
    herds = [
        Part("400 equal at once", H100_8B, 8, 16, herd(400, 0.0, unique=False)),
        Part("400 equal in 4 s", H100_8B, 8, 16, herd(400, 0.01, unique=False)),
        Part("400 x 2,048 + 16 at once", H100_8B, 8, 16, herd(400, 0.0, unique=True)),
        Part("400 x 2,048 + 16 in 4 s", H100_8B, 8, 16, herd(400, 0.01, unique=True)),
    ]
    two_pools = [
        Part("pairs x 4, 8B on H100", H100_8B, 10, 512, faster(trace, 4)),
        Part("pairs, 70B on A100", A100_70B, 10, 512, trace),
    ]
    runs = [run for part in traces for run in unified(part, options.dynamo, options.repeats, move=True)]
    runs += [run for part in herds for run in unified(part, options.dynamo, options.repeats, move=False)]
    runs += [run for part in two_pools for run in pairs(part)]
    measure_all(runs, options, {"requests": len(trace), "prompt_tokens": sum(r.prompt_tokens for r in trace)})


def arguments(description: str | None) -> argparse.ArgumentParser:
    """Those that `measure_all` reads."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dynamo", type=Path, help="a Python that can import ai-dynamo-runtime")
    parser.add_argument("--repeats", type=int, default=3, help="of ours and Dynamo's, which break ties differently")
    parser.add_argument("--parts", default="", help="parts whose name begins with one of these, by semicolons")
    parser.add_argument("--policies", default="", help="policies whose name begins with one of these, by semicolons")
    parser.add_argument("--json", type=Path, help="what it holds of other parts and policies is kept")
    return parser


def measure_all(runs: Sequence[Run], options: argparse.Namespace, about: dict[str, object]) -> None:
    """Prints the table and the JSON, which begins with `about`."""
    parts, policies = tuple(options.parts.split(";")), tuple(options.policies.split(";"))
    print(f"| {' | '.join(COLUMNS)} |\n|---|---|{'---:|' * (len(COLUMNS) - 2)}", file=sys.stderr)
    report: dict[str, object] = {
        **about,
        "hardware": {name: asdict(timing) for name, timing in HARDWARE.items()},
        "dynamo": DYNAMO,
        "machine": f"{platform.machine()}, Python {platform.python_version()}",
    }
    results: dict[tuple[str, str], dict[str, object]] = {}
    if options.json is not None and options.json.exists():
        results = {(kept["part"], kept["policy"]): kept for kept in json.loads(options.json.read_text())["results"]}
    order = {(run.part.name, run.policy): index for index, run in enumerate(runs)}
    for run in runs:
        if run.part.name.startswith(parts) and run.policy.startswith(policies):
            results[run.part.name, run.policy] = rounded(asdict(run.measure()))
            report["results"] = [results[key] for key in sorted(results, key=lambda key: order.get(key, len(order)))]
            if options.json is not None:
                options.json.write_text(json.dumps(report, indent=1) + "\n")
    print(json.dumps(report, indent=1))


def rounded(values: dict[str, object]) -> dict[str, object]:
    return {key: round(value, 5) if isinstance(value, float) else value for key, value in values.items()}


if __name__ == "__main__":
    main()
