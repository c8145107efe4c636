"""A cheap streaming client for OpenAI-compatible servers: one raw socket per request, timestamps per chunk.

General HTTP clients spend more CPU per chunk than the servers under test; on a small machine that would be measured
instead of the server.
"""

from __future__ import annotations

import asyncio
import json
import time
from dataclasses import dataclass, field
from urllib.parse import urlsplit


@dataclass(slots=True)
class Result:
    """One request as the client saw it. Times in seconds since it was sent."""

    first: float = 0.0
    last: float = 0.0
    tokens: int = 0
    gaps: list[float] = field(default_factory=list)
    error: str = ""
    text: str = ""

    @property
    def tpot(self) -> float:
        """Mean time per output token after the first."""
        return (self.last - self.first) / max(1, self.tokens - 1)


async def stream(base_url: str, body: dict[str, object], *, keep_text: bool = False, api_key: str = "") -> Result:
    """POSTs to /v1/completions with stream=true and reads the events. Never raises: the error is in the result."""
    result = Result()
    try:
        await asyncio.wait_for(_stream(base_url, body, result, keep_text, api_key), 300)
    except (OSError, TimeoutError, ValueError, asyncio.IncompleteReadError) as error:
        result.error = f"{type(error).__name__}: {error}"[:200]
    return result


async def _stream(base_url: str, body: dict[str, object], result: Result, keep_text: bool, api_key: str) -> None:
    url = urlsplit(base_url)
    raw = json.dumps({**body, "stream": True, "stream_options": {"include_usage": True}}).encode()
    authorization = f"Authorization: Bearer {api_key}\r\n" if api_key else ""
    head = (
        f"POST /v1/completions HTTP/1.1\r\nHost: {url.netloc}\r\nContent-Type: application/json\r\n"
        f"Content-Length: {len(raw)}\r\nConnection: close\r\n{authorization}\r\n"
    )
    reader, writer = await asyncio.open_connection(url.hostname, url.port, limit=1 << 20)
    try:
        start = time.perf_counter()
        writer.write(head.encode() + raw)
        status = await reader.readline()
        if b" 200" not in status:
            raise ValueError(f"{status.decode().strip()} {(await reader.read(500))[-300:]!r}")
        while (line := await reader.readline()) not in (b"", b"data: [DONE]\r\n", b"data: [DONE]\n"):
            if not line.startswith(b"data: "):
                continue
            now = time.perf_counter() - start
            if b'"error"' in line:
                raise ValueError(line[:300].decode())
            if b'"completion_tokens"' in line:  # some servers send usage with the last text, some after it
                event = json.loads(line[6:])
                result.tokens = event["usage"]["completion_tokens"]
                if not event["choices"]:
                    continue
            if result.first == 0.0:
                result.first = now
            else:
                result.gaps.append(now - result.last)
            result.last = now
            if keep_text:
                result.text += json.loads(line[6:])["choices"][0]["text"]
    finally:
        writer.close()


async def closed_loop(base_url: str, bodies: list[dict[str, object]], concurrency: int) -> tuple[list[Result], float]:
    """Keeps `concurrency` requests in flight until all are done; returns results and wall seconds."""
    gate = asyncio.Semaphore(concurrency)

    async def one(body: dict[str, object]) -> Result:
        async with gate:
            return await stream(base_url, body)

    start = time.perf_counter()
    results = await asyncio.gather(*(one(body) for body in bodies))
    return list(results), time.perf_counter() - start


async def open_loop(base_url: str, bodies: list[dict[str, object]], at: list[float]) -> tuple[list[Result], float]:
    """Sends each request at its time (seconds from now), whatever is still running."""

    async def one(body: dict[str, object], when: float) -> Result:
        await asyncio.sleep(when)
        return await stream(base_url, body)

    start = time.perf_counter()
    results = await asyncio.gather(*(one(body, when) for body, when in zip(bodies, at, strict=True)))
    return list(results), time.perf_counter() - start
