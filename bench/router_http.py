"""What a router adds to a request: latency, requests per second and processor time, ours beside sglang-router.

    python bench/router_http.py --sglang PATH/TO/PYTHON

`PYTHON` has `sglang-router`; without it only ours is measured. Every router stands before the same two fake workers, in
one process that answers a chat request with three tokens, 2 ms apart: in gRPC for ours, in HTTP for sglang-router.
"Added" is against the same request sent straight to a worker, in the protocol that the router speaks to it.

What differs: sglang-router reads the JSON and passes HTTP on, its workers would do the rest. Ours renders the chat
template, tokenizes what it has not met before of the 400 tokens (all requests share a system message of 300), hashes
them, admits and places by cost, keeps accounts, and turns what the workers produce into text and events.

Rounds of all alternate. Half load is half of what the router did in the same round with all clients waiting for it. The
machine's cores are shared with the clients and the workers, so what a router can do by itself is told by its processor
time: requests per CPU second.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import random
import re
import socket
import statistics
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import psutil
import uvloop
from tokenizers import Tokenizer

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "bench")]

from router_targets import Ask, GrpcTarget, HttpTarget, Spread, Target, Times  # noqa: E402
from router_workers import sockets  # noqa: E402
from serve import percentile  # noqa: E402
from systems import machine  # noqa: E402

SYSTEM_TOKENS = 300
USER_TOKENS = 100
OUTPUT_TOKENS = 3
WORKERS = 2
MODEL = ROOT / "examples/small_model/model"
KINDS = {"streaming": True, "whole": False}


def asks(seed: int = 0) -> Iterator[Ask]:
    """Chats without end: a system message of 300 tokens that all share, and a user message of 100 tokens that no other
    request has, so that only the system message can be found in a cache. Their words are single tokens of the model's
    vocabulary, drawn at random; the template adds about twelve tokens."""
    rng = random.Random(seed)
    tokenizer = Tokenizer.from_file(str(MODEL / "tokenizer.json"))
    words = sorted(name[1:] for name in tokenizer.get_vocab() if re.fullmatch("Ġ[a-z]{2,}", name))
    ids = [encoding.ids for encoding in tokenizer.encode_batch([f" {word}" for word in words])]
    single = {word: tokens[0] for word, tokens in zip(words, ids, strict=True) if len(tokens) == 1}
    words = list(single)
    system = rng.choices(words, k=SYSTEM_TOKENS)
    while True:
        user = rng.choices(words, k=USER_TOKENS)
        yield Ask(" ".join(system), " ".join(user), [single[word] for word in system + user], OUTPUT_TOKENS)


@dataclass(slots=True)
class Figures:
    """Of one router and one kind of answer. Lists have an entry per round."""

    alone: list[tuple[Times, Times]] = field(default_factory=list)
    """One request at a time: straight, routed."""
    half: list[tuple[Times, Times]] = field(default_factory=list)
    """At half load. The pairs are not of the same request."""
    half_per_s: list[float] = field(default_factory=list)
    per_s: list[float] = field(default_factory=list)
    cpu_us: list[float] = field(default_factory=list)
    """Of the router's processes, per request."""

    def row(self, router: str, kind: str) -> dict[str, str | float]:
        cpu_us = statistics.median(self.cpu_us)
        row: dict[str, str | float] = {
            "router": router,
            "kind": kind,
            "requests_per_s": round(statistics.median(self.per_s), 1),
            "best_requests_per_s": round(max(self.per_s), 1),
            "cpu_us_per_request": round(cpu_us, 1),
            "requests_per_cpu_s": round(1e6 / cpu_us),
            "half_load_requests_per_s": round(statistics.median(self.half_per_s), 1),
        }
        if kind == "streaming":
            row["events_per_answer"] = round(statistics.mean(routed.events for _, routed in self.half), 2)
        for name, pairs in (("alone", self.alone), ("half", self.half)):
            for part in ("first", "last") if kind == "streaming" else ("last",):
                straight, routed = ([getattr(pair[i], part) for pair in pairs] for i in (0, 1))
                for share, at in ((0.5, "p50"), (0.99, "p99")):
                    added = percentile(routed, share) - percentile(straight, share)
                    row[f"{name}_added_{part}_{at}_ms"] = round(1e3 * added, 3)
        return row


@dataclass(slots=True)
class Side:
    name: str
    direct: Target
    """The workers themselves."""
    routed: Target
    process: psutil.Process
    figures: dict[str, Figures] = field(default_factory=lambda: {kind: Figures() for kind in KINDS})

    def cpu_s(self) -> float:
        times = [each.cpu_times() for each in (self.process, *self.process.children(recursive=True))]
        return sum(each.user + each.system for each in times)


async def one_by_one(target: Target, asked: Iterator[Ask], count: int, *, streaming: bool) -> list[Times]:
    return [await target.request(next(asked), streaming=streaming) for _ in range(count)]


async def all_waiting(
    target: Target, asked: Iterator[Ask], clients: int, seconds: float, *, streaming: bool
) -> tuple[int, float]:
    """Clients that each wait for their answer and ask again: requests done, and the seconds it took."""
    done, started = 0, time.perf_counter()

    async def client() -> None:
        nonlocal done
        while time.perf_counter() - started < seconds:
            await target.request(next(asked), streaming=streaming)
            done += 1

    await asyncio.gather(*(client() for _ in range(clients)))
    return done, time.perf_counter() - started


async def at_rate(
    target: Target, asked: Iterator[Ask], per_s: float, seconds: float, seed: int, *, streaming: bool
) -> list[Times]:
    """Poisson arrivals, whatever is still running."""
    rng, at, loop = random.Random(seed), 0.0, asyncio.get_running_loop()
    started, running = loop.time(), []
    while (at := at + rng.expovariate(per_s)) < seconds:
        if (pause := started + at - loop.time()) > 0:
            await asyncio.sleep(pause)
        running.append(loop.create_task(target.request(next(asked), streaming=streaming)))
    return list(await asyncio.gather(*running))


async def measure(sides: list[Side], args: argparse.Namespace) -> None:
    asked = asks()
    for side in sides:  # every connection, cache and code path once
        for streaming in KINDS.values():
            await all_waiting(side.routed, asked, args.clients, 1.0, streaming=streaming)
            await one_by_one(side.direct, asked, 20, streaming=streaming)
    for number in range(args.rounds):
        for kind, streaming in KINDS.items():
            for side in sides:
                figures = side.figures[kind]
                straight = await one_by_one(side.direct, asked, args.requests, streaming=streaming)
                routed = await one_by_one(side.routed, asked, args.requests, streaming=streaming)
                figures.alone += zip(straight, routed, strict=True)
            for side in sides:
                figures, before = side.figures[kind], side.cpu_s()
                done, wall = await all_waiting(side.routed, asked, args.clients, args.seconds, streaming=streaming)
                figures.cpu_us.append(1e6 * (side.cpu_s() - before) / done)
                figures.per_s.append(done / wall)
            for side in sides:
                figures = side.figures[kind]
                per_s = figures.per_s[-1] / 2
                straight = await at_rate(side.direct, asked, per_s, args.seconds, number, streaming=streaming)
                routed = await at_rate(side.routed, asked, per_s, args.seconds, number, streaming=streaming)
                figures.half += zip(straight, routed, strict=True)  # the same arrivals
                figures.half_per_s.append(per_s)
    for side in sides:
        await side.direct.close()
        await side.routed.close()


def free_ports(count: int) -> list[int]:
    held = [socket.create_server(("127.0.0.1", 0)) for _ in range(count)]
    ports = [each.getsockname()[1] for each in held]
    for each in held:
        each.close()
    return ports


def wait_ready(url: str) -> None:
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        try:
            with urllib.request.urlopen(url, timeout=2):
                return
        except OSError:
            time.sleep(0.1)
    raise SystemExit(f"{url} did not answer in 60 s")


@contextmanager
def running(command: list[str], ready_url: str) -> Iterator[psutil.Process]:
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    try:
        wait_ready(ready_url)
        yield psutil.Process(process.pid)
    finally:
        children = psutil.Process(process.pid).children(recursive=True) if process.poll() is None else []
        for each in (process, *children):
            each.kill()
        process.wait()


@contextmanager
def workers(folder: Path, ports: list[int]) -> Iterator[None]:
    command = [sys.executable, str(ROOT / "bench/router_workers.py"), str(folder), *map(str, ports)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE)
    try:
        assert process.stdout is not None
        if not process.stdout.readline():
            raise SystemExit("the fake workers did not start")
        yield
    finally:
        process.kill()
        process.wait()


def ours(folder: Path, replicas: int) -> tuple[list[str], str, str]:
    """Command, URL, and the URL that answers once it is ready."""
    (port,) = free_ports(1)
    targets = json.dumps([f"unix:{each}" for each in sockets(folder, WORKERS)])
    command = [sys.executable, "-m", "tandem.runtime.cli", "router", "--model", str(MODEL), "--port", str(port)]
    command += ["--decode-workers", targets, "--log-level", "warning", "--served-model-name", "bench"]
    return [*command, "--routers", str(replicas)], f"http://127.0.0.1:{port}", "/readyz"


def sglang(python: str, ports: list[int]) -> tuple[list[str], str, str]:
    port, metrics_port = free_ports(2)
    command = [python, "-m", "sglang_router.launch_router", "--host", "127.0.0.1", "--port", str(port)]
    command += ["--prometheus-port", str(metrics_port), "--log-level", "error"]
    return (
        [*command, "--worker-urls", *(f"http://127.0.0.1:{each}" for each in ports)],
        f"http://127.0.0.1:{port}",
        "/readiness",
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sglang", metavar="PYTHON", help="interpreter with sglang-router; without it only ours")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--seconds", type=float, default=2.0, help="of a round of one router, kind and load")
    parser.add_argument("--requests", type=int, default=60, help="one at a time, per round, router and kind")
    parser.add_argument("--clients", type=int, default=32)
    parser.add_argument("--out", type=Path, help="also write the JSON here")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as name, ExitStack() as stack:
        folder, ports = Path(name), free_ports(WORKERS)
        stack.enter_context(workers(folder, ports))
        commands = {"tandem": ours(folder, 1), "tandem --routers 2": ours(folder, 2)}
        if args.sglang:
            commands["sglang-router"] = sglang(args.sglang, ports)
        processes = {
            name: stack.enter_context(running(command, url + ready)) for name, (command, url, ready) in commands.items()
        }

        async def run() -> list[Side]:
            sides = []
            for name, (_, url, _) in commands.items():
                straight: list[Target] = (
                    [HttpTarget(f"http://127.0.0.1:{port}") for port in ports]
                    if name == "sglang-router"
                    else [GrpcTarget(f"unix:{each}") for each in sockets(folder, WORKERS)]
                )
                sides.append(Side(name, Spread(straight), HttpTarget(url), processes[name]))
            await measure(sides, args)
            return sides

        sides = uvloop.run(run())
    rows = [side.figures[kind].row(side.name, kind) for side in sides for kind in KINDS]
    columns = {
        "requests_per_s": "req/s",
        "cpu_us_per_request": "CPU us",
        "requests_per_cpu_s": "req/CPU s",
        "alone_added_last_p50_ms": "alone p50",
        "alone_added_last_p99_ms": "p99",
        "half_added_last_p50_ms": "half p50",
        "half_added_last_p99_ms": "p99",
    }
    print(f"{'router':<20} {'kind':<10}" + "".join(f"{title:>11}" for title in columns.values()), file=sys.stderr)
    for row in rows:
        print(f"{row['router']:<20} {row['kind']:<10}" + "".join(f"{row[c]:>11}" for c in columns), file=sys.stderr)
    text = json.dumps(
        {"machine": machine("grpcio", "uvloop", "uvicorn"), "clients": args.clients, "rows": rows}, indent=1
    )
    print(text)
    if args.out:
        args.out.write_text(text + "\n")


if __name__ == "__main__":
    main()
