"""What `router_http.py` sends requests to: kept HTTP connections, and a worker's gRPC session without a router."""

from __future__ import annotations

import asyncio
import itertools
import json
import re
import time
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass
from typing import Protocol, cast
from urllib.parse import urlsplit

import grpc.aio

from tandem.proto import worker_pb2, worker_pb2_grpc

_TEXT = re.compile(rb'"content": ?"[^"]')
"""The first event of a stream may have a role and no text."""
_LONGEST_BEGINNING = 12


@dataclass(frozen=True, slots=True)
class Ask:
    """One chat request, in the form that each kind of target takes."""

    system: str
    user: str
    token_ids: list[int]
    """Of both, without what a template adds."""
    output_tokens: int


@dataclass(frozen=True, slots=True)
class Times:
    """Seconds since the request was sent."""

    first: float
    last: float
    events: int = 1
    """Server-sent events in the answer. A router that falls behind puts several tokens into one."""


class Target(Protocol):
    async def request(self, ask: Ask, *, streaming: bool) -> Times:
        """Raises ConnectionError where the answer is not what it should be."""

    async def close(self) -> None: ...


class HttpTarget:
    """An OpenAI-compatible server. Connections are kept and used again, as clients' pools do."""

    def __init__(self, url: str) -> None:
        parts = urlsplit(url)
        self._host, self._port = parts.hostname or "127.0.0.1", parts.port or 80
        self._idle: list[_Connection] = []

    async def request(self, ask: Ask, *, streaming: bool) -> Times:
        raw = self._encode(ask, streaming)
        while self._idle:
            kept = self._idle.pop()
            try:
                return await self._exchange(kept, raw)
            except ConnectionResetError:
                continue  # closed by the server while nobody used it
        _, connection = await asyncio.get_running_loop().create_connection(_Connection, self._host, self._port)
        return await self._exchange(connection, raw)

    async def _exchange(self, connection: _Connection, raw: bytes) -> Times:
        times = await connection.exchange(raw)
        self._idle.append(connection)
        return times

    async def close(self) -> None:
        for connection in self._idle:
            connection.close()

    def _encode(self, ask: Ask, streaming: bool) -> bytes:
        body = json.dumps(
            {
                "model": "bench",
                "messages": [{"role": "system", "content": ask.system}, {"role": "user", "content": ask.user}],
                "max_tokens": ask.output_tokens,
                "temperature": 0,
                "stream": streaming,
            }
        ).encode()
        head = (
            f"POST /v1/chat/completions HTTP/1.1\r\nHost: {self._host}:{self._port}\r\n"
            f"Content-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n"
        )
        return head.encode() + body


class _Connection(asyncio.Protocol):
    """One answer at a time. General clients take more CPU per chunk than the servers under test."""

    def __init__(self) -> None:
        self._transport: asyncio.Transport | None = None
        self._answer = b""
        self._first = 0.0
        self._done: asyncio.Future[float] | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)  # uvloop's is none by class

    async def exchange(self, request: bytes) -> Times:
        """Raises ConnectionResetError where the connection closed before a byte of the answer."""
        if self._transport is None or self._transport.is_closing():
            raise ConnectionResetError("closed before the request")
        self._answer, self._first = b"", 0.0
        self._done = asyncio.get_running_loop().create_future()
        started = time.perf_counter()
        self._transport.write(request)
        ended = await asyncio.wait_for(self._done, 60)
        if b" 200 " not in self._answer[:16] or b'"length"' not in self._answer:
            raise ConnectionError(f"an unexpected answer: {self._answer[:500]!r}")
        if not self._first:
            raise ConnectionError(f"an answer without text: {self._answer[:500]!r}")
        return Times(self._first - started, ended - started, self._answer.count(b"data: {"))

    def data_received(self, data: bytes) -> None:
        before = len(self._answer)
        self._answer += data
        if not self._first and _TEXT.search(self._answer, max(0, before - _LONGEST_BEGINNING)):
            self._first = time.perf_counter()
        if self._done is not None and not self._done.done() and _complete(self._answer):
            self._done.set_result(time.perf_counter())

    def connection_lost(self, exc: Exception | None) -> None:
        self._transport = None
        if self._done is not None and not self._done.done():
            kind = ConnectionError if self._answer else ConnectionResetError
            self._done.set_exception(kind(f"closed after {self._answer[:500]!r}"))

    def close(self) -> None:
        if self._transport is not None:
            self._transport.close()


def _complete(answer: bytes) -> bool:
    if answer.endswith(b"\r\n0\r\n\r\n"):  # the last chunk
        return True
    head, separator, body = answer.partition(b"\r\n\r\n")
    _, named, length = head.lower().partition(b"content-length:")
    return bool(separator and named) and len(body) >= int(length.split(b"\r\n", 1)[0])


class GrpcTarget:
    """One worker as a router speaks to it: one gRPC stream, requests interleaved."""

    def __init__(self, target: str) -> None:
        self._channel = grpc.aio.insecure_channel(target)
        self._requests: asyncio.Queue[worker_pb2.SessionRequest] = asyncio.Queue()
        self._open: dict[str, _Open] = {}
        self._numbers = itertools.count()
        stub = worker_pb2_grpc.WorkerStub(self._channel)  # type: ignore[no-untyped-call]
        self._reader = asyncio.ensure_future(self._read(stub.Session(self._sent())))

    async def request(self, ask: Ask, *, streaming: bool) -> Times:
        request_id = f"direct-{next(self._numbers)}"
        opened = self._open[request_id] = _Open(asyncio.get_running_loop().create_future())
        submit = worker_pb2.Submit(
            key=worker_pb2.RequestKey(request_id=request_id, epoch=1),
            prompt_token_ids=ask.token_ids,
            sampling=worker_pb2.SamplingParams(max_tokens=ask.output_tokens),
        )
        started = time.perf_counter()
        self._requests.put_nowait(worker_pb2.SessionRequest(submit=submit))
        ended = await asyncio.wait_for(opened.done, 60)
        return Times(opened.first - started, ended - started)

    async def close(self) -> None:
        self._reader.cancel()
        await self._channel.close()

    async def _sent(self) -> AsyncIterator[worker_pb2.SessionRequest]:
        yield worker_pb2.SessionRequest(hello=worker_pb2.Hello(router_id="bench"))
        while True:
            yield await self._requests.get()

    async def _read(self, responses: AsyncIterator[worker_pb2.SessionResponse]) -> None:
        async for response in responses:
            for output in response.outputs:
                opened = self._open.get(output.key.request_id)
                if opened is None:
                    continue
                now = time.perf_counter()
                opened.first = opened.first or now
                if output.finish_reason:
                    del self._open[output.key.request_id]
                    opened.done.set_result(now)


@dataclass(slots=True)
class _Open:
    done: asyncio.Future[float]
    first: float = 0.0


class Spread:
    """Several targets in turn."""

    def __init__(self, targets: Sequence[Target]) -> None:
        self._targets = targets
        self._turn = itertools.cycle(targets)

    async def request(self, ask: Ask, *, streaming: bool) -> Times:
        return await next(self._turn).request(ask, streaming=streaming)

    async def close(self) -> None:
        for target in self._targets:
            await target.close()
