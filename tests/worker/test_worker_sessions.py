"""A router's session with a worker: one message per step, nothing survives it, and nothing a router sends breaks it."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import grpc
import grpc.aio
import pytest

from tandem.common.errors import TandemError
from tandem.common.sampling import SamplingParams
from tandem.engine.request import EngineRequest, FinishReason, PromptReport, RequestKey, RequestOutput
from tandem.engine.schedule.cache_events import CacheLog
from tandem.engine.status import EngineStatus
from tandem.proto import worker_pb2, worker_pb2_grpc
from tandem.worker import session as worker_session
from tandem.worker.server import WorkerServer
from tandem.worker.session import OutputBridge


class FakeEngine:
    """Requests run until the test ends them; a cancel is answered like the engine's."""

    def __init__(self, bridge: OutputBridge) -> None:
        self.bridge = bridge
        self.requests: dict[RequestKey, EngineRequest] = {}
        self.cancelled: list[RequestKey] = []
        self.refusal: TandemError | None = None
        self.cache_log = CacheLog()

    def submit(self, request: EngineRequest) -> None:
        if self.refusal is not None:
            raise self.refusal
        self.requests[request.key] = request

    def cancel(self, key: RequestKey) -> None:
        if self.requests.pop(key, None) is not None:
            self.cancelled.append(key)
            self.emit(RequestOutput(key, finish_reason=FinishReason.CANCELLED))

    def emit(self, *outputs: RequestOutput) -> None:
        thread = threading.Thread(target=self.bridge.put, args=(list(outputs),))
        thread.start()
        thread.join()

    def status(self) -> EngineStatus:
        return EngineStatus(len(self.requests), 0, 10, 10, 0, 0.0, 0.0, decoding=0, running_tokens=0)


class NoHandover:
    def __init__(self) -> None:
        self.ends: list[RequestKey] = []
        self.losses: list[tuple[RequestKey, str]] = []

    def attach(self, request: EngineRequest, submit: worker_pb2.Submit) -> None:
        if submit.WhichOneof("handover") == "send_kv_to":
            raise TandemError("invalid_request", "not here")

    def ended(self, key: RequestKey) -> None:
        self.ends.append(key)

    def peer_lost(self, key: RequestKey, reason: str) -> None:
        self.losses.append((key, reason))


class Worker:
    """A served WorkerServer and a stub for it."""

    async def start(self, folder: Path) -> None:
        bridge = OutputBridge(asyncio.get_running_loop())
        self.engine, self.handover = FakeEngine(bridge), NoHandover()
        info = worker_pb2.WorkerInfo(worker_id="w0", role=worker_pb2.ROLE_DECODE)
        self.service = WorkerServer(self.engine, self.handover, info)
        bridge.deliver = self.service.deliver
        self.server = grpc.aio.server()
        worker_pb2_grpc.add_WorkerServicer_to_server(self.service, self.server)
        address = f"unix:{folder}/w.sock"
        self.server.add_insecure_port(address)
        await self.server.start()
        self.channel = grpc.aio.insecure_channel(address)
        self.stub: Any = worker_pb2_grpc.WorkerStub(self.channel)

    async def stop(self) -> None:
        await self.channel.close()
        await self.service.close()
        await self.server.stop(grace=None)

    async def session(self) -> Session:
        session = Session(self.stub.Session())
        await session.send(hello=worker_pb2.Hello(router_id="test"))
        return session


class Session:
    def __init__(self, call: Any) -> None:
        self.call = call

    async def send(self, **kind: Any) -> None:
        await self.call.write(worker_pb2.SessionRequest(**kind))

    async def submit(self, name: str, **fields: Any) -> RequestKey:
        key = worker_pb2.RequestKey(request_id=name, epoch=1)
        sampling = fields.pop("sampling", SamplingParams().to_proto())
        await self.send(submit=worker_pb2.Submit(key=key, prompt_token_ids=[1, 2], sampling=sampling, **fields))
        return RequestKey(name, 1)

    async def outputs(self) -> list[Any]:
        """Those of the next message that has any."""
        async with asyncio.timeout(30):
            while not (response := await self.call.read()).outputs:
                pass
        return list(response.outputs)

    async def error(self) -> Any:
        (output,) = await self.outputs()
        assert output.finish_reason == worker_pb2.FINISH_REASON_ERROR
        return output.error


@pytest.fixture
async def worker(tmp_path: Path) -> AsyncIterator[Worker]:
    worker = Worker()
    await worker.start(tmp_path)
    yield worker
    await worker.stop()


async def until(condition: Any) -> None:
    async with asyncio.timeout(30):
        while True:
            if condition():
                return
            await asyncio.sleep(0.005)


async def read_to_the_end(session: Session) -> None:
    while await session.call.read() is not grpc.aio.EOF:
        pass


async def test_the_outputs_of_a_step_travel_in_one_message(worker: Worker) -> None:
    session = await worker.session()
    keys = [await session.submit(f"r{i}") for i in range(8)]
    await until(lambda: len(worker.engine.requests) == 8)
    worker.engine.emit(*(RequestOutput(key, 0, [index], prompt=PromptReport()) for index, key in enumerate(keys)))
    outputs = await session.outputs()
    assert [list(output.token_ids) for output in outputs] == [[index] for index in range(8)]
    assert {output.prompt.computed_by for output in outputs} == {"w0"}


async def test_each_router_gets_its_own_outputs(worker: Worker) -> None:
    sessions = [await worker.session(), await worker.session()]
    keys = [await session.submit(f"r{i}") for i, session in enumerate(sessions)]
    await until(lambda: len(worker.engine.requests) == 2)
    worker.engine.emit(*(RequestOutput(key, 0, [5]) for key in keys))
    for key, session in zip(keys, sessions, strict=True):
        (output,) = await session.outputs()
        assert output.key.request_id == key.request_id


@pytest.mark.parametrize("ending", ["cancel", "done_writing"])
async def test_the_end_of_a_session_cancels_what_came_through_it(worker: Worker, ending: str) -> None:
    gone, stays = await worker.session(), await worker.session()
    keys = {await gone.submit("a"), await gone.submit("b")}
    await stays.submit("c")
    await until(lambda: len(worker.engine.requests) == 3)
    if ending == "cancel":
        gone.call.cancel()
    else:
        await gone.call.done_writing()
    await until(lambda: set(worker.engine.cancelled) == keys)
    assert worker.engine.requests.keys() == {RequestKey("c", 1)}


async def test_a_cancel_reaches_only_one_s_own_requests(worker: Worker) -> None:
    mine, other = await worker.session(), await worker.session()
    key = await mine.submit("a")
    await until(lambda: worker.engine.requests)
    message = worker_pb2.Cancel(key=worker_pb2.RequestKey(request_id="a", epoch=1))
    await other.send(cancel=message)
    await other.send(submit=worker_pb2.Submit())  # answered with an error, so the cancel before it was read
    await other.error()
    assert not worker.engine.cancelled
    await mine.send(cancel=message)
    (output,) = await mine.outputs()
    assert output.finish_reason == worker_pb2.FINISH_REASON_CANCELLED
    assert worker.engine.cancelled == [key]
    assert worker.handover.ends == [key]


async def test_bad_messages_are_answered_and_leave_the_session_alone(worker: Worker) -> None:
    session = await worker.session()
    await session.send()
    await session.send(submit=worker_pb2.Submit())
    assert (await session.error()).code == "invalid_request"
    for bad in ({"temperature": -1.0}, {"top_p": 0.0}, {"temperature": float("nan")}, {"repetition_penalty": 0.0}):
        await session.submit("bad", sampling=SamplingParams(**bad).to_proto())  # type: ignore[arg-type]
        assert next(iter(bad)) in (await session.error()).message
    await session.submit("bad", timeout_s=float("inf"))
    assert "timeout_s" in (await session.error()).message
    await session.submit("bad", send_kv_to=worker_pb2.KvEndpoint())
    assert (await session.error()).message == "not here"
    await session.submit("good")
    await until(lambda: worker.engine.requests)


async def test_a_key_in_use_is_refused_and_the_first_request_goes_on(worker: Worker) -> None:
    first, second = await worker.session(), await worker.session()
    key = await first.submit("a")
    await until(lambda: worker.engine.requests)
    await second.submit("a")
    assert "running already" in (await second.error()).message
    worker.engine.emit(RequestOutput(key, 0, [4]))
    assert list((await first.outputs())[0].token_ids) == [4]


async def test_what_the_engine_refuses_is_told_with_its_code(worker: Worker) -> None:
    worker.engine.refusal = TandemError("overloaded", "the queue is full")
    session = await worker.session()
    key = await session.submit("a")
    error = await session.error()
    assert (error.code, error.retriable) == ("overloaded", True)
    assert worker.handover.ends == [key]


async def test_a_lost_prefill_worker_is_passed_on_for_known_requests_only(worker: Worker) -> None:
    session = await worker.session()
    key = await session.submit("a")
    for name in ("b", "a"):
        proto = worker_pb2.RequestKey(request_id=name, epoch=1)
        await session.send(handover_lost=worker_pb2.HandoverLost(key=proto, reason="dead"))
    await until(lambda: worker.handover.losses)
    assert worker.handover.losses == [(key, "dead")]


async def test_status_comes_at_once_on_change_and_every_second(worker: Worker) -> None:
    session = await worker.session()
    loop = asyncio.get_running_loop()
    async with asyncio.timeout(30):
        assert (await session.call.read()).status.total_blocks == 10
        await session.submit("a")
        while (await session.call.read()).status.running != 1:
            pass
        since = loop.time()
        await session.call.read()
    assert loop.time() - since < 1.5


async def test_draining_refuses_waits_and_then_aborts(worker: Worker) -> None:
    session = await worker.session()
    quick, slow = await session.submit("quick"), await session.submit("slow")
    await until(lambda: len(worker.engine.requests) == 2)
    drain = asyncio.create_task(worker.service.drain(0.5))
    await until(lambda: worker.service.status().draining)
    await session.submit("late")
    error = await session.error()
    assert (error.code, error.retriable) == ("unavailable", True)
    worker.engine.requests.pop(quick)
    worker.engine.emit(RequestOutput(quick, 0, [1], finish_reason=FinishReason.STOP))
    assert (await session.outputs())[0].finish_reason == worker_pb2.FINISH_REASON_STOP
    aborted = await session.error()
    assert (aborted.code, aborted.retriable) == ("unavailable", True)
    assert await drain == (1, 1)
    assert worker.engine.cancelled == [slow]


async def test_a_router_that_does_not_read_loses_its_session(worker: Worker, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(worker_session, "MAX_UNSENT_ENTRIES", 50_000)
    session = await worker.session()
    key = await session.submit("a")
    await until(lambda: worker.engine.requests)
    index = 0
    async with asyncio.timeout(30):
        while not worker.engine.cancelled:
            worker.engine.emit(RequestOutput(key, index, [1_000_000] * 20_000))
            index += 20_000
            await asyncio.sleep(0)
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await read_to_the_end(session)
    assert caught.value.code() == grpc.StatusCode.RESOURCE_EXHAUSTED
