"""Who may order a store node about over gRPC: those who know the store's secret, where one is set.

The secret itself never travels: a digest of it does, with every call. As on the data plane, nothing is encrypted, so
TCP belongs inside a trusted network. Health checks need no secret, since probes have none.
"""

from __future__ import annotations

import hmac
from collections.abc import Awaitable, Callable
from typing import Any, NamedTuple

import grpc
import grpc.aio

_HEADER = "tandem-kv-proof"
_OPEN = "/grpc.health.v1.Health/"
_WRONG = "the store's secret is missing or another: give both sides the same kv_secret_file"


def _proof(secret: bytes) -> str:
    return hmac.digest(secret, b"tandem kv control v1", "sha256").hex()


class _Details(NamedTuple):
    """Of a call, as interceptors must pass it on."""

    method: Any
    timeout: float | None
    metadata: Any
    credentials: Any
    wait_for_ready: bool | None
    compression: Any = None


class RequireSecret(grpc.ServerInterceptor):
    """Refuses calls without the proof as UNAUTHENTICATED."""

    def __init__(self, secret: bytes) -> None:
        self._proof = _proof(secret)
        self._refusal: grpc.RpcMethodHandler[Any, Any] = grpc.unary_unary_rpc_method_handler(_refuse)

    def intercept_service(
        self,
        continuation: Callable[[grpc.HandlerCallDetails], grpc.RpcMethodHandler[Any, Any] | None],
        handler_call_details: grpc.HandlerCallDetails,
    ) -> grpc.RpcMethodHandler[Any, Any] | None:
        given = next((value for name, value in handler_call_details.invocation_metadata if name == _HEADER), "")
        if handler_call_details.method.startswith(_OPEN) or hmac.compare_digest(str(given), self._proof):
            return continuation(handler_call_details)
        return self._refusal


def _refuse(request: Any, context: grpc.ServicerContext) -> Any:
    context.abort(grpc.StatusCode.UNAUTHENTICATED, _WRONG)


class _SendProof(grpc.UnaryUnaryClientInterceptor, grpc.UnaryStreamClientInterceptor):
    def __init__(self, secret: bytes) -> None:
        self._entry = (_HEADER, _proof(secret))

    def intercept_unary_unary(self, continuation: Any, client_call_details: Any, request: Any) -> Any:
        return continuation(_with(client_call_details, self._entry), request)

    def intercept_unary_stream(self, continuation: Any, client_call_details: Any, request: Any) -> Any:
        return continuation(_with(client_call_details, self._entry), request)


class _SendProofAio(grpc.aio.UnaryUnaryClientInterceptor):
    def __init__(self, secret: bytes) -> None:
        self._entry = (_HEADER, _proof(secret))

    async def intercept_unary_unary(
        self, continuation: Callable[[Any, Any], Awaitable[Any]], client_call_details: Any, request: Any
    ) -> Any:
        details = client_call_details
        metadata = grpc.aio.Metadata(*(details.metadata or ()), self._entry)
        return await continuation(details._replace(metadata=metadata), request)


def channel(address: str, secret: bytes, options: list[tuple[str, Any]] | None = None) -> grpc.Channel:
    """To a store node; `secret` empty: without a proof."""
    plain = grpc.insecure_channel(address, options=options)
    return grpc.intercept_channel(plain, _SendProof(secret)) if secret else plain


def aio_channel(address: str, secret: bytes, options: list[tuple[str, Any]]) -> grpc.aio.Channel:
    """For unary calls on an event loop."""
    return grpc.aio.insecure_channel(address, options=options, interceptors=[_SendProofAio(secret)] if secret else None)


def _with(details: Any, entry: tuple[str, str]) -> _Details:
    return _Details(
        details.method,
        details.timeout,
        [*(details.metadata or ()), entry],
        details.credentials,
        details.wait_for_ready,
        details.compression,
    )
