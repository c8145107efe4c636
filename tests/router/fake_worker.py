"""A worker that follows a script instead of a model: same gRPC service, no engine.

What it generates is a function of the request (`Script.tokens`), so a test knows every token in advance. It records
everything it is told.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, field
from pathlib import Path

import grpc
import grpc.aio
import numpy as np

from tandem.common.credentials import SERVER_OPTIONS
from tandem.proto import worker_pb2, worker_pb2_grpc

NAMESPACE = b"n" * 32
COMPATIBILITY = b"c" * 32


def counting_tokens(submit: worker_pb2.Submit) -> list[int]:
    """The prompt's tokens over and over: text like the prompt's."""
    prompt = list(submit.prompt_token_ids)
    return [prompt[i % len(prompt)] for i in range(submit.sampling.max_tokens)]


@dataclass
class Script:
    tokens: Callable[[worker_pb2.Submit], list[int]] = counting_tokens
    per_output: int = 1
    """Tokens in one output."""
    delay_s: float = 0.0
    """Before every output."""
    stop_token_id: int | None = None
    """Ends the output as this token when it is reached."""
    error: tuple[str, str] | None = None
    """Answers every request with this code and message."""
    error_after: int = 0
    """Tokens that come before the error."""
    mute: bool = False
    """Accepts requests and never answers."""
    handover: str = "ok"
    """Prefill worker: `ok`, `error`, `never`."""
    hold_after: int | None = None
    """Sends this many tokens, then nothing until `resume` is set."""
    preempted_before: dict[int, worker_pb2.Preemption.ValueType] = field(default_factory=dict)
    """Preemptions by index of the token before which the request loses its place for a while."""
    cached_tokens: int = 0
    near_tokens: int = 0
    """The last ones of `cached_tokens`."""
    wait_for_kv: bool = True
    """Decode worker: wait for the fake prefill worker's KV or `HandoverLost`."""
    embedding: Callable[[worker_pb2.Submit], list[float]] = lambda submit: [3.0, 4.0 * submit.pooling]
    """The answer where pooling is asked for."""


@dataclass
class FakeWorker:
    role: worker_pb2.Role.ValueType
    socket: Path
    script: Script = field(default_factory=Script)
    epoch: int = 1
    worker_id: str = ""
    namespace: bytes = NAMESPACE
    fingerprint: bytes = b""
    max_model_len: int = 512
    vocab_size: int = 512
    submits: list[worker_pb2.Submit] = field(default_factory=list)
    cancels: list[worker_pb2.RequestKey] = field(default_factory=list)
    handovers_lost: list[worker_pb2.HandoverLost] = field(default_factory=list)
    status: worker_pb2.WorkerStatus = field(default_factory=worker_pb2.WorkerStatus)
    peers: dict[str, FakeWorker] = field(default_factory=dict)
    """Decode workers by id: where a prefill worker's KV goes."""
    resume: asyncio.Event = field(default_factory=asyncio.Event)
    sent: int = 0
    """Outputs written to routers, of all requests."""

    def __post_init__(self) -> None:
        self.worker_id = self.worker_id or self.socket.stem
        self._kv: dict[tuple[str, int], asyncio.Event] = {}
        self._server: grpc.aio.Server | None = None
        self._thawed = asyncio.Event()
        self._thawed.set()

    @property
    def target(self) -> str:
        return f"unix:{self.socket}"

    @property
    def cancelled_ids(self) -> set[str]:
        return {key.request_id for key in self.cancels}

    async def start(self) -> FakeWorker:
        self._server = grpc.aio.server(options=SERVER_OPTIONS)
        worker_pb2_grpc.add_WorkerServicer_to_server(_Servicer(self), self._server)
        self._server.add_insecure_port(self.target)
        await self._server.start()
        return self

    async def start_on_tcp(self) -> int:
        """Listens on 127.0.0.1 instead. Returns the port."""
        self._server = grpc.aio.server(options=SERVER_OPTIONS)
        worker_pb2_grpc.add_WorkerServicer_to_server(_Servicer(self), self._server)
        port = self._server.add_insecure_port("127.0.0.1:0")
        await self._server.start()
        return port

    async def kill(self) -> None:
        """As kill -9: connections break without a word."""
        if self._server is not None:
            server, self._server = self._server, None
            await server.stop(None)

    async def restart(self) -> None:
        await self.kill()
        self.epoch += 1
        self._kv.clear()
        await self.start()

    def freeze(self) -> None:
        """As kill -STOP: connections stay open and nothing comes."""
        self._thawed.clear()

    async def thawed(self) -> None:
        await self._thawed.wait()

    def kv_event(self, key: worker_pb2.RequestKey) -> asyncio.Event:
        return self._kv.setdefault((key.request_id, key.epoch), asyncio.Event())

    def info(self) -> worker_pb2.WorkerInfo:
        return worker_pb2.WorkerInfo(
            worker_id=self.worker_id,
            worker_epoch=self.epoch,
            role=self.role,
            model="fake",
            namespace=self.namespace,
            fingerprint=self.fingerprint,
            compatibility=COMPATIBILITY,
            block_size=16,
            num_blocks=1000,
            max_model_len=self.max_model_len,
            max_num_seqs=64,
            vocab_size=self.vocab_size,
            kv_endpoint=worker_pb2.KvEndpoint(worker_id=self.worker_id, worker_epoch=self.epoch),
        )

    async def outputs(self, submit: worker_pb2.Submit) -> AsyncIterator[worker_pb2.RequestOutput]:
        script, key = self.script, submit.key
        if script.mute:
            return
        if script.error is not None and not script.error_after:
            yield failure(key, *script.error)
            return
        if submit.pooling:
            output = worker_pb2.RequestOutput(key=key, finish_reason=worker_pb2.FINISH_REASON_STOP)
            output.embedding = np.asarray(script.embedding(submit), "<f4").tobytes()
            output.prompt.SetInParent()
            yield output
            return
        if submit.HasField("send_kv_to"):
            async for output in self._prefill(submit):
                yield output
            return
        if submit.HasField("expect_kv") and script.wait_for_kv:
            await self.kv_event(key).wait()
        async for output in self._decode(submit):
            yield output

    async def _prefill(self, submit: worker_pb2.Submit) -> AsyncIterator[worker_pb2.RequestOutput]:
        await asyncio.sleep(self.script.delay_s)
        if self.script.handover == "never":
            return
        if self.script.handover == "error":
            code, message = self.script.error or ("internal", "out of luck")
            error = worker_pb2.WorkerError(code=code, message=message)
            yield worker_pb2.RequestOutput(key=submit.key, finish_reason=worker_pb2.FINISH_REASON_ERROR, error=error)
            return
        self.peers[submit.send_kv_to.worker_id].kv_event(submit.key).set()
        yield worker_pb2.RequestOutput(key=submit.key, finish_reason=worker_pb2.FINISH_REASON_HANDED_OVER)

    async def _decode(self, submit: worker_pb2.Submit) -> AsyncIterator[worker_pb2.RequestOutput]:
        script, sampling = self.script, submit.sampling
        tokens = script.tokens(submit)
        limit = min(len(tokens), sampling.max_tokens)
        position = first = len(submit.output_token_ids)
        assert list(submit.output_token_ids) == tokens[:first], "what another worker has said would be said here, too"
        while True:
            if script.error is not None and position >= script.error_after:
                yield failure(submit.key, *script.error)
                return
            if script.hold_after is not None and position >= script.hold_after:
                await self.resume.wait()
            if script.delay_s:
                await asyncio.sleep(script.delay_s)
            if (reason := script.preempted_before.get(position)) is not None:
                yield worker_pb2.RequestOutput(key=submit.key, start_index=position, preempted=reason)
            new = tokens[position : min(position + script.per_output, limit)]
            output = worker_pb2.RequestOutput(key=submit.key, start_index=position, token_ids=new)
            if position == first:
                output.prompt.cached_tokens = script.cached_tokens
                if script.cached_tokens:
                    output.prompt.cached_by_tier["device"] = script.cached_tokens
                if script.near_tokens:
                    output.prompt.near_tokens = script.near_tokens
                    output.prompt.inexact_from = script.cached_tokens - script.near_tokens
                if sampling.HasField("prompt_logprobs"):
                    output.prompt_logprobs.append(worker_pb2.TokenLogprobs())
                    output.prompt_logprobs.extend(
                        fake_logprobs(token, sampling.prompt_logprobs) for token in submit.prompt_token_ids[1:]
                    )
            if sampling.HasField("logprobs"):
                output.logprobs.extend(fake_logprobs(token, sampling.logprobs) for token in new)
            position += len(new)
            if script.stop_token_id in new:
                output.finish_reason = worker_pb2.FINISH_REASON_STOP
                output.stop_token_id = script.stop_token_id or 0
                yield output
                return
            if position >= limit:
                output.finish_reason = worker_pb2.FINISH_REASON_LENGTH
                yield output
                return
            yield output


def failure(key: worker_pb2.RequestKey, code: str, message: str) -> worker_pb2.RequestOutput:
    error = worker_pb2.WorkerError(code=code, message=message, retriable=True)
    return worker_pb2.RequestOutput(key=key, finish_reason=worker_pb2.FINISH_REASON_ERROR, error=error)


def fake_logprobs(token: int, alternatives: int) -> worker_pb2.TokenLogprobs:
    """The chosen token is the most likely one, the next ids follow."""
    top_ids = [(token + i) % 512 for i in range(alternatives)]
    return worker_pb2.TokenLogprobs(
        logprob=-0.5, rank=1, top_ids=top_ids, top_logprobs=[-0.5 - i for i in range(alternatives)]
    )


class _Servicer(worker_pb2_grpc.WorkerServicer):
    def __init__(self, worker: FakeWorker) -> None:
        self._worker = worker

    async def GetInfo(self, request, context):  # type: ignore[no-untyped-def]
        return self._worker.info()

    async def GetMetrics(self, request, context):  # type: ignore[no-untyped-def]
        await self._worker.thawed()
        text = (
            "# HELP tandem_worker_generated_tokens_total Tokens\n# TYPE tandem_worker_generated_tokens_total counter\n"
        )
        return worker_pb2.MetricsText(text=f"{text}tandem_worker_generated_tokens_total {self._worker.sent}.0\n")

    async def Session(self, request_iterator, context):  # type: ignore[no-untyped-def]
        worker = self._worker
        outbox: asyncio.Queue[worker_pb2.SessionResponse] = asyncio.Queue(maxsize=10000)
        tasks: dict[str, asyncio.Task[None]] = {}

        async def generate(submit: worker_pb2.Submit) -> None:
            async for output in worker.outputs(submit):
                await outbox.put(worker_pb2.SessionResponse(outputs=[output]))

        async def read() -> None:
            async for message in request_iterator:
                match message.WhichOneof("kind"):
                    case "submit":
                        worker.submits.append(message.submit)
                        tasks[message.submit.key.request_id] = asyncio.create_task(generate(message.submit))
                    case "cancel":
                        worker.cancels.append(message.cancel.key)
                        if message.cancel.key.request_id in tasks:
                            tasks[message.cancel.key.request_id].cancel()
                    case "handover_lost":
                        worker.handovers_lost.append(message.handover_lost)
                        worker.kv_event(message.handover_lost.key).set()

        async def tell_status() -> None:
            while True:
                await outbox.put(worker_pb2.SessionResponse(status=worker.status))
                await asyncio.sleep(0.1)

        helpers = [asyncio.create_task(read()), asyncio.create_task(tell_status())]
        try:
            while True:
                response = await outbox.get()
                await worker.thawed()
                while not outbox.empty():
                    response.MergeFrom(outbox.get_nowait())
                await context.write(response)
                worker.sent += len(response.outputs)
        finally:
            for task in [*helpers, *tasks.values()]:
                task.cancel()
