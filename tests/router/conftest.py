"""A router between a real HTTP client and scripted workers, all in one process."""

from __future__ import annotations

import asyncio
import itertools
import json
import shutil
import tempfile
import time
from collections.abc import AsyncIterator, Callable, Iterable
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Any

import httpx
import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from tandem.proto import worker_pb2
from tandem.router.app import Router
from tandem.router.fleet.session import WorkerSession
from tandem.router.settings import RouterConfig
from tests.router.fake_worker import FakeWorker, Script

CHATML = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
PATIENCE_S = 60.0
"""Nothing takes so long, however busy the machine is."""
TEXT = "The river ran past the old mill and under the bridge, where two boats lay tied in the shade. Hello world, user!"


def write_model(folder: Path) -> Path:
    """Tokenizer, template and limits of a model without weights."""
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=["<|endoftext|>", "<|im_start|>", "<|im_end|>"],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator([TEXT] * 3, trainer)
    tokenizer.save(str(folder / "tokenizer.json"))
    config = {"architectures": ["LlamaForCausalLM"], "vocab_size": 512, "max_position_embeddings": 1024}
    (folder / "config.json").write_text(json.dumps(config))
    names = {"bos_token": "<|endoftext|>", "eos_token": {"content": "<|im_end|>"}, "chat_template": CHATML}
    (folder / "tokenizer_config.json").write_text(json.dumps(names))
    (folder / "generation_config.json").write_text(json.dumps({"temperature": 0.7, "top_p": 0.9}))
    return folder


@pytest.fixture(scope="session")
def model_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp("model") / "tiny")


class House:
    """Workers, routers and clients of one test."""

    def __init__(self, folder: Path, model: Path, stack: AsyncExitStack) -> None:
        self.folder = folder
        self.model = model
        self._stack = stack

    async def decode(self, name: str = "decode-0", script: Script | None = None, **fields: Any) -> FakeWorker:
        return await self._worker(worker_pb2.ROLE_DECODE, name, script, fields)

    async def prefill(
        self, name: str = "prefill-0", script: Script | None = None, to: tuple[FakeWorker, ...] = (), **fields: Any
    ) -> FakeWorker:
        fields["peers"] = {worker.worker_id: worker for worker in to}
        return await self._worker(worker_pb2.ROLE_PREFILL, name, script, fields)

    async def router(
        self, *workers: FakeWorker, silence_s: float = PATIENCE_S, wait: bool = True, **settings: Any
    ) -> Router:
        settings.setdefault("disaggregate", "always")
        settings.setdefault("worker_wait_s", PATIENCE_S)
        config = RouterConfig(
            model=str(self.model),
            port=0,
            decode_workers=[w.target for w in workers if w.role == worker_pb2.ROLE_DECODE],
            prefill_workers=[w.target for w in workers if w.role == worker_pb2.ROLE_PREFILL],
            drain_grace_s=settings.pop("drain_grace_s", 1.0),
            **settings,
        )
        router = Router(config, silence_s=silence_s)
        await router.start()
        self._stack.push_async_callback(router.stop)
        if wait:
            await until(lambda: all(is_known(client.session) for client in router.fleet.clients))
        return router

    async def client(self, router: Router, **options: Any) -> httpx.AsyncClient:
        client = httpx.AsyncClient(base_url=router.url, timeout=PATIENCE_S, trust_env=False, **options)
        return await self._stack.enter_async_context(client)

    async def pair(self, script: Script | None = None, **settings: Any) -> tuple[FakeWorker, httpx.AsyncClient]:
        """One decode worker behind a router, with a client."""
        worker = await self.decode(script=script)
        return worker, await self.client(await self.router(worker, **settings))

    async def _worker(self, role: Any, name: str, script: Script | None, fields: dict[str, Any]) -> FakeWorker:
        worker = FakeWorker(role, self.folder / f"{name}.sock", script or Script(), **fields)
        await worker.start()
        self._stack.push_async_callback(worker.kill)
        return worker


@pytest.fixture
async def house(model_folder: Path) -> AsyncIterator[House]:
    folder = Path(tempfile.mkdtemp(prefix="tandem-"))  # short: paths of unix sockets have about 100 characters
    async with AsyncExitStack() as stack:
        yield House(folder, model_folder, stack)
    shutil.rmtree(folder)


@pytest.fixture
async def bare_client(model_folder: Path) -> AsyncIterator[httpx.AsyncClient]:
    """Talks to the ASGI application of a router without servers and workers: enough for what is refused early."""
    config = RouterConfig(model=str(model_folder), decode_workers=["unix:/nowhere.sock"], worker_wait_s=0.0)
    router = Router(config)
    refusing = asyncio.create_task(router.service.pump_regularly())  # what is good waits for a worker otherwise
    transport = httpx.ASGITransport(router.app)
    async with httpx.AsyncClient(transport=transport, base_url="http://router") as client:
        yield client
    refusing.cancel()
    router.model.text.close()


def is_known(session: WorkerSession | None) -> bool:
    """Its first status has come."""
    return session is not None and (session.usable or session.status.draining)


async def until(condition: Callable[[], Any], timeout_s: float = PATIENCE_S) -> None:
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline, "the condition did not come true in time"
        await asyncio.sleep(0.005)


async def router_metrics(client: httpx.AsyncClient) -> str:
    """Metrics of the router alone, without the label that says so."""
    text = (await client.get("/metrics")).text
    return text.replace('{process="router",', "{").replace('{process="router"}', "")


def joined(lists: Iterable[list[Any]]) -> list[Any]:
    return list(itertools.chain.from_iterable(lists))


def events(text: str) -> list[Any]:
    """Data of server-sent events, comments left out; `[DONE]` stays a string."""
    found: list[Any] = []
    for block in text.split("\n\n"):
        if block.startswith("data: "):
            data = block.removeprefix("data: ")
            found.append(data if data == "[DONE]" else json.loads(data))
    return found
