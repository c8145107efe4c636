"""The fake workers behind the routers of `router_http.py`: the same script in gRPC (ours) and in HTTP (peers').

    python bench/router_workers.py FOLDER PORT PORT

Each answers with its tokens one by one, `DELAY_S` apart, whatever it was asked.
"""

from __future__ import annotations

import asyncio
import json
import sys
from pathlib import Path
from typing import cast

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT)]

from tandem.proto import worker_pb2  # noqa: E402
from tests.router.fake_worker import FakeWorker, Script  # noqa: E402

DELAY_S = 0.002
"""Before each token: a decode step. Without it all tokens would come in one message."""


class GrpcWorker(FakeWorker):
    """As large and as fast as a worker on a current GPU, so that the router does not hold requests back."""

    def info(self) -> worker_pb2.WorkerInfo:
        info = super().info()
        info.num_blocks, info.max_num_seqs = 60_000, 256
        info.hardware_class, info.num_parameters, info.weight_bytes = "nvidia-h100", 8 * 10**9, 16 * 10**9
        info.kv_bytes_per_token = 131_072
        return info


def sockets(folder: Path, count: int) -> list[Path]:
    return [folder / f"worker-{index}.sock" for index in range(count)]


class HttpWorker(asyncio.Protocol):
    """Just enough HTTP: one request at a time per connection, whole or as events."""

    def __init__(self) -> None:
        self._transport: asyncio.Transport | None = None
        self._received = b""
        self._task: asyncio.Task[None] | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)  # uvloop's is none by class

    def connection_lost(self, exc: Exception | None) -> None:
        if self._task is not None:
            self._task.cancel()

    def data_received(self, data: bytes) -> None:
        self._received += data
        head, separator, body = self._received.partition(b"\r\n\r\n")
        _, named, length = head.lower().partition(b"content-length:")
        if not separator or len(body) < (int(length.split(b"\r\n", 1)[0]) if named else 0):
            return
        self._received = b""
        self._task = asyncio.ensure_future(self._answer(head, body))

    async def _answer(self, head: bytes, body: bytes) -> None:
        if head.startswith(b"GET "):
            model = {"id": "bench", "object": "model", "owned_by": "bench"}
            self._whole({"status": "ok", "model_path": "bench", "object": "list", "data": [model]})
            return
        asked = json.loads(body)
        tokens = asked.get("max_completion_tokens") or asked["max_tokens"]  # sglang-router renames it
        if not asked.get("stream"):
            await asyncio.sleep(DELAY_S * tokens)
            message = {"role": "assistant", "content": " token" * tokens}
            usage = {"prompt_tokens": 400, "completion_tokens": tokens, "total_tokens": 400 + tokens}
            choice = {"index": 0, "message": message, "finish_reason": "length"}
            self._whole({"id": "bench", "object": "chat.completion", "choices": [choice], "usage": usage})
            return
        opening = b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\ntransfer-encoding: chunked\r\n\r\n"
        for index in range(tokens):
            await asyncio.sleep(DELAY_S)
            last = index == tokens - 1
            choice = {"index": 0, "delta": {"content": " token"}, "finish_reason": "length" if last else None}
            value = {"id": "bench", "object": "chat.completion.chunk", "model": "bench", "choices": [choice]}
            event = b"data: " + json.dumps(value).encode() + b"\n\n" + (b"data: [DONE]\n\n" if last else b"")
            self._send(opening + b"%x\r\n%b\r\n" % (len(event), event) + (b"0\r\n\r\n" if last else b""))
            opening = b""

    def _whole(self, value: object) -> None:
        body = json.dumps(value).encode()
        head = b"HTTP/1.1 200 OK\r\ncontent-type: application/json\r\ncontent-length: %d\r\n\r\n"
        self._send(head % len(body) + body)

    def _send(self, data: bytes) -> None:
        assert self._transport is not None
        self._transport.write(data)


async def serve(folder: Path, ports: list[int]) -> None:
    for socket in sockets(folder, len(ports)):
        script = Script(delay_s=DELAY_S)
        await GrpcWorker(worker_pb2.ROLE_DECODE, socket, script, max_model_len=2048, vocab_size=4096).start()
    for port in ports:
        await asyncio.get_running_loop().create_server(HttpWorker, "127.0.0.1", port)
    print("ready", flush=True)
    await asyncio.Event().wait()


if __name__ == "__main__":
    import uvloop

    uvloop.run(serve(Path(sys.argv[1]), [int(port) for port in sys.argv[2:]]))
