"""Named contexts as the router sees them: they live on a store node; recipes are remembered here for a moment."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Awaitable, Sequence
from dataclasses import dataclass
from typing import TypeVar

import grpc
import grpc.aio

from tandem.common.credentials import open_aio_channel
from tandem.common.errors import TandemError
from tandem.proto import kvnode_pb2, kvnode_pb2_grpc
from tandem.router.tenants.fair_cache import FairCache

CALL_S = 2.0
REMEMBERED_S = 2.0
"""Time for which another router's change may go unnoticed."""
MAX_REMEMBERED_TOKENS = 8 << 20
_OPTIONS = [
    ("grpc.initial_reconnect_backoff_ms", 100),
    ("grpc.min_reconnect_backoff_ms", round(1000 * CALL_S)),  # despite its name: how long connecting may take
    ("grpc.max_reconnect_backoff_ms", 1000),
]
_T = TypeVar("_T")


@dataclass(frozen=True, slots=True)
class _Remembered:
    context: kvnode_pb2.Context
    since: float


class ContextClient:
    """Asks the store node. Every call raises TandemError: `not_found` for a name its owner has not given, `unavailable`
    where the node is away or too slow. Made anywhere, used on one event loop."""

    def __init__(self, address: str, secret: bytes = b"") -> None:
        self._address = address
        self._secret = secret
        self._channel: grpc.aio.Channel | None = None
        self._stub: kvnode_pb2_grpc.KvNodeAsyncStub | None = None
        self._remembered: FairCache[str, _Remembered] = FairCache(MAX_REMEMBERED_TOKENS)
        """Contexts by owner and name."""
        self._changes = 0

    async def close(self) -> None:
        if self._channel is not None:
            await self._channel.close()

    async def put(
        self, owner: str, name: str, token_ids: Sequence[int], *, root: bytes, ttl_s: float, version: int
    ) -> kvnode_pb2.Context:
        """Stores a version of a named context on the store node. Raises TandemError `invalid_request`, `overloaded`, or
        `unavailable` where the node does not answer."""
        request = kvnode_pb2.PutContextRequest(
            owner=owner, name=name, version=version, token_ids=token_ids, root=root, ttl_s=ttl_s
        )
        try:
            return (await _answered(self._node().PutContext(request, timeout=CALL_S), name)).context
        finally:
            self._forget(owner, name)

    async def get(self, owner: str, name: str) -> kvnode_pb2.Context:
        """The context without its token ids. Raises TandemError."""
        request = kvnode_pb2.GetContextRequest(owner=owner, name=name)
        return (await _answered(self._node().GetContext(request, timeout=CALL_S), name)).context

    async def recipe(self, owner: str, name: str) -> kvnode_pb2.Context:
        """The context with its token ids; at most REMEMBERED_S old. Raises TandemError."""
        known = self._remembered.get(owner, name)
        if (
            known is not None
            and known.since + REMEMBERED_S > time.monotonic()
            and known.context.expires_at > time.time()
        ):
            return known.context
        request = kvnode_pb2.GetContextRequest(owner=owner, name=name, with_tokens=True)
        changes = self._changes
        context = (await _answered(self._node().GetContext(request, timeout=CALL_S), name)).context
        if changes == self._changes:
            self._remember(context)
        return context

    async def list(self, owner: str) -> list[kvnode_pb2.Context]:
        request = kvnode_pb2.ListContextsRequest(owner=owner)
        return list((await _answered(self._node().ListContexts(request, timeout=CALL_S))).contexts)

    async def drop(self, owner: str, name: str) -> None:
        """Removes a named context. Raises TandemError `not_found` where the owner has none of that name, `unavailable`
        where the node does not answer."""
        request = kvnode_pb2.DropContextRequest(owner=owner, name=name)
        try:
            if not (await _answered(self._node().DropContext(request, timeout=CALL_S), name)).dropped:
                raise unknown(name)
        finally:
            self._forget(owner, name)

    async def metrics(self, timeout_s: float) -> str | None:
        """The node's, as Prometheus text. None: no answer within `timeout_s`."""
        with contextlib.suppress(grpc.aio.AioRpcError):
            return (await self._node().GetMetrics(kvnode_pb2.GetMetricsRequest(), timeout=timeout_s)).text
        return None

    def _node(self) -> kvnode_pb2_grpc.KvNodeAsyncStub:
        """Connects in the background; a channel belongs to the loop on which it is made."""
        if self._stub is None:
            self._channel = open_aio_channel(self._address, self._secret, _OPTIONS)
            self._stub = kvnode_pb2_grpc.KvNodeStub(self._channel)
        return self._stub

    def _remember(self, context: kvnode_pb2.Context) -> None:
        remembered = _Remembered(context, time.monotonic())
        self._remembered.put(context.owner, context.name, remembered, context.num_tokens)

    def _forget(self, owner: str, name: str) -> None:
        """What is being asked for meanwhile is not remembered: it may be older than the change."""
        self._changes += 1
        self._remembered.pop(owner, name)


def unknown(name: str) -> TandemError:
    return TandemError("not_found", f"There is no context `{name[:64]}`.", param="context")


async def _answered(call: Awaitable[_T], name: str = "") -> _T:
    """Raises TandemError."""
    try:
        return await call
    except grpc.aio.AioRpcError as error:
        details = error.details() or ""
        match error.code():
            case grpc.StatusCode.NOT_FOUND:
                raise unknown(name) from error
            case grpc.StatusCode.INVALID_ARGUMENT:
                raise TandemError("invalid_request", details, param=details.partition(":")[0]) from error
            case grpc.StatusCode.FAILED_PRECONDITION:
                raise TandemError("invalid_request", details, param="version") from error
            case grpc.StatusCode.RESOURCE_EXHAUSTED:
                raise TandemError("overloaded", details, retry_after_s=10.0) from error
        raise TandemError(
            "unavailable",
            f"the store node that keeps named contexts does not answer ({error.code().name}); try again shortly",
            retry_after_s=1.0,
        ) from error
