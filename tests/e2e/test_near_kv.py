"""A store whose disk keeps KV in a codec that is not exact, a worker that takes such KV and one that does not: the
second one answers as if it were alone, whatever the first has computed, handed over or saved."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import pytest

from tandem.common.credentials import open_channel
from tandem.proto import kvnode_pb2, kvnode_pb2_grpc
from tests.e2e.cluster import CHUNK, Process, costly_model
from tests.e2e.serving import eventually, tandem_command
from tests.models import VOCAB_SIZE
from tests.ports import free_port

LENGTH = 300
PROMPTS = 3
"""A machine that is busy may compute one in place of loading it."""


@dataclass(frozen=True, slots=True)
class Answer:
    tokens: list[int]
    logprobs: list[float]
    near_tokens: int
    explained: dict[str, Any]

    def equals(self, other: Answer) -> bool:
        return self.tokens == other.tokens and self.logprobs == pytest.approx(other.logprobs, abs=1e-5)


class Shared:
    """One store node; a decode worker without near KV, alone (`exact`) and behind a prefill worker with it (`split`);
    and a decode worker with it (`near`)."""

    def __init__(self, model: Path, folder: Path, stack: ExitStack) -> None:
        self.processes: dict[str, Process] = {}
        self._clients: dict[str, httpx.Client] = {}
        self._folder, self._stack = folder, stack
        store = {
            "kv_chunk_tokens": CHUNK,
            "kv_store_socket": str(folder / "kv"),
            "drain_grace_s": 5.0,
            "metrics_port": 0,
        }
        disk = {"kv_disk": str(folder / "disk"), "kv_disk_codec": "kivi-int8", "kv_near": True}
        self._add("node", "kvstore", store | disk | {"kv_host_bytes": 64 << 20, "listen": self._at("node")})
        served = {"model": str(model), "served_model_name": "tiny"}
        for name, role, near in (("prefill", "prefill", True), ("near", "decode", True), ("exact", "decode", False)):
            own = {"dtype": "float32", "kv_cache_bytes": 16 << 20, "listen": self._at(name), "worker_id": name}
            self._add(name, role, store | served | own | {"kv_near": near})
        for name, workers in (("near", ["near"]), ("exact", ["exact"]), ("split", ["prefill", "exact"])):
            port = free_port()
            used = {
                f"{role}_workers": [self._at(each) for each in workers if (each == "prefill") == (role == "prefill")]
                for role in ("prefill", "decode")
            }
            how = {"disaggregate": "always", "host": "127.0.0.1", "port": port}
            self._add(f"router-{name}", "router", served | used | how)
            client = httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=180.0, trust_env=False)
            self._clients[name] = stack.enter_context(client)
        for process in self.processes.values():
            process.start()
        for process in self.processes.values():
            process.wait_ready()

    def _at(self, name: str) -> str:
        return f"unix:{self._folder / name}.sock"

    def _add(self, name: str, command: str, settings: dict[str, Any]) -> None:
        process = Process(name, command, self._folder, tandem_command(), settings)
        self._stack.callback(process.kill)
        self.processes[name] = process

    def ask(self, router: str, prompt: Sequence[int], max_tokens: int, salt: str = "") -> Answer:
        body = {"model": "tiny", "prompt": list(prompt), "max_tokens": max_tokens, "temperature": 0, "logprobs": 1}
        body |= {"ignore_eos": True, "return_token_ids": True} | ({"cache_salt": salt} if salt else {})
        answer = self._clients[router].post("/v1/completions", json=body, headers={"x-tandem-explain": "1"})
        assert answer.status_code == 200, answer.text
        content = answer.json()
        (choice,) = content["choices"]
        details = content["usage"]["prompt_tokens_details"]
        explained = content["explain"]["attempts"][-1]
        assert explained["near_tokens"] == details.get("cached_tokens_near", 0) <= details["cached_tokens"]
        scores = choice["logprobs"]["token_logprobs"]
        return Answer(choice["token_ids"], scores, explained["near_tokens"], explained)

    def forget(self, *names: str) -> None:
        """Kills these, and waits until others took their places and all routers know them."""
        if "node" in names:
            with open_channel(self._at("node"), b"") as channel:
                drained = kvnode_pb2_grpc.KvNodeStub(channel).Drain(kvnode_pb2.DrainRequest(grace_s=20), timeout=30)
                assert drained.flushed
        for name in names:
            self.processes[name].restart()
        for router, count in (("near", 1), ("exact", 1), ("split", 2)):
            eventually(lambda router=router, count=count: self._workers(router) == count, what="workers up")

    def _workers(self, router: str) -> float:
        lines = self._clients[router].get("/metrics").text.splitlines()
        return sum(float(line.rpartition(" ")[2]) for line in lines if line.startswith("tandem_worker_up"))


@pytest.fixture
def shared(tmp_path: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Shared]:
    with ExitStack() as stack:
        yield Shared(costly_model(tmp_path_factory.mktemp("near")), tmp_path, stack)


def test_a_worker_without_near_kv_meets_none(shared: Shared) -> None:
    generator = random.Random(9)
    prompts = [[generator.randrange(3, VOCAB_SIZE) for _ in range(LENGTH)] for _ in range(PROMPTS)]
    clean = [shared.ask("exact", prompt, 8, f"clean {index}") for index, prompt in enumerate(prompts)]
    for prompt in prompts:
        shared.ask("exact", prompt, 1)
    shared.forget("node", "exact", "near", "prefill")  # the prompts are on disk only: not exact any more

    near = [shared.ask("near", prompt, 150) for prompt in prompts]
    used = [answer for answer in near if answer.near_tokens]
    assert used, "no prompt was loaded"
    assert all(answer.explained["inexact_from"] == 0 for answer in used)
    assert not all(answer.logprobs[:8] == other.logprobs for answer, other in zip(near, clean, strict=True))
    shared.forget("near")  # what it saved is saved

    # The same prompts, the next turns of their conversations, and prompts that a worker with near KV computes.
    turns = [[*prompt, *answer.tokens, 5, 6, 7] for prompt, answer in zip(prompts, near, strict=True)]
    clean_turns = [shared.ask("exact", turn, 8, f"turn {index}") for index, turn in enumerate(turns)]
    for router in ("exact", "split"):
        shared.forget("exact", "prefill")
        for prompt, expected in zip([*prompts, *turns], [*clean, *clean_turns], strict=True):
            answer = shared.ask(router, prompt, 8)
            assert answer.equals(expected), f"{router}: {answer} instead of {expected}"
            assert answer.near_tokens == 0
            assert answer.explained["inexact_from"] is None
            assert answer.explained["recompute_reason"] == ""
