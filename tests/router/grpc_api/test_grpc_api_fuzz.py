"""Whatever bytes come as a message, the answer is never INTERNAL or UNKNOWN, and others notice nothing."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import random
import threading
from collections.abc import Awaitable, Callable, Iterator
from contextlib import AsyncExitStack
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import grpc
import grpc.aio
import pytest
from google.protobuf.descriptor import FieldDescriptor
from google.protobuf.message import Message
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tandem.proto import inference_pb2 as pb
from tandem.router.grpc_api.service import METHODS
from tests.router.both_doors import BothDoors
from tests.router.conftest import House
from tests.router.fake_worker import Script
from tests.router.tool_models import write_tool_model

BAD = {grpc.StatusCode.INTERNAL, grpc.StatusCode.UNKNOWN}
INNOCENT = pb.GenerateRequest(prompt="The river", max_tokens=5, temperature=0)


class Thread:
    """A router in a thread, with both doors and a log that is watched, for all examples."""

    def __init__(self, model_folder: Path) -> None:
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever)
        self._thread.start()
        self._stack = AsyncExitStack()
        self._folder = TemporaryDirectory(prefix="tandem-")
        self._model = model_folder
        self.doors = self.run(self._open)
        self.expected = self.run(self.innocent)

    def run(self, work: Callable[[], Awaitable[Any]]) -> Any:
        async def bounded() -> Any:
            return await asyncio.wait_for(work(), 60)

        return asyncio.run_coroutine_threadsafe(bounded(), self._loop).result(90)

    async def innocent(self) -> pb.CompleteResponse:
        answer: pb.CompleteResponse = await self.doors.stub.Complete(INNOCENT)
        answer.ClearField("request_id")
        for choice in answer.choices:
            choice.ClearField("request_id")
        return answer

    def answer_to(self, method: str, message: bytes) -> grpc.StatusCode:
        """What comes of it, beside the innocent call."""

        async def both() -> grpc.StatusCode:
            beside = asyncio.create_task(self.innocent())
            path = f"/tandem.v1.Inference/{method}"
            if method == "Generate":
                call = self.doors.channel.unary_stream(path)(message)
                with contextlib.suppress(grpc.aio.AioRpcError):
                    while await call.read() is not grpc.aio.EOF:
                        pass
            else:
                call = self.doors.channel.unary_unary(path)(message)
            code: grpc.StatusCode = await call.code()
            assert await beside == self.expected
            return code

        found: grpc.StatusCode = self.run(both)
        return found

    def close(self) -> None:
        self.run(self.doors.close)
        self.run(self._stack.aclose)
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(30)
        self._folder.cleanup()

    async def _open(self) -> BothDoors:
        house = House(Path(self._folder.name), self._model, self._stack)
        return await BothDoors.open(house, Script(per_output=50))


@pytest.fixture(scope="module")
def thread(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Thread]:
    thread = Thread(write_tool_model(tmp_path_factory.mktemp("model") / "tiny", "hermes"))
    yield thread
    thread.close()


def check(thread: Thread, method: str, message: bytes, caplog: pytest.LogCaptureFixture) -> None:
    caplog.clear()
    assert thread.answer_to(method, message) not in BAD
    assert [record for record in caplog.records if record.levelno >= logging.ERROR] == []


methods = st.sampled_from(sorted(METHODS))
reproducible = settings(
    max_examples=150,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
    derandomize=True,
)


@reproducible
@given(methods, st.binary(max_size=60))
def test_any_bytes(thread: Thread, caplog: pytest.LogCaptureFixture, method: str, message: bytes) -> None:
    check(thread, method, message, caplog)


@reproducible
@given(methods, st.integers(0, 2**32))
def test_valid_messages_with_some_bytes_changed(
    thread: Thread, caplog: pytest.LogCaptureFixture, method: str, seed: int
) -> None:
    rng = random.Random(seed)
    raw = bytearray(filled(METHODS[method].request(), rng).SerializeToString())
    for _ in range(rng.randrange(4)):
        if raw:
            where = rng.randrange(len(raw))
            match rng.randrange(3):
                case 0:
                    raw[where] = rng.randrange(256)
                case 1:
                    del raw[where]
                case _:
                    raw[where:where] = raw[: rng.randrange(len(raw))][-20:]
    check(thread, method, bytes(raw), caplog)


WORDS = [
    "",
    "a",
    "The river",
    "tiny",
    "user",
    "assistant",
    "get_weather",
    "{}",
    '{"type": "object"}',
    "[",
    "a+",
    "é\0<|im_end|>",
]
INTEGERS = [0, 1, 2, 3, 7, 20, 300, 511, 512, 2**31 - 1]


def filled(message: Message, rng: random.Random, depth: int = 0) -> Any:
    """With some of its fields set, to values that are often right."""
    for field in message.DESCRIPTOR.fields:
        likely = 0.9 if field.name in ("prompt", "chat", "role", "text", "input", "content") else 0.15
        if rng.random() > likely or depth > 4:
            continue
        for _ in range(rng.choice([1, 1, 2]) if field.is_repeated else 1):
            put(message, field, rng, depth)
    return message


def put(message: Message, field: FieldDescriptor, rng: random.Random, depth: int) -> None:
    inner, target = field.message_type, getattr(message, field.name)
    if inner is not None and inner.GetOptions().map_entry:
        target[rng.choice(INTEGERS)] = rng.choice([0.5, -100.0, 1e9, float("nan")])
    elif inner is not None:
        item = target.add() if field.is_repeated else target
        item.SetInParent()
        filled(item, rng, depth + 1)
    else:
        value = plain_value(field, rng)
        target.append(value) if field.is_repeated else setattr(message, field.name, value)


def plain_value(field: FieldDescriptor, rng: random.Random) -> Any:
    if field.enum_type is not None:
        return rng.choice([0, 1, 2, 3, 99, -1])
    match field.type:
        case FieldDescriptor.TYPE_STRING:
            return rng.choice(WORDS)
        case FieldDescriptor.TYPE_BOOL:
            return rng.random() < 0.5
        case FieldDescriptor.TYPE_DOUBLE | FieldDescriptor.TYPE_FLOAT:
            return rng.choice([0.0, 0.5, 1.0, -1.0, 5.0, 1e300, float("nan"), float("-inf")])
        case _:
            return rng.choice(INTEGERS)
