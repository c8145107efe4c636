"""Greedy streams while decode workers are killed: how many go on with another text than the uninterrupted one?

    python bench/kills.py                                   # 1,000 streams and 17 kills, with --batch-invariant
    python bench/kills.py --modes default,batch_invariant   # and what this machine does without

Each prompt is first answered alone. Then streams of the same prompts run beside each other, in groups; in the middle of
each a decode worker is killed (SIGKILL), and the next begins when it is back. Prints JSON; `different` must be 0 with
batch_invariant, and `continued` says how many streams another worker went on with.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import itertools
import json
import random
import re
import sys
import time
import urllib.request
from pathlib import Path
from typing import Any

import psutil
from load import Result, stream
from systems import ROOT, Server

from tandem.engine.model.config import ModelConfig

MODEL = ROOT / "src/tandem/small_model"
MODES = {"default": (), "batch_invariant": ("--batch-invariant", "true")}
WORKERS = 2
READY_S = 180.0
"""A busy machine takes long to start a worker."""


def server_of(mode: str, dtype: str) -> Server:
    command = [sys.executable, "-m", "tandem.runtime.cli", "serve", str(MODEL), "--prefill", "0"]
    command += ["--decode", str(WORKERS), "--dtype", dtype, "--log-level", "warning", *MODES[mode]]
    env = {"TANDEM_WORKER_WAIT_S": str(READY_S)}
    return Server(f"kills-{mode}", lambda port: [*command, "--port", str(port)], ROOT, env)


def connected(url: str) -> list[dict[str, Any]]:
    """The decode workers that answer requests."""
    try:
        with urllib.request.urlopen(f"{url}/readyz", timeout=10) as answer:
            return [worker for worker in json.load(answer)["workers"] if worker["connected"]]
    except OSError:
        return []


async def until(url: str, all_there: bool) -> list[dict[str, Any]]:
    """All workers are connected, or one of them no longer is."""
    end = time.monotonic() + READY_S
    while (len(workers := await asyncio.to_thread(connected, url)) == WORKERS) != all_there:
        if time.monotonic() > end:
            raise SystemExit(f"still {len(workers)} of {WORKERS} workers")
        await asyncio.sleep(0.05)
    return workers


def kill_one(supervisor: int, chooser: random.Random) -> None:
    victims = []
    for child in psutil.Process(supervisor).children():
        with contextlib.suppress(psutil.Error):  # one that was just killed
            if re.search(r"/decode-\d+\.yaml", " ".join(child.cmdline())):
                victims.append(child)
    chooser.choice(victims).kill()


async def run(url: str, supervisor: int, options: argparse.Namespace) -> dict[str, Any]:
    workers = await until(url, all_there=True)
    chooser, vocabulary = random.Random(options.seed), ModelConfig.from_folder(MODEL).vocab_size
    bodies: list[dict[str, Any]] = [
        {
            "prompt": [chooser.randrange(10, vocabulary) for _ in range(chooser.randrange(20, 300))],
            "max_tokens": options.tokens,
            "temperature": 0,
            "ignore_eos": True,
        }
        for _ in range(options.prompts)
    ]
    alone = [await stream(url, body, keep_text=True) for body in bodies]
    if wrong := [each.error for each in alone if each.error]:
        raise SystemExit(f"an uninterrupted request failed: {wrong[0]}")
    gate = asyncio.Semaphore(options.concurrency)

    async def one(index: int) -> tuple[int, Result]:
        async with gate:
            return index, await stream(url, bodies[index], keep_text=True)

    results: list[tuple[int, Result]] = []
    for kills in range(options.kills + 1):
        size = (options.streams - len(results)) // (options.kills + 1 - kills)
        tasks = [asyncio.create_task(one(chooser.randrange(len(bodies)))) for _ in range(size)]
        if kills < options.kills:
            for first in itertools.islice(asyncio.as_completed(tasks), size // 4):
                await first
            kill_one(supervisor, chooser)
            await until(url, all_there=False)
        results += await asyncio.gather(*tasks)
        await until(url, all_there=True)
    failed = [result.error for _, result in results if result.error]
    different = sum(not result.error and result.text != alone[index].text for index, result in results)
    return {
        "streams": len(results),
        "kills": options.kills,
        "different": different,
        "failed": len(failed),
        "first_failure": failed[0] if failed else "",
        "continued": _retries(url),
        "row_invariant": all(worker["row_invariant"] for worker in workers),
    }


def _retries(url: str) -> int:
    with urllib.request.urlopen(f"{url}/metrics", timeout=10) as answer:
        text = answer.read().decode()
    return round(sum(float(value) for value in re.findall(r"^tandem_router_retries_total\S* (\S+)$", text, re.M)))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--modes", default="batch_invariant", help=f"of {', '.join(MODES)}")
    parser.add_argument("--streams", type=int, default=1000)
    parser.add_argument("--kills", type=int, default=17)
    parser.add_argument("--prompts", type=int, default=40)
    parser.add_argument("--tokens", type=int, default=100)
    parser.add_argument("--concurrency", type=int, default=16)
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    found: dict[str, dict[str, Any]] = {}
    for mode in options.modes.split(","):
        process, url = server_of(mode, options.dtype).start()
        try:
            found[mode] = asyncio.run(run(url, process.pid, options))
        finally:
            process.terminate()
            process.wait()
    cpu = re.search(r"model name\s*: (.*)", Path("/proc/cpuinfo").read_text())
    text = json.dumps({"cpu": cpu.group(1) if cpu else "", "dtype": options.dtype, "modes": found}, indent=1)
    print(text)
    if options.out:
        options.out.write_text(text + "\n")
    return int(any(result["different"] for mode, result in found.items() if mode == "batch_invariant"))


if __name__ == "__main__":
    sys.exit(main())
