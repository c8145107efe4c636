"""What one tenant can do to another: a victim's streams alone, and beside each attack of a rate-limited tenant.

    python bench/attack.py                                  # every attack, 1 prefill + 1 decode
    python bench/attack.py --only "tokenize 4 MB,unique schemas" --rounds 5
    python bench/attack.py -- --prefill 0 --decode 2        # flags for `tandem serve`

The victim streams on four connections and asks short questions on one. Rounds without and with the attacker alternate.
The attacker sends on 16 connections as fast as it is answered, from a process of the lowest priority. Prints a table
and JSON: tokens per second, the longest 1 % of gaps, first tokens, failures, and what the attacker was answered.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import hashlib
import multiprocessing
import os
import random
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import httpx
from attacks import ATTACKS, VOCABULARY
from batch_beside import machine, percentile, tell
from load import Result, stream
from systems import ROOT, Server

MODEL = ROOT / "src/tandem/small_model"
VICTIM, ATTACKER = "victim-key", "attacker-key"
TENANTS = """
tenants:
  - name: victim
    keys: [{victim}]
  - name: attacker
    keys: [{attacker}]
    requests_per_minute: 600
    tokens_per_minute: 200_000
    max_concurrent: 16
"""
STREAMS, CONNECTIONS = 4, 16
READY_S = 60.0
Body = dict[str, Any]


@dataclass(slots=True)
class Seen:
    """What the victim saw of its requests, in rounds of one sort."""

    gaps: list[float] = field(default_factory=list)
    """Seconds between two tokens of a stream."""
    firsts: list[float] = field(default_factory=list)
    """Seconds to the first token of a short question."""
    tokens: int = 0
    seconds: float = 0.0
    failures: list[str] = field(default_factory=list)


@dataclass(frozen=True, slots=True)
class Row:
    """Milliseconds; ratios are beside the attacker to without."""

    attack: str
    tokens_per_s: float
    tokens_per_s_attacked: float
    gap_p99: float
    gap_p99_attacked: float
    gap_ratio: float
    first_p95: float
    first_p95_attacked: float
    first_ratio: float
    failures: int
    failure: str
    answers: dict[str, int]
    """What the attacker was answered: statuses, or what went wrong."""


class Victim:
    def __init__(self, url: str, seed: int) -> None:
        self.url = url
        self.random = random.Random(seed)

    def body(self, tokens: int) -> Body:
        prompt = [self.random.randrange(10, VOCABULARY) for _ in range(32)]
        return {"prompt": prompt, "max_tokens": tokens, "temperature": 0, "ignore_eos": True}

    async def watch(self, seconds: float, seen: Seen) -> None:
        end = time.monotonic() + seconds
        began = time.monotonic()
        await asyncio.gather(*(self._stream(end, seen) for _ in range(STREAMS)), self._ask(end, seen))
        seen.seconds += time.monotonic() - began

    async def _stream(self, end: float, seen: Seen) -> None:
        while time.monotonic() < end:
            result = await stream(self.url, self.body(100), api_key=VICTIM)
            seen.gaps += result.gaps
            self._count(result, seen)

    async def _ask(self, end: float, seen: Seen) -> None:
        while time.monotonic() < end:
            result = await stream(self.url, self.body(4), api_key=VICTIM)
            seen.firsts.append(result.first)
            self._count(result, seen)
            await asyncio.sleep(self.random.expovariate(1 / 0.05))

    def _count(self, result: Result, seen: Seen) -> None:
        seen.tokens += result.tokens
        if result.error:
            seen.failures.append(result.error)


def attack(url: str, name: str, pipe: Connection) -> None:
    """A process of its own: attacks while it is told to."""
    os.nice(19)
    requests = ATTACKS[name]()
    next(requests)  # made now, not when it is told to begin
    pipe.send("ready")
    while (seconds := pipe.recv()) is not None:
        pipe.send(asyncio.run(_attack(url, requests, seconds)))


async def _attack(url: str, requests: Iterator[tuple[str, bytes]], seconds: float) -> Counter[str]:
    answers: Counter[str] = Counter()
    end = time.monotonic() + seconds
    await asyncio.gather(*(_connection(url, requests, end, answers) for _ in range(CONNECTIONS)))
    return answers


async def _connection(url: str, requests: Iterator[tuple[str, bytes]], end: float, answers: Counter[str]) -> None:
    address = urlsplit(url)
    while time.monotonic() < end:
        path, body = next(requests)
        head = (
            f"POST {path} HTTP/1.1\r\nHost: {address.netloc}\r\nContent-Type: application/json\r\nConnection: close\r\n"
            f"Authorization: Bearer {ATTACKER}\r\nContent-Length: {len(body)}\r\n\r\n"
        )
        status = "gave up"
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(max(0.1, end - time.monotonic())):
                status = await _exchange(address.hostname, address.port, head.encode() + body)
        answers[status] += 1
        await asyncio.sleep(0.01)


async def _exchange(host: str | None, port: int | None, request: bytes) -> str:
    try:
        reader, writer = await asyncio.open_connection(host, port)
    except OSError as error:
        return type(error).__name__
    try:
        writer.write(request)
        with contextlib.suppress(OSError):  # refused before all was sent: the answer says why
            await writer.drain()
        status = (await reader.readline()).split()[1:2]
        while await reader.read(1 << 16):
            pass
        return status[0].decode() if status else "no answer"
    except OSError as error:
        return type(error).__name__
    finally:
        writer.transport.abort()


async def measure(url: str, name: str, options: argparse.Namespace) -> Row:
    here, there = multiprocessing.Pipe()
    process = multiprocessing.get_context("spawn").Process(target=attack, args=(url, name, there), daemon=True)
    process.start()
    victim, alone, beside, answers = Victim(url, options.seed), Seen(), Seen(), Counter[str]()
    await asyncio.to_thread(here.recv)
    for _ in range(options.rounds):
        await victim.watch(options.seconds, alone)
        here.send(options.seconds + 1.0)
        await asyncio.sleep(0.5)
        await victim.watch(options.seconds, beside)
        answers += await asyncio.to_thread(here.recv)
        await asyncio.sleep(1.0)  # what the attacker left behind ends
    here.send(None)
    process.join()
    return row(name, alone, beside, answers)


def row(name: str, alone: Seen, beside: Seen, answers: Counter[str]) -> Row:
    gap, gap_attacked = percentile(alone.gaps, 0.99), percentile(beside.gaps, 0.99)
    first, first_attacked = percentile(alone.firsts, 0.95), percentile(beside.firsts, 0.95)
    return Row(
        name,
        tokens_per_s=round(alone.tokens / alone.seconds, 1),
        tokens_per_s_attacked=round(beside.tokens / beside.seconds, 1),
        gap_p99=round(gap, 1),
        gap_p99_attacked=round(gap_attacked, 1),
        gap_ratio=round(gap_attacked / gap, 2),
        first_p95=round(first, 1),
        first_p95_attacked=round(first_attacked, 1),
        first_ratio=round(first_attacked / first, 2),
        failures=len(alone.failures) + len(beside.failures),
        failure=next(iter(beside.failures + alone.failures), ""),
        answers=dict(answers),
    )


async def run(url: str, options: argparse.Namespace) -> list[Row]:
    await ready(url)
    await Victim(url, options.seed).watch(1.0, Seen())  # warm
    rows = []
    for name in options.only:
        found = await measure(url, name, options)
        rows.append(found)
        print(
            f"{name:28} tokens/s {found.tokens_per_s:6} -> {found.tokens_per_s_attacked:6}; "
            f"gap p99 {found.gap_p99:5} -> {found.gap_p99_attacked:6} x{found.gap_ratio:<5}; "
            f"first p95 {found.first_p95:5} -> {found.first_p95_attacked:6} x{found.first_ratio:<5}; "
            f"failures {found.failures} {found.failure[:80]}; attacker: {found.answers}",
            file=sys.stderr,
            flush=True,
        )
    return rows


async def ready(url: str) -> None:
    end = time.monotonic() + READY_S
    async with httpx.AsyncClient(trust_env=False) as http:
        while time.monotonic() < end:
            with contextlib.suppress(httpx.TransportError):
                if (await http.get(f"{url}/readyz")).status_code == 200:
                    return
            await asyncio.sleep(0.1)
    raise SystemExit("the platform did not start")


def digest(key: str) -> str:
    return hashlib.sha256(key.encode()).hexdigest()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    names = lambda text: text.split(",")  # noqa: E731
    parser.add_argument("--only", type=names, default=list(ATTACKS), help=", ".join(ATTACKS))
    parser.add_argument("--rounds", type=int, default=2, help="without and with the attacker, alternating")
    parser.add_argument("--seconds", type=float, default=3.0, help="of a round")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path)
    parser.add_argument("flags", nargs="*", help="of `tandem serve`, after --")
    options = parser.parse_args()
    unknown = [name for name in options.only if name not in ATTACKS]
    if unknown:
        parser.error(f"--only: {', '.join(unknown)}: there is no such attack; there are {', '.join(ATTACKS)}")
    before = machine()
    with tempfile.TemporaryDirectory(prefix="tandem-bench-") as folder:
        tenants = Path(folder, "tenants.yaml")
        tenants.write_text(TENANTS.format(victim=digest(VICTIM), attacker=digest(ATTACKER)))
        flags = ["--tenants-file", str(tenants), "--log-level", "warning", *options.flags]
        command = [sys.executable, "-m", "tandem.runtime.cli", "serve", str(MODEL), *flags]
        server = Server("attacked", lambda port: [*command, "--port", str(port)], ROOT)
        process, url = server.start()
        try:
            rows = asyncio.run(run(url, options))
        finally:
            process.terminate()
            process.wait()
    result = {"machine": before, "load_after": os.getloadavg(), "rows": [asdict(each) for each in rows]}
    tell(result, options.out)


if __name__ == "__main__":
    main()
