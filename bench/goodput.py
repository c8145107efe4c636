"""Where the split pays: the share of requests that meet a service level, of two unified workers and of a pair.

    python bench/goodput.py                                  # virtual time, every load and level, seconds
    python bench/goodput.py --live --rounds 2 --seconds 25   # the bundled model in real processes, interleaved
    python bench/goodput.py --json bench/results/goodput.json

The traffic: 30 % of the prompts have 900 to 1,700 tokens, the others 64 to 256, arrivals are Poisson. `auto`,
`always` and `never` run one prefill and one decode worker, `unified` two that do both. `auto` is told the level.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import random
import statistics
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from load import open_loop
from mock_pool import Job, MockPool, Request, Timing
from placement_ours import Known, Ours
from serve import Prompts, machine, percentile, wait_ready
from systems import Server, dtype_here

from tandem.router.placing.targets import Targets
from tandem.router.settings import Disaggregate

ROOT = Path(__file__).resolve().parents[1]
SMALL = Timing(0.0028, 1.5e-4, 1.5e-8, 1.2e-4, 2.5e-7, link_token_s=2e-6, handover_s=0.008)
"""About the bundled model on one core."""
WAYS = ("unified", "never", "always", "auto")


@dataclass(frozen=True, slots=True)
class Level:
    """What is promised of a request. Infinite: nothing."""

    name: str
    ttft_s: float
    tpot_s: float
    gap_s: float
    """Of the longest gap but one in a hundred tokens."""

    @property
    def targets(self) -> Targets:
        return Targets(self.ttft_s, self.tpot_s, self.gap_s, percentile=99.0)

    def met(self, seen: Seen) -> bool:
        gap_s = percentile(seen.gaps, 0.99) if seen.gaps else 0.0
        return seen.ttft_s <= self.ttft_s and seen.tpot_s <= self.tpot_s and gap_s <= self.gap_s


INF = float("inf")
LEVELS = (
    Level("first token 0.3 s", 0.3, INF, INF),
    Level("first token 0.5 s, TPOT 8 ms", 0.5, 0.008, INF),
    Level("first token 1 s, TPOT 6 ms", 1.0, 0.006, INF),
    Level("first token 1 s, gap 40 ms", 1.0, INF, 0.04),
)


@dataclass(frozen=True, slots=True)
class Seen:
    """One answer as its client saw it."""

    ttft_s: float
    tpot_s: float
    gaps: Sequence[float]


@dataclass(frozen=True, slots=True)
class Row:
    how: str
    level: str
    rate: float
    way: str
    requests: int
    goodput: float
    """Share of requests that met the level."""
    ttft_p50_s: float
    ttft_p99_s: float
    tpot_p90_s: float
    gap_p99_s: float


def row(how: str, level: Level, rate: float, way: str, seen: Sequence[Seen], asked: int) -> Row:
    """`asked`: requests, failed ones included."""
    return Row(
        how,
        level.name,
        rate,
        way,
        asked,
        sum(map(level.met, seen)) / asked,
        percentile([each.ttft_s for each in seen], 0.5),
        percentile([each.ttft_s for each in seen], 0.99),
        percentile([each.tpot_s for each in seen], 0.9),
        percentile([gap for each in seen for gap in each.gaps], 0.99),
    )


def lengths(rng: random.Random) -> tuple[int, int]:
    """Tokens of a prompt and of its answer."""
    return rng.randint(900, 1700) if rng.random() < 0.3 else rng.randint(64, 256), rng.randint(32, 96)


def arrivals(rng: random.Random, rate: float, seconds: float) -> Iterator[float]:
    now = rng.expovariate(rate)
    while now < seconds:
        yield now
        now += rng.expovariate(rate)


def virtual(level: Level, rate: float, way: str, seconds: float, seed: int) -> Row:
    rng = random.Random(seed)
    requests = []
    for number, at in enumerate(arrivals(rng, rate, seconds)):
        prompt, output = lengths(rng)
        blocks = tuple(range(1000 * number, 1000 * number - (-prompt // 16)))
        requests.append(Request(at, prompt, output, blocks))
    pool = MockPool(2, SMALL, cache_tokens=200_000, block_tokens=16, step_tokens=512, max_sequences=64)
    mode: Disaggregate = "always" if way == "always" else "auto" if way == "auto" else "never"
    policy = Ours(
        pool,
        0,
        Known(),
        prefills=0 if way == "unified" else 1,
        disaggregate=mode,
        targets=level.targets if way == "auto" else None,
    )
    jobs = pool.run(requests, policy)
    policy.close()
    return row("virtual", level, rate, way, [seen_of(job) for job in jobs], len(jobs))


def seen_of(job: Job) -> Seen:
    tokens = job.request.output_tokens
    return Seen(
        job.first_token_s - job.request.arrival_s,
        (job.finished_s - job.first_token_s) / max(1, tokens - 1),
        job.gaps,
    )


def flags(way: str, level: Level) -> list[str]:
    if way == "unified":
        return ["--prefill", "0", "--decode", "2"]
    out = ["--prefill", "1", "--decode", "1", "--disaggregate", way]
    if way == "auto":
        promised = (("ttft", level.ttft_s), ("tpot", level.tpot_s), ("gap", level.gap_s))
        for name, value in promised:
            out += [f"--target-{name}-s", str(value)] if value < INF else []
        out += ["--target-percentile", "99"]
    return out


@contextmanager
def serving(model: Path, way: str, level: Level) -> Iterator[str]:
    command = [sys.executable, "-m", "tandem.runtime.cli", "serve", "--model", str(model), "--dtype", dtype_here()]
    system = Server(
        f"goodput-{way}", lambda port: [*command, "--port", str(port), *flags(way, level)], ROOT, ready_path="/readyz"
    )
    process, url = system.start()
    try:
        wait_ready(system, process, url)
        yield url
    finally:
        process.terminate()
        try:
            process.wait(30)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def live(url: str, prompts: Prompts, level: Level, rate: float, way: str, seconds: float, seed: int) -> Row:
    rng = random.Random(seed)
    at = list(arrivals(rng, rate, seconds))
    bodies: list[dict[str, Any]] = []
    for _ in at:
        prompt, output = lengths(rng)
        bodies.append({"prompt": prompts.take(prompt), "max_tokens": output, "temperature": 0, "ignore_eos": True})
    results, _ = asyncio.run(open_loop(url, bodies, at))
    for each in results:
        if each.error:
            print("   error:", each.error, file=sys.stderr)
    seen = [Seen(each.first, each.tpot, each.gaps) for each in results if not each.error]
    return row("live", level, rate, way, seen, len(results))


def report(rows: Sequence[Row]) -> None:
    """A table: the share of requests that met each level, and who was best."""
    print(f"| level | requests/s | {' | '.join(WAYS)} | best |\n|---|---:|{'---:|' * len(WAYS)}---|")
    cells: dict[tuple[str, float], dict[str, list[float]]] = {}
    for each in rows:
        cells.setdefault((each.level, each.rate), {}).setdefault(each.way, []).append(each.goodput)
    for (level, rate), by_way in cells.items():
        shares = {way: statistics.median(by_way[way]) for way in WAYS}
        best = max(shares.values())
        winners = ", ".join(way for way in WAYS if shares[way] >= best - 0.005)
        print(f"| {level} | {rate:g} | {' | '.join(f'{shares[way]:.2f}' for way in WAYS)} | {winners} |")


def measure_live(options: argparse.Namespace) -> list[Row]:
    """Every way of a round sees the same prompts; they run one after the other, so that none takes another's cores."""
    prompts, rows = Prompts(options.model), []
    level = next(level for level in LEVELS if level.name.startswith(options.level))
    for number in range(options.rounds):
        for way in WAYS[number % len(WAYS) :] + WAYS[: number % len(WAYS)]:
            with serving(options.model, way, level) as url:
                live(url, prompts.reseeded(number), level, 4.0, way, 5.0, seed=1000 + number)  # warms up
                for rate in options.rates:
                    seed = 100 * number + round(rate)
                    got = live(url, prompts.reseeded(seed), level, rate, way, options.seconds, seed)
                    print(f"round {number} {got}", file=sys.stderr, flush=True)
                    rows.append(got)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--live", action="store_true")
    parser.add_argument("--model", type=Path, default=ROOT / "examples/small_model/model")
    parser.add_argument("--level", default=LEVELS[1].name, help="of --live: how its name begins")
    parser.add_argument("--rates", type=float, nargs="+", default=[6.0, 9.0, 12.0], help="requests/s")
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--seconds", type=float, help="of arrivals; default: 20 live, 200 virtual")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    options.seconds = options.seconds or (20.0 if options.live else 200.0)
    if options.live:
        rows = measure_live(options)
    else:
        rows = [
            virtual(level, rate, way, options.seconds, seed)
            for level in LEVELS
            for rate in options.rates
            for seed in range(options.rounds)
            for way in WAYS
        ]
    report(rows)
    if options.json is not None:
        document = {"bench": "goodput", "machine": machine(), "rows": [asdict(each) for each in rows]}
        options.json.write_text(json.dumps(document, indent=1) + "\n")


if __name__ == "__main__":
    main()
