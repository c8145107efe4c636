"""The public gRPC service."""

from __future__ import annotations

import asyncio
import hashlib
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import grpc
import grpc.aio
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc

from tandem.proto import inference_pb2 as pb
from tandem.proto import inference_pb2_grpc
from tandem.router.text.tokenizer import ModelText
from tests.router.conftest import House, until
from tests.router.fake_worker import FakeWorker, Script


@pytest.fixture
async def worker(house: House) -> FakeWorker:
    return await house.decode(script=Script(delay_s=0.001))


@pytest.fixture
async def channel(house: House, worker: FakeWorker) -> AsyncIterator[grpc.aio.Channel]:
    router = await house.router(worker, grpc_port=0)
    assert router.grpc is not None
    async with grpc.aio.insecure_channel(f"127.0.0.1:{router.grpc.port}") as channel:
        yield channel


@pytest.fixture
def stub(channel: grpc.aio.Channel) -> Any:
    return inference_pb2_grpc.InferenceStub(channel)


async def test_generate_streams_text_tokens_and_usage(stub: Any, house: House) -> None:
    ids = await ModelText(house.model).encode("The river", add_special_tokens=True)
    responses = [r async for r in stub.Generate(pb.GenerateRequest(prompt="The river", max_tokens=4, seed=3))]
    *parts, last = responses
    assert [token for part in parts for token in part.token_ids] == [ids[i % len(ids)] for i in range(4)]
    assert "".join(part.text for part in parts) == ModelText(house.model).decode([ids[i % len(ids)] for i in range(4)])
    assert [part.finish_reason for part in parts][-1] == "length"
    assert last.usage == pb.Usage(prompt_tokens=len(ids), completion_tokens=4)
    assert len({response.request_id for response in responses}) == 1


async def test_chat_and_token_ids_are_inputs_too(stub: Any, worker: FakeWorker) -> None:
    chat = pb.ChatMessages(messages=[pb.ChatMessage(role="user", content="Hello")])
    for request in (
        pb.GenerateRequest(chat=chat, max_tokens=1),
        pb.GenerateRequest(prompt_token_ids=pb.TokenIds(ids=[7, 8]), max_tokens=1),
    ):
        assert [r async for r in stub.Generate(request)]
    assert worker.submits[0].prompt_token_ids[0] == 1
    assert list(worker.submits[1].prompt_token_ids) == [7, 8]


@pytest.mark.parametrize(
    ("request_", "code", "param"),
    [
        (pb.GenerateRequest(), "INVALID_ARGUMENT", "input"),
        (pb.GenerateRequest(prompt="a", model="other"), "NOT_FOUND", "model"),
        (pb.GenerateRequest(prompt="a", temperature=5), "INVALID_ARGUMENT", "temperature"),
        (pb.GenerateRequest(prompt="a", n=99), "INVALID_ARGUMENT", "n"),
        (pb.GenerateRequest(prompt_token_ids=pb.TokenIds(ids=[600])), "INVALID_ARGUMENT", "prompt_token_ids"),
        (pb.GenerateRequest(prompt="a", max_tokens=5000), "INVALID_ARGUMENT", "max_tokens"),
    ],
)
async def test_bad_requests(stub: Any, request_: pb.GenerateRequest, code: str, param: str) -> None:
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        [r async for r in stub.Generate(request_)]
    assert caught.value.code().name == code
    assert dict(caught.value.trailing_metadata())["tandem-param"] == param


async def test_cancelled_call_cancels_on_the_worker(stub: Any, worker: FakeWorker) -> None:
    call = stub.Generate(pb.GenerateRequest(prompt="Hello", max_tokens=400))
    await call.read()
    call.cancel()
    await until(lambda: worker.cancels)


async def test_lost_worker_is_unavailable(stub: Any, worker: FakeWorker) -> None:
    worker.script = Script(hold_after=1)
    call = stub.Generate(pb.GenerateRequest(prompt="Hello", max_tokens=4))
    await call.read()
    await worker.kill()
    assert await call.code() is grpc.StatusCode.UNAVAILABLE


async def test_tokenize_and_models(stub: Any) -> None:
    ids = (await stub.Tokenize(pb.TokenizeRequest(text="The river"))).token_ids
    assert len(ids) == 2
    models = (await stub.ListModels(pb.ListModelsRequest())).models
    assert [(model.id, model.max_model_len) for model in models] == [("tiny", 512)]


async def test_health_follows_readiness(channel: grpc.aio.Channel, worker: FakeWorker) -> None:
    watch = health_pb2_grpc.HealthStub(channel).Watch(health_pb2.HealthCheckRequest(service="tandem.v1.Inference"))

    async def becomes(wanted: int) -> None:
        async with asyncio.timeout(30):
            async for response in watch:
                if response.status == wanted:
                    return

    await becomes(health_pb2.HealthCheckResponse.SERVING)
    await worker.kill()
    await becomes(health_pb2.HealthCheckResponse.NOT_SERVING)


async def test_reflection_lists_the_services(channel: grpc.aio.Channel) -> None:
    stub = reflection_pb2_grpc.ServerReflectionStub(channel)
    call = stub.ServerReflectionInfo(iter([reflection_pb2.ServerReflectionRequest(list_services="")]))
    response = await call.read()
    names = {service.name for service in response.list_services_response.service}
    assert {"tandem.v1.Inference", "grpc.health.v1.Health"} <= names


async def test_api_keys_guard_grpc_too(house: House, tmp_path: Path) -> None:
    keys = tmp_path / "keys"
    keys.write_text(f"ann:{hashlib.sha256(b'sk-ann').hexdigest()}\n")
    router = await house.router(await house.decode("decode-9"), grpc_port=0, api_keys_file=keys)
    assert router.grpc is not None
    async with grpc.aio.insecure_channel(f"127.0.0.1:{router.grpc.port}") as channel:
        stub: Any = inference_pb2_grpc.InferenceStub(channel)
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await stub.ListModels(pb.ListModelsRequest())
        assert caught.value.code() is grpc.StatusCode.UNAUTHENTICATED
        await stub.ListModels(pb.ListModelsRequest(), metadata=(("authorization", "Bearer sk-ann"),))
