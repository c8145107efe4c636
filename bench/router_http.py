"""What the router adds to a request: HTTP through `tandem router` against the same request straight to its worker.

The worker follows a script (the fake worker of the router's tests, no model), so what is measured is transport and
router. Rounds of the two alternate in one run. Prints a table and JSON.

    python bench/router_http.py --rounds 5 --out bench/results/router_http.json
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import AsyncIterator, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import grpc.aio
import psutil

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "bench")]

from load import stream  # noqa: E402
from serve import percentile  # noqa: E402

from tandem.proto import worker_pb2, worker_pb2_grpc  # noqa: E402

OUTPUT_TOKENS = 3
"""In one message: a message per token would measure the worker's script instead."""


@dataclass(slots=True)
class Case:
    """Requests with one length of prompt."""

    prompt_tokens: int
    direct_ms: list[float] = field(default_factory=list)
    routed_ms: list[float] = field(default_factory=list)

    def figures(self) -> dict[str, float]:
        direct, routed = self.direct_ms, self.routed_ms
        return {
            "prompt_tokens": self.prompt_tokens,
            "direct_p50_ms": round(statistics.median(direct), 3),
            "routed_p50_ms": round(statistics.median(routed), 3),
            "added_p50_ms": round(statistics.median(routed) - statistics.median(direct), 3),
            "added_p99_ms": round(percentile(routed, 0.99) - percentile(direct, 0.99), 3),
        }


class DirectSession:
    """A router's session without a router: one gRPC stream to the worker."""

    def __init__(self, target: str) -> None:
        self._channel = grpc.aio.insecure_channel(target)
        self._requests: asyncio.Queue[worker_pb2.SessionRequest] = asyncio.Queue()
        self._responses = worker_pb2_grpc.WorkerStub(self._channel).Session(self._sent())  # type: ignore[no-untyped-call]

    async def _sent(self) -> AsyncIterator[worker_pb2.SessionRequest]:
        yield worker_pb2.SessionRequest(hello=worker_pb2.Hello(router_id="bench"))
        while True:
            yield await self._requests.get()

    async def run(self, request_id: str, prompt: list[int]) -> float:
        """Seconds from submit to the last token."""
        key = worker_pb2.RequestKey(request_id=request_id, epoch=1)
        sampling = worker_pb2.SamplingParams(max_tokens=OUTPUT_TOKENS)
        submit = worker_pb2.Submit(key=key, prompt_token_ids=prompt, sampling=sampling)
        started = time.perf_counter()
        await self._requests.put(worker_pb2.SessionRequest(submit=submit))
        async for response in self._responses:
            for output in response.outputs:
                if output.key.request_id == request_id and output.finish_reason:
                    return time.perf_counter() - started
        raise ConnectionError("the worker's session ended")

    async def close(self) -> None:
        await self._channel.close()


async def serve_worker(socket: Path) -> None:
    from tests.router.fake_worker import FakeWorker, Script

    worker = FakeWorker(worker_pb2.ROLE_DECODE, socket, Script(per_output=OUTPUT_TOKENS), max_model_len=4096)
    worker.vocab_size = 4096
    await worker.start()
    print("ready", flush=True)
    await asyncio.Event().wait()


def wait_ready(url: str) -> None:
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        try:
            with urllib.request.urlopen(url, timeout=2):
                return
        except OSError:
            time.sleep(0.1)
    raise SystemExit("the router was not ready in 60 s")


@contextmanager
def running(folder: Path, model: Path) -> Iterator[tuple[str, str, psutil.Process]]:
    """A worker and a router; yields the worker's target, the router's URL and its process."""
    socket = folder / "worker.sock"
    worker = subprocess.Popen([sys.executable, __file__, "--worker", str(socket)], stdout=subprocess.PIPE)
    port = 18_000 + os.getpid() % 10_000
    command = [sys.executable, "-m", "tandem.runtime.cli", "router", "--model", str(model), "--port", str(port)]
    router = subprocess.Popen(
        [*command, "--decode-workers", f'["unix:{socket}"]', "--log-level", "warning", "--served-model-name", "bench"]
    )
    try:
        assert worker.stdout is not None
        worker.stdout.readline()
        wait_ready(f"http://127.0.0.1:{port}/readyz")
        yield f"unix:{socket}", f"http://127.0.0.1:{port}", psutil.Process(router.pid)
    finally:
        for process in (router, worker):
            process.kill()
            process.wait()


async def measure(cases: list[Case], target: str, url: str, rounds: int, requests: int) -> None:
    session = DirectSession(target)
    for round_number in range(rounds):
        for case in cases:
            prompt = [(7 * i) % 4000 + 4 for i in range(case.prompt_tokens)]
            body: dict[str, object] = {
                "model": "bench",
                "prompt": prompt,
                "max_tokens": OUTPUT_TOKENS,
                "temperature": 0,
            }
            for index in range(requests):
                case.direct_ms.append(1e3 * await session.run(f"{round_number}-{case.prompt_tokens}-{index}", prompt))
            for _ in range(requests):
                result = await stream(url, body)
                if result.error:
                    raise RuntimeError(result.error)
                case.routed_ms.append(1e3 * result.last)
    await session.close()


async def throughput(url: str, router: psutil.Process, seconds: float, concurrency: int) -> dict[str, float]:
    """Streaming requests per second with `concurrency` clients, and the router's processor time for each."""
    body: dict[str, object] = {"model": "bench", "prompt": list(range(4, 44)), "max_tokens": OUTPUT_TOKENS}
    done, stop_at = 0, time.perf_counter() + seconds

    async def client() -> None:
        nonlocal done
        while time.perf_counter() < stop_at:
            result = await stream(url, body)
            if result.error:
                raise RuntimeError(result.error)
            done += 1

    before, started = router.cpu_times(), time.perf_counter()
    await asyncio.gather(*(client() for _ in range(concurrency)))
    after, wall = router.cpu_times(), time.perf_counter() - started
    used = after.user + after.system - before.user - before.system
    return {"requests_per_s": round(done / wall, 1), "router_cpu_us_per_request": round(1e6 * used / done, 1)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--requests", type=int, default=100, help="per round, case and way")
    parser.add_argument("--model", type=Path, default=ROOT / "examples/small_model/model")
    parser.add_argument("--out", type=Path)
    parser.add_argument("--worker", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.worker:
        asyncio.run(serve_worker(arguments.worker))
        return
    cases = [Case(40), Case(400), Case(1600)]
    with tempfile.TemporaryDirectory() as folder, running(Path(folder), arguments.model) as (target, url, router):
        asyncio.run(measure([Case(40)], target, url, 1, 30))  # warm
        asyncio.run(measure(cases, target, url, arguments.rounds, arguments.requests))
        load = asyncio.run(throughput(url, router, 5.0, 16))
    found = {
        "cases": [case.figures() for case in cases],
        "throughput": load,
        "machine": {"cpu": platform.processor() or platform.machine(), "cores": os.cpu_count()},
    }
    for row in [case.figures() for case in cases]:
        print("  ".join(f"{name} {value:g}" for name, value in row.items()))
    print("  ".join(f"{name} {value:g}" for name, value in load.items()))
    if arguments.out:
        arguments.out.write_text(json.dumps(found, indent=1) + "\n")
    else:
        print(json.dumps(found))


if __name__ == "__main__":
    main()
