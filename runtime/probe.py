"""Whether a child answers: a router over HTTP, a worker and a store node over gRPC, all through unix sockets in the run
folder, so that each child is asked itself."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from pathlib import Path

Probe = Callable[[], Awaitable[bool]]
"""Raises OSError, TimeoutError, or answers False where the child does not say that it is well."""


def http_probe(path: Path) -> Probe:
    """A probe of the process that answers HTTP on the unix socket `path`: whether /healthz says 200."""

    async def probe() -> bool:
        return (await http_get(path, "/healthz"))[0] == 200

    return probe


async def http_get(path: Path, target: str) -> tuple[int, bytes]:
    """Status and body. Raises OSError, ValueError."""
    reader, writer = await asyncio.open_unix_connection(path)
    try:
        writer.write(f"GET {target} HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n".encode())
        head, _, body = (await reader.read()).partition(b"\r\n\r\n")
    finally:
        writer.close()
    return int((head.split()[1:2] or [b"0"])[0]), body


def grpc_probe(address: str, secret: bytes, timeout_s: float) -> Probe:
    """Whether the health service at `address` says SERVING."""

    async def probe() -> bool:
        """Whether the standard health service says SERVING within `timeout_s`."""
        import grpc.aio
        from grpc_health.v1 import health_pb2, health_pb2_grpc

        from tandem.common.credentials import open_aio_channel

        async with open_aio_channel(address, secret) as channel:
            check = health_pb2_grpc.HealthStub(channel).Check
            try:
                answer = await check(health_pb2.HealthCheckRequest(), timeout=timeout_s, wait_for_ready=True)
            except grpc.aio.AioRpcError:
                return False
            return bool(answer.status == health_pb2.HealthCheckResponse.SERVING)

    return probe
