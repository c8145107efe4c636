"""One router behind both of its front doors, and what came of a call to either in one shape."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import grpc
import grpc.aio
import httpx
from google.protobuf.message import Message
from google.rpc.status_pb2 import Status

from tandem.proto import inference_pb2 as pb
from tandem.proto import inference_pb2_grpc, worker_pb2
from tandem.router.app import Router
from tests.router.conftest import House
from tests.router.fake_worker import FakeWorker, Script

_OPTIONS = [("grpc.max_metadata_size", 1 << 20)]
"""A client that lets a test send what a server refuses."""


@dataclass
class BothDoors:
    worker: FakeWorker
    router: Router
    http: httpx.AsyncClient
    channel: grpc.aio.Channel
    stub: Any

    @classmethod
    async def open(cls, house: House, script: Script | None = None, **settings: Any) -> BothDoors:
        """`close` it before the house."""
        worker = await house.decode(script=script)
        router = await house.router(worker, grpc_port=0, **settings)
        assert router.grpc is not None
        channel = grpc.aio.insecure_channel(f"127.0.0.1:{router.grpc.port}", options=_OPTIONS)
        return cls(worker, router, await house.client(router), channel, inference_pb2_grpc.InferenceStub(channel))

    @property
    def grpc_target(self) -> str:
        assert self.router.grpc is not None
        return f"127.0.0.1:{self.router.grpc.port}"

    async def close(self) -> None:
        await self.channel.close()

    async def post(self, path: str, body: Mapping[str, Any], key: str = "") -> dict[str, Any]:
        headers = {"authorization": f"Bearer {key}"} if key else {}
        response = await self.http.post(path, json=body, headers=headers)
        assert response.status_code == 200, response.text
        answer: dict[str, Any] = response.json()
        return answer

    async def raw(self, method: str, message: bytes, metadata: tuple[tuple[str, str], ...] = ()) -> Any:
        """Any bytes as the message of a call that does not stream."""
        return await self.channel.unary_unary(f"/tandem.v1.Inference/{method}")(message, metadata=metadata, timeout=60)

    def submitted(self) -> list[worker_pb2.Submit]:
        """What the worker was told since the last time, without what differs from call to call."""
        submits = [worker_pb2.Submit.FromString(each.SerializeToString()) for each in self.worker.submits]
        self.worker.submits.clear()
        for submit in submits:
            for name in ("key", "timeout_s", "traceparent"):
                submit.ClearField(name)  # type: ignore[arg-type]
        return submits


@dataclass
class Refusal:
    """An error, as both doors tell it."""

    code: str
    param: str | None
    message: str = field(default="", compare=False)


async def refusal(call: Any) -> Refusal:
    """The error of a gRPC call, which must fail."""
    try:
        await call
    except grpc.aio.AioRpcError as error:
        return refusal_of(error)
    raise AssertionError("there was no error")


def refusal_of(error: grpc.aio.AioRpcError) -> Refusal:
    metadata = dict(error.trailing_metadata() or ())
    assert "tandem-error" in metadata, (error.code(), error.details())
    return Refusal(str(metadata["tandem-error"]), metadata.get("tandem-param"), error.details() or "")  # type: ignore[arg-type]


def details_of(error: grpc.aio.AioRpcError, kind: type[Message]) -> Any:
    """The one of this kind that the status carries."""
    raw = dict(error.trailing_metadata() or ())["grpc-status-details-bin"]
    found = kind()
    status = Status.FromString(raw)  # type: ignore[arg-type]
    assert status.code == error.code().value[0]
    assert any(each.Unpack(found) for each in status.details)
    return found


async def streamed(stub: Any, request: pb.GenerateRequest, **options: Any) -> list[pb.GenerateResponse]:
    return [response async for response in stub.Generate(request, **options)]


def joined_stream(responses: list[pb.GenerateResponse]) -> pb.CompleteResponse:
    """What `Complete` would have answered."""
    whole = pb.CompleteResponse(request_id=responses[0].request_id)
    choices: dict[int, pb.GenerateResponse] = {}
    for response in responses:
        if response.HasField("usage"):
            whole.usage.CopyFrom(response.usage)
            if response.HasField("explain"):
                whole.explain.CopyFrom(response.explain)
            continue
        choice = choices.setdefault(response.index, pb.GenerateResponse(request_id=response.request_id))
        text, calls = choice.text + response.text, {call.index: call for call in choice.tool_calls}
        for part in response.tool_calls:
            if part.index in calls:
                assert not part.id, "only the first part of a call carries its id"
                calls[part.index].arguments += part.arguments
        new = [part for part in response.tool_calls if part.index not in calls]
        choice.MergeFrom(pb.GenerateResponse.FromString(response.SerializeToString()))
        del choice.tool_calls[:]
        choice.tool_calls.extend([*calls.values(), *new])
        choice.text = text
    whole.choices.extend(choices[index] for index in sorted(choices))
    return whole
