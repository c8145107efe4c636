"""The HTTP front door: routes, authentication, and one place where errors become answers."""

from __future__ import annotations

import logging
from collections.abc import Awaitable, Callable
from typing import TYPE_CHECKING

from tandem.common.errors import TandemError
from tandem.router import http_contexts, http_explain, http_info
from tandem.router.api_keys import ApiKeys
from tandem.router.http_chat import chat_completions
from tandem.router.http_completions import completions
from tandem.router.http_exchange import ClientGone, Exchange, Headers
from tandem.router.service import Service

if TYPE_CHECKING:  # uvicorn keeps them private
    from uvicorn._types import ASGIReceiveCallable, ASGISendCallable, Scope

log = logging.getLogger(__name__)

Handler = Callable[[Exchange, Service], Awaitable[None]]

ROUTES: dict[str, dict[str, Handler]] = {
    "/v1/completions": {"POST": completions},
    "/v1/chat/completions": {"POST": chat_completions},
    "/v1/contexts": {"GET": http_contexts.list_contexts, "POST": http_contexts.create},
    "/v1/models": {"GET": http_info.models},
    "/tokenize": {"POST": http_info.tokenize},
    "/detokenize": {"POST": http_info.detokenize},
    "/healthz": {"GET": http_info.healthz},
    "/health": {"GET": http_info.healthz},
    "/readyz": {"GET": http_info.readyz},
    "/metrics": {"GET": http_info.metrics},
    "/version": {"GET": http_info.version},
}
OPEN_PATHS = frozenset({"/healthz", "/health", "/readyz"})
"""Need no API key: probes have none."""
GENERATING = frozenset({"/v1/completions", "/v1/chat/completions"})


class HttpApp:
    """An ASGI application."""

    def __init__(self, service: Service, api_keys: ApiKeys | None) -> None:
        self._service = service
        self._api_keys = api_keys

    async def __call__(self, scope: Scope, receive: ASGIReceiveCallable, send: ASGISendCallable) -> None:
        if scope["type"] != "http":
            raise RuntimeError(f"this server speaks HTTP only, not {scope['type']}")
        exchange = Exchange(scope, receive, send, self._service.config.max_body_bytes)
        metrics = self._service.metrics
        try:
            await self._answer(exchange)
        except ClientGone:
            exchange.status = 499
            metrics.disconnects.inc()
        finally:
            endpoint = exchange.path if exchange.path in ROUTES else "other"
            metrics.requests.labels(endpoint, str(exchange.status)).inc()

    async def _answer(self, exchange: Exchange) -> None:
        headers: Headers = []
        try:
            handlers = _route(exchange.path)
            if self._api_keys is not None and exchange.path not in OPEN_PATHS:
                exchange.caller = self._api_keys.check(exchange.header(b"authorization"))
            handler = handlers.get("GET" if exchange.method == "HEAD" else exchange.method)
            if handler is None:
                headers.append((b"allow", ", ".join(handlers).encode()))
                takes = " or ".join(handlers)
                raise TandemError("method_not_allowed", f"{exchange.path} takes {takes}, not {exchange.method[:16]}")
            if exchange.path in GENERATING:
                self._service.check_load()
            await handler(exchange, self._service)
        except TandemError as error:
            if exchange.status:
                raise
            await exchange.reply_error(error, headers)
        except ClientGone:
            raise
        except Exception:
            log.exception("request %s to %s failed", exchange.request_id, exchange.path)
            if exchange.status:
                raise
            await exchange.reply_error(TandemError("internal", "an internal error; the router's log has more"))


def _route(path: str) -> dict[str, Handler]:
    """By method."""
    route = ROUTES.get(path)
    if route is not None:
        return route
    if path.startswith("/v1/models/"):
        return {"GET": http_info.model}
    if path.startswith("/v1/requests/"):
        return {"GET": http_explain.request_account}
    if path.startswith("/v1/contexts/"):
        return {"GET": http_contexts.get, "DELETE": http_contexts.drop}
    raise TandemError("not_found", f"there is no {path[:64]!r} here")
