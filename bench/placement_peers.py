"""The policies that `placement.py` stands ours beside: Dynamo's router core, and three simple ones.

Dynamo's `SelectionService` (PyPI `ai-dynamo-runtime`, in an environment of its own) runs in a child process, which is
this same file: it speaks JSON lines and imports nothing else of this folder.
"""

from __future__ import annotations

import asyncio
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from mock_pool import Job, MockWorker

DYNAMO = {
    "Dynamo": {},
    "Dynamo, prefill load x 32": {"DYN_ROUTER_PREFILL_LOAD_SCALE": "32"},
    "Dynamo, 20 blocks a request": {"DYN_ROUTER_DECODE_ACTIVE_REQUEST_WEIGHT": "20"},
}
"""By name: what is set. The second was the best for this trace of a search over prefill load, weight of a request and
decay of the overlap's credit; the third spreads herds."""
_DYNAMO_ENV = {
    "DYN_ROUTER_USE_KV_EVENTS": "false",
    "DYN_ROUTER_APPROXIMATE_CACHE_POLICY": "lru",
    "DYN_ROUTER_TTL_SECS": "1000000",
    "DYN_ROUTER_ACTIVE_REQUEST_EXPIRY_SECS": "1000000",
    "DYN_LOG": "error",
}
"""It learns what is cached from its own decisions, as large as the workers' caches are: what it knows is nearly exact.
Its time is the machine's and not the trace's, so nothing may depend on it."""


class Dynamo:
    """Dynamo's router core, told of each request's life as its own frontend tells it."""

    def __init__(self, python: Path, workers: int, cache_blocks: int, block_tokens: int, env: dict[str, str]) -> None:
        self._child = subprocess.Popen(
            [str(python), __file__],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env={**os.environ, **_DYNAMO_ENV, **env},
        )
        self._news: list[tuple[str, int]] = []
        self._ask({"workers": workers, "cache_blocks": cache_blocks, "block_tokens": block_tokens})

    def place(self, job: Job, now: float) -> tuple[int, int | None]:
        request = job.request
        news, self._news = self._news, []
        return self._ask(
            {"news": news, "id": job.number, "blocks": request.blocks, "tokens": request.prompt_tokens}
        ), None

    def prompt_computed(self, job: Job, now: float) -> None:
        self._news.append(("computed", job.number))

    def finished(self, job: Job, now: float) -> None:
        self._news.append(("finished", job.number))

    def status(self, worker: MockWorker, now: float) -> None:
        """The core takes no part of a worker's status that would change a choice."""

    def close(self) -> None:
        assert self._child.stdin is not None
        self._child.stdin.close()
        self._child.wait(30)

    def _ask(self, message: dict[str, object]) -> int:
        assert self._child.stdin is not None
        assert self._child.stdout is not None
        self._child.stdin.write(json.dumps(message) + "\n")
        self._child.stdin.flush()
        line = self._child.stdout.readline()
        if not line:
            raise SystemExit(f"the child that runs Dynamo's router core ended with {self._child.wait()}")
        return int(line)


class _Simple:
    """Needs to know nothing but the workers."""

    def __init__(self, workers: list[MockWorker]) -> None:
        self.workers = workers
        self.requests = [0] * len(workers)
        self.next = 0

    def prompt_computed(self, job: Job, now: float) -> None: ...

    def finished(self, job: Job, now: float) -> None:
        self.requests[job.decode] -= 1

    def status(self, worker: MockWorker, now: float) -> None: ...

    def close(self) -> None: ...

    def chosen(self, index: int) -> tuple[int, int | None]:
        self.requests[index] += 1
        self.next = (index + 1) % len(self.workers)
        return index, None

    def by_load(self, index: int) -> tuple[int, int]:
        """Fewest requests first; ties go round."""
        return self.requests[index], (index - self.next) % len(self.workers)


class RoundRobin(_Simple):
    def place(self, job: Job, now: float) -> tuple[int, int | None]:
        return self.chosen(self.next)


class LeastLoaded(_Simple):
    """Fewest requests in flight."""

    def place(self, job: Job, now: float) -> tuple[int, int | None]:
        return self.chosen(min(range(len(self.workers)), key=self.by_load))


class LongestPrefix(_Simple):
    """Most of the prompt cached, looked up in the workers' caches themselves; ties to the fewest requests."""

    def place(self, job: Job, now: float) -> tuple[int, int | None]:
        hits = [worker.cache.match(job.request.blocks) for worker in self.workers]
        return self.chosen(min(range(len(self.workers)), key=lambda i: (-hits[i], *self.by_load(i))))


class _Selection(Protocol):
    """What is used of Dynamo's `SelectionService`."""

    async def upsert_worker(self, worker: dict[str, object]) -> object: ...
    async def select_and_reserve(self, request: dict[str, object]) -> dict[str, int]: ...
    async def prefill_complete(self, selection_id: str) -> None: ...
    async def free_reservation(self, selection_id: str) -> None: ...


async def _serve(service: _Selection) -> None:
    setup = json.loads(sys.stdin.readline())
    for index in range(setup["workers"]):
        worker = {"worker_id": index, "model_name": "m", "endpoint": f"http://worker-{index}", "data_parallel_size": 1}
        sizes = {"block_size": setup["block_tokens"], "total_kv_blocks": setup["cache_blocks"]}
        await service.upsert_worker({**worker, **sizes, "max_num_batched_tokens": 8192})
    print(0, flush=True)
    for line in sys.stdin:
        ask = json.loads(line)
        for what, number in ask["news"]:
            if what == "computed":
                await service.prefill_complete(str(number))
            else:
                await service.free_reservation(str(number))
        hashes = {"block_hashes": ask["blocks"], "sequence_hashes": ask["blocks"], "isl_tokens": ask["tokens"]}
        chosen = await service.select_and_reserve({"model_name": "m", "selection_id": str(ask["id"]), **hashes})
        print(chosen["worker_id"], flush=True)


if __name__ == "__main__":
    from dynamo.llm import SelectionService  # type: ignore[import-not-found]

    asyncio.run(_serve(SelectionService(indexer_threads=1)))
