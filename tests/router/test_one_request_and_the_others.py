"""What one tenant's requests may take from the others before they reach a worker: threads, memory, free refusals."""

from __future__ import annotations

import asyncio
import json
import threading
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import grpc
import grpc.aio
import httpx
import pytest

from tandem.proto import inference_pb2 as pb
from tandem.proto import inference_pb2_grpc
from tandem.router.fields.json_size import MAX_VALUES
from tandem.router.turns.limits import BYTES_PER_REQUEST, BYTES_PER_TOKEN
from tandem.router.web import body_memory
from tests.router.conftest import House, until
from tests.router.fake_worker import Script
from tests.router.tenants.test_tenant_requests import Desk

LARGE = {"prompt": "a", "max_tokens": 2, "user": "x" * 100_000}
TIMEOUT_S = 30.0


@pytest.fixture
def desk(house: House, tmp_path: Path) -> Desk:
    return Desk(house, tmp_path)


class Blocked:
    """Takes the places that a tenant may take among the router's threads."""

    def __init__(self) -> None:
        self.entered = threading.Event()
        self.opened = threading.Event()

    def __call__(self) -> None:
        self.entered.set()
        assert self.opened.wait(TIMEOUT_S)


async def test_a_large_body_is_read_in_a_thread_of_its_tenants_share(desk: Desk) -> None:
    await desk.open(ann={}, bob={})
    blocked = Blocked()
    work = desk.router.service.work
    held = work.submit("ann", 1.0, blocked)
    await asyncio.to_thread(blocked.entered.wait, TIMEOUT_S)
    try:
        waiting = asyncio.create_task(desk.post("ann", **LARGE))
        await until(lambda: work.waiting("ann") == 1)
        assert (await desk.post("ann")).status_code == 200, "a small one is read at once"
        assert (await desk.post("bob", **LARGE)).status_code == 200, "another tenant's has a place left"
        assert not waiting.done()
    finally:
        blocked.opened.set()
    assert (await waiting).status_code == 200
    held.result(TIMEOUT_S)


async def test_a_client_that_leaves_takes_its_unread_body_along(desk: Desk) -> None:
    await desk.open(ann={})
    blocked = Blocked()
    work = desk.router.service.work
    work.submit("ann", 1.0, blocked)
    await asyncio.to_thread(blocked.entered.wait, TIMEOUT_S)
    try:
        waiting = [asyncio.create_task(desk.post("ann", **LARGE)) for _ in range(3)]
        await until(lambda: work.waiting("ann") == 3)
        assert body_memory.held_bytes() > 3 * 100_000
        for task in waiting:
            task.cancel()
        blocked.opened.set()
        await until(lambda: body_memory.held_bytes() == 0)
    finally:
        blocked.opened.set()


BAD: list[tuple[str, Any]] = [
    ("/v1/completions", {"temperature": "hot"}),
    ("/v1/completions", {"prompt": "word " * 10_000}),
    ("/v1/completions", {"model": "unknown"}),
    ("/v1/chat/completions", {"messages": []}),
    ("/v1/embeddings", {"input": []}),
    ("/v1/responses", {"input": 3}),
    ("/v1/messages", {"messages": [], "max_tokens": 1}),
    ("/v1/messages/count_tokens", {"messages": "a"}),
    ("/v1/responses/input_tokens", {"input": 3}),
    ("/tokenize", {"messages": 3}),
    ("/detokenize", {"tokens": [-1]}),
]


@pytest.mark.parametrize(("path", "body"), BAD)
async def test_no_refusal_is_free(desk: Desk, path: str, body: dict[str, Any]) -> None:
    await desk.open(ann={"requests_per_minute": 2}, bob={})
    for left in ("1", "0"):
        answer = await desk.post("ann", path, **body)
        assert answer.status_code in (400, 404), answer.text
        assert answer.headers["x-ratelimit-remaining-requests"] == left
    assert (await desk.post("ann", path, **body)).status_code == 429
    assert (await desk.post("bob")).status_code == 200


async def test_a_large_refusal_costs_what_it_took_to_read(desk: Desk) -> None:
    await desk.open(ann={"requests_per_minute": 500, "tokens_per_minute": 100_000})
    answer = await desk.post("ann", prompt=[1] * (MAX_VALUES + 1))
    assert answer.status_code == 413
    size = 2 * MAX_VALUES
    after = await desk.post("ann")
    assert int(after.headers["x-ratelimit-remaining-requests"]) < 500 - 2 - size // BYTES_PER_REQUEST // 2
    assert int(after.headers["x-ratelimit-remaining-tokens"]) < 100_000 - size // BYTES_PER_TOKEN // 2


async def test_many_large_texts_at_once_cost_no_more_than_their_tenant_has(desk: Desk) -> None:
    await desk.open(ann={"requests_per_minute": 20}, bob={})
    text = "a b " * 100_000
    answers = await asyncio.gather(*(desk.post("ann", "/tokenize", prompt=text) for _ in range(8)))
    refused = [answer.status_code for answer in answers if answer.status_code != 200]
    most = 1 + 20 * BYTES_PER_REQUEST // len(text)
    assert (set(refused), 8 - most <= len(refused) < 8) == ({429}, True)
    assert (await desk.post("bob", "/tokenize", prompt=text)).status_code == 200


COUNTED: list[tuple[str, dict[str, Any]]] = [
    ("/tokenize", {"prompt": "a"}),
    ("/detokenize", {"tokens": [5, 6]}),
    ("/v1/responses/input_tokens", {"input": "a"}),
    ("/v1/messages/count_tokens", {"messages": [{"role": "user", "content": "a"}]}),
]


@pytest.mark.parametrize(("path", "body"), COUNTED)
async def test_what_needs_no_worker_counts_among_the_requests(desk: Desk, path: str, body: dict[str, Any]) -> None:
    await desk.open(ann={"requests_per_minute": 1})
    async with httpx.AsyncClient(base_url=desk.router.url, trust_env=False, timeout=TIMEOUT_S) as client:
        for status in (200, 429):
            answer = await client.post(path, json=body, headers={"authorization": "Bearer ann"})
            assert answer.status_code == status, answer.text


async def test_grpc_counts_the_same(desk: Desk) -> None:
    await desk.open(ann={"requests_per_minute": 2})
    assert desk.router.grpc is not None
    key = (("authorization", "Bearer ann"),)
    async with grpc.aio.insecure_channel(f"127.0.0.1:{desk.router.grpc.port}") as channel:
        stub: Any = inference_pb2_grpc.InferenceStub(channel)
        await stub.Tokenize(pb.TokenizeRequest(text="a"), metadata=key)
        with pytest.raises(grpc.aio.AioRpcError) as bad:
            await stub.Detokenize(pb.DetokenizeRequest(tokens=[10**6]), metadata=key)
        assert bad.value.code() is grpc.StatusCode.INVALID_ARGUMENT
        with pytest.raises(grpc.aio.AioRpcError) as refused:
            await stub.Tokenize(pb.TokenizeRequest(text="a"), metadata=key)
        assert refused.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
        await stub.ListModels(pb.ListModelsRequest(), metadata=key)


async def test_a_request_is_in_flight_from_its_first_byte(desk: Desk) -> None:
    await desk.open(ann={"max_concurrent": 1}, bob={})
    sent, more = asyncio.Event(), asyncio.Event()
    body = json.dumps({"prompt": "a", "max_tokens": 2}).encode()

    async def slowly() -> AsyncIterator[bytes]:
        yield body[:10]
        sent.set()
        await more.wait()
        yield body[10:]

    async with httpx.AsyncClient(base_url=desk.router.url, trust_env=False, timeout=TIMEOUT_S) as client:
        headers = {"authorization": "Bearer ann", "content-length": str(len(body))}
        slow = asyncio.create_task(client.post("/v1/completions", content=slowly(), headers=headers))
        await sent.wait()
        await until(lambda: desk.router.accounts.limits._states)
        assert (await desk.post("ann", "/tokenize")).status_code == 429
        assert (await desk.post("bob")).status_code == 200
        more.set()
        assert (await slow).status_code == 200
    assert (await desk.post("ann", "/tokenize")).status_code == 200


async def test_bodies_of_one_tenant_leave_room_for_those_of_another(
    desk: Desk, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(body_memory, "MAX_HELD_BYTES", 450_000)
    await desk.open(Script(hold_after=1), ann={}, bob={})
    held = [asyncio.create_task(desk.post("ann", **LARGE)) for _ in range(2)]
    await until(lambda: len(desk.worker.submits) == 2)
    refused = await desk.post("ann", **LARGE)
    assert (refused.status_code, refused.json()["error"]["code"]) == (503, "overloaded")
    held.append(asyncio.create_task(desk.post("bob", **LARGE)))
    await until(lambda: len(desk.worker.submits) == 3)
    desk.worker.resume.set()
    assert [(await task).status_code for task in held] == [200] * 3
    assert body_memory.held_bytes() == 0
