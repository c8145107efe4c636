"""Soak: random arrivals, lengths, cancels and disconnects against `tandem serve`, then: is anything left behind?

    python bench/soak.py --duration 600                       # starts a platform of its own
    python bench/soak.py --duration 600 --url http://127.0.0.1:8000 --pid 1234

Prints one JSON object. `leak` names what did not come back: KV blocks, file descriptors, resident memory, processes.
Baselines are taken idle after a warm-up, and compared with the same processes idle at the end.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import random
import re
import subprocess
import sys
import time
from collections import Counter
from dataclasses import asdict, dataclass, field

import httpx
import psutil
from systems import machine

WARM_UP_SHARE = 0.25
IDLE_S = 30.0
MEMORY_SLACK = 0.03
"""Growth of a process's resident memory, relative to its baseline, that is still called flat..."""
MEMORY_SLACK_BYTES = 16 << 20
"""... or this many bytes, whichever is more."""
DESCRIPTOR_SLACK = 4


@dataclass
class Sample:
    """The platform when nothing runs."""

    at_s: float
    rss: dict[str, int] = field(default_factory=dict)
    descriptors: dict[str, int] = field(default_factory=dict)
    free_blocks: float = 0.0
    total_blocks: float = 0.0
    running: float = 0.0


class Soak:
    def __init__(self, url: str, pid: int | None, arguments: argparse.Namespace) -> None:
        self.url = url
        self.pid = pid
        self.rate = arguments.rate
        self.concurrency = arguments.concurrency
        self.random = random.Random(arguments.seed)
        self.outcomes: Counter[str] = Counter()
        self.tokens = 0
        self.started = time.monotonic()

    async def run(self, duration_s: float) -> dict[str, object]:
        limits = httpx.Limits(max_connections=self.concurrency + 4, max_keepalive_connections=8)
        async with httpx.AsyncClient(base_url=self.url, timeout=120.0, limits=limits, trust_env=False) as self.http:
            self.model = (await self.http.get("/v1/models")).json()["data"][0]
            self.max_length = int(self.model.get("max_model_len", 2048))
            await self._load(duration_s * WARM_UP_SHARE)
            baseline = await self._idle()
            samples = [baseline]
            parts = 3
            for _ in range(parts):
                await self._load(duration_s * (1 - WARM_UP_SHARE) / parts)
                samples.append(await self._idle())
        return {
            "leak": _leaks(samples[0], samples[-1]),
            "requests": dict(self.outcomes),
            "tokens": self.tokens,
            "duration_s": round(time.monotonic() - self.started, 1),
            "samples": [asdict(sample) for sample in samples],
            "machine": machine("torch", "grpcio"),
        }

    async def _load(self, seconds: float) -> None:
        """Poisson arrivals; those beyond the concurrency are dropped, as a real client's pool would."""
        tasks: set[asyncio.Task[None]] = set()
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            await asyncio.sleep(min(self.random.expovariate(self.rate), 5.0))
            if len(tasks) < self.concurrency:
                task = asyncio.create_task(self._request())
                tasks.add(task)
                task.add_done_callback(tasks.discard)
            else:
                self.outcomes["dropped"] += 1
        if tasks:
            await asyncio.wait(tasks, timeout=120.0)

    async def _request(self) -> None:
        draw = self.random.random()
        fate = "finish" if draw < 0.6 else "disconnect" if draw < 0.8 else "impatient" if draw < 0.9 else "bad"
        prompt_tokens = min(int(self.random.lognormvariate(5.0, 1.2)) + 1, self.max_length - 300)
        max_tokens = min(int(self.random.lognormvariate(3.3, 0.9)) + 1, 256)
        body = {
            "model": self.model["id"] if fate != "bad" else self.random.choice(["nobody", self.model["id"]]),
            "prompt": [self.random.randrange(10, 400) for _ in range(prompt_tokens if fate != "bad" else 10**5)],
            "max_tokens": max_tokens,
            "temperature": self.random.choice([0.0, 0.7]),
            "stream": True,
        }
        leave_after = self.random.randrange(1, 20) if fate == "disconnect" else 0
        patience = self.random.uniform(0.001, 0.3) if fate == "impatient" else 120.0
        try:
            async with (
                asyncio.timeout(patience),
                self.http.stream("POST", "/v1/completions", json=body) as answer,
            ):
                if answer.status_code != 200:
                    await answer.aread()
                    self.outcomes[f"status {answer.status_code}"] += 1
                    return
                events = 0
                async for line in answer.aiter_lines():
                    events += line.startswith("data: ")
                    if '"error"' in line:
                        self.outcomes["error event"] += 1
                    if leave_after and events >= leave_after:
                        break
                self.tokens += events
            self.outcomes["disconnected" if leave_after else "finished"] += 1
        except TimeoutError:
            self.outcomes["left before the end"] += 1
        except httpx.HTTPError as error:
            self.outcomes[type(error).__name__] += 1

    async def _idle(self) -> Sample:
        """Waits until nothing runs and all blocks are back (or `IDLE_S` is over), then looks."""
        end = time.monotonic() + IDLE_S
        while True:
            text = (await self.http.get("/metrics")).text
            sample = Sample(
                round(time.monotonic() - self.started, 1),
                free_blocks=_metric(text, "tandem_worker_free_blocks"),
                total_blocks=_metric(text, "tandem_worker_total_blocks"),
                running=_metric(text, "tandem_worker_running") + _metric(text, "tandem_worker_waiting"),
            )
            if time.monotonic() > end or (sample.running == 0 and sample.free_blocks == sample.total_blocks):
                break
            await asyncio.sleep(0.1)
        await asyncio.sleep(2.0)  # connections of clients that left are closed by now
        for name, process in self._processes().items():
            with contextlib.suppress(psutil.Error):
                memory = process.memory_info()
                sample.rss[name] = memory.rss - memory.shared  # the store node's arena is mapped by all, and bounded
                sample.descriptors[name] = process.num_fds()
        return sample

    def _processes(self) -> dict[str, psutil.Process]:
        if self.pid is None:
            return {}
        supervisor = psutil.Process(self.pid)
        found = {f"supervisor:{self.pid}": supervisor}
        for child in supervisor.children():
            name = re.search(r"/([a-z]+(?:-\d+)?)\.yaml", " ".join(child.cmdline()))
            found[f"{name.group(1) if name else 'child'}:{child.pid}"] = child
        return found


def _metric(text: str, name: str) -> float:
    return sum(float(value) for value in re.findall(rf"^{name}(?:\{{.*\}})? (\S+)$", text, re.MULTILINE))


def _leaks(before: Sample, after: Sample) -> list[str]:
    found = []
    if after.running:
        found.append(f"{after.running:g} requests still run")
    if after.free_blocks != after.total_blocks:
        found.append(f"{after.total_blocks - after.free_blocks:g} KV blocks did not come back")
    if before.rss.keys() != after.rss.keys():
        found.append(f"processes changed: {sorted(before.rss)} became {sorted(after.rss)}")
    for name, baseline in before.rss.items():
        now = after.rss.get(name, baseline)
        if now - baseline > max(MEMORY_SLACK * baseline, MEMORY_SLACK_BYTES):
            found.append(f"{name} grew from {baseline >> 20} to {now >> 20} MiB")
        opened = after.descriptors.get(name, 0) - before.descriptors.get(name, 0)
        if opened > DESCRIPTOR_SLACK:
            found.append(f"{name} has {opened} more open files")
    return found


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--duration", type=float, default=600.0, help="seconds of load in all")
    parser.add_argument("--rate", type=float, default=8.0, help="arrivals per second")
    parser.add_argument("--concurrency", type=int, default=32, help="open requests at most")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--url", help="a running platform; without it, one is started")
    parser.add_argument("--pid", type=int, help="process id of that platform's `tandem serve`")
    parser.add_argument("serve", nargs="*", help="after --: flags for the platform that is started")
    arguments = parser.parse_args()
    if arguments.url:
        result = asyncio.run(Soak(arguments.url, arguments.pid, arguments).run(arguments.duration))
    else:
        # A small KV pool, so that all of it has been touched when the baseline is taken.
        flags = ["--port", "0", "--kv-cache-bytes", str(48 << 20), "--log-level", "warning", *arguments.serve]
        command = [sys.executable, "-m", "tandem.runtime.cli", "serve", *flags]
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as platform_process:
            assert platform_process.stdout is not None
            first = platform_process.stdout.readline()
            found = re.search(r"http://\S+", first)
            if found is None:
                raise SystemExit(f"the platform did not start: {first}")
            try:
                soak = Soak(found.group(), platform_process.pid, arguments)
                result = asyncio.run(soak.run(arguments.duration))
            finally:
                platform_process.terminate()
        result["exit_status"] = platform_process.returncode
    print(json.dumps(result, indent=2))
    return 1 if result["leak"] else 0


if __name__ == "__main__":
    sys.exit(main())
