"""The HTTP front door: routes, authentication, and one place where errors become answers."""

from __future__ import annotations

import logging
from collections.abc import Awaitable, Callable
from typing import TYPE_CHECKING

from tandem.common.errors import TandemError
from tandem.router.calls.accounts import Accounts
from tandem.router.endpoints.table import ENDPOINTS
from tandem.router.http import batches as http_batches
from tandem.router.http import contexts as http_contexts
from tandem.router.http import explain as http_explain
from tandem.router.http import files as http_files
from tandem.router.http import info as http_info
from tandem.router.http import pages as http_pages
from tandem.router.http import usage as http_usage
from tandem.router.http.generate import counting, generating
from tandem.router.requests.messages import CountBody
from tandem.router.requests.responses import ResponsesBody
from tandem.router.service import Service
from tandem.router.tenants.tenants import Tenants
from tandem.router.web.cors import Cors
from tandem.router.web.exchange import ClientGone, Exchange, Headers
from tandem.router.web.request_fields import BodyReader

if TYPE_CHECKING:  # uvicorn keeps them private
    from uvicorn._types import ASGIReceiveCallable, ASGISendCallable, Scope

log = logging.getLogger(__name__)

Handler = Callable[[Exchange, Service], Awaitable[None]]

ROUTES: dict[str, dict[str, Handler]] = {
    **{path: {"POST": generating(endpoint)} for path, endpoint in ENDPOINTS.items()},
    "/v1/responses/input_tokens": {
        "POST": counting(BodyReader(ResponsesBody), {"object": "response.input_tokens"}),
    },
    "/v1/messages/count_tokens": {"POST": counting(BodyReader(CountBody), {})},
    "/v1/contexts": {"GET": http_contexts.list_contexts, "POST": http_contexts.create},
    "/v1/files": {"GET": http_files.list_files, "POST": http_files.upload},
    "/v1/batches": {"GET": http_batches.list_batches, "POST": http_batches.create},
    "/v1/models": {"GET": http_info.models},
    "/v1/usage": {"GET": http_usage.usage},
    "/tokenize": {"POST": http_info.tokenize},
    "/detokenize": {"POST": http_info.detokenize},
    "/healthz": {"GET": http_info.healthz},
    "/health": {"GET": http_info.healthz},
    "/readyz": {"GET": http_info.readyz},
    "/metrics": {"GET": http_info.metrics},
    "/version": {"GET": http_info.version},
    "/": {"GET": http_pages.home},
    "/docs": {"GET": http_pages.docs},
    "/openapi.json": {"GET": http_pages.openapi_json},
}
PROBES = frozenset({"/healthz", "/health", "/readyz"})
OPEN_PATHS = PROBES | {"/", "/docs", "/openapi.json"}
"""Need no API key: probes and people who look have none."""
ADMIN_PATHS = frozenset({"/metrics"})
"""Tell of all tenants: where there are several, only an `admin` may read them."""
QUIET_PATHS = PROBES | ADMIN_PATHS
"""Asked every few seconds by machines: they leave no lines in the log."""


class HttpApp:
    """An ASGI application."""

    def __init__(self, service: Service, tenants: Tenants | None, accounts: Accounts) -> None:
        """`tenants` None: everybody may come in. Raises ConfigError for origins that are none."""
        origins = service.config.allowed_origins
        self._cors = Cors(origins) if origins else None
        self._service = service
        self._tenants = tenants
        self._accounts = accounts

    async def __call__(self, scope: Scope, receive: ASGIReceiveCallable, send: ASGISendCallable) -> None:
        if scope["type"] != "http":
            raise RuntimeError(f"this server speaks HTTP only, not {scope['type']}")
        exchange = Exchange(scope, receive, send, self._service.config.max_body_bytes, self._service.work)
        exchange.cors = self._cors
        metrics = self._service.metrics
        try:
            await self._answer(exchange)
        except ClientGone:
            exchange.status = 499
            metrics.disconnects.inc()
        finally:
            exchange.release()
            endpoint = exchange.path if exchange.path in ROUTES else "other"
            metrics.requests.inc(endpoint, str(exchange.status))
            if exchange.path not in QUIET_PATHS:
                self._service.note_request(
                    request_id=exchange.request_id,
                    tenant=exchange.caller.tenant if exchange.accounts is not None else "",
                    arrived=exchange.arrived,
                    call=f"{exchange.method} {exchange.path}",
                    status=str(exchange.status),
                    generates=exchange.path in ENDPOINTS,
                )

    async def _answer(self, exchange: Exchange) -> None:
        headers: Headers = []
        try:
            if exchange.method == "OPTIONS":
                await exchange.reply_preflight(_methods(exchange.path))
                return
            handlers = _route(exchange.path)
            if exchange.path not in OPEN_PATHS:
                self._authenticate(exchange)
            handler = handlers.get("GET" if exchange.method == "HEAD" else exchange.method)
            if handler is None:
                headers.append((b"allow", ", ".join(_methods(exchange.path)).encode()))
                takes = " or ".join(handlers)
                raise TandemError("method_not_allowed", f"{exchange.path} takes {takes}, not {exchange.method[:16]}")
            if exchange.method == "POST":
                await self._take_in(exchange, handler)
            else:
                await handler(exchange, self._service)
        except TandemError as error:
            self._accounts.refused(exchange.caller, error)
            if exchange.status:
                raise
            await exchange.reply_error(error, headers)
        except ClientGone:
            raise
        except Exception:
            log.exception("request %s to %.64r failed", exchange.request_id, exchange.path)
            if exchange.status:
                raise
            await exchange.reply_error(TandemError("internal", "an internal error; the router's log has more"))

    async def _take_in(self, exchange: Exchange, handler: Handler) -> None:
        """A request that costs something: it counts among those of its tenant, also where it is refused."""
        generates = exchange.path in ENDPOINTS
        async with self._accounts.entering(
            exchange.caller, lambda: exchange.body_bytes, generates=generates
        ) as exchange.place:
            if generates:
                self._service.check_in_flight()
            await handler(exchange, self._service)

    def _authenticate(self, exchange: Exchange) -> None:
        """Raises TandemError `invalid_api_key` or `permission_denied`."""
        if self._tenants is not None:
            given = exchange.header(b"authorization")
            key = exchange.header(b"x-api-key")  # as Anthropic's clients send it
            exchange.caller = self._tenants.authenticate(given or (f"Bearer {key}" if key else ""))
            if exchange.path in ADMIN_PATHS and not self._tenants.sees_all(exchange.caller):
                raise TandemError(
                    "permission_denied",
                    f"{exchange.path} tells of all tenants: use the key of one with `admin: true` (--tenants-file).",
                )
        exchange.accounts = self._accounts


def _methods(path: str) -> list[str]:
    """What may be sent to `path`; where there is nothing, what may be sent at all, so that a page can read the 404."""
    try:
        handlers = list(_route(path))
    except TandemError:
        handlers = ["GET", "POST", "DELETE"]
    if "GET" in handlers:
        handlers.insert(handlers.index("GET") + 1, "HEAD")
    return [*handlers, "OPTIONS"]


def _route(path: str) -> dict[str, Handler]:
    """Handlers of a path, by method. Raises TandemError `not_found`."""
    route = ROUTES.get(path)
    if route is not None:
        return route
    if path.startswith("/v1/models/"):
        return {"GET": http_info.model}
    if path.startswith("/v1/requests/"):
        return {"GET": http_explain.request_account}
    if path.startswith("/v1/contexts/"):
        return {"GET": http_contexts.get, "DELETE": http_contexts.drop}
    if path.startswith("/v1/files/"):
        return http_files.by_id(path)
    if path.startswith("/v1/batches/"):
        return http_batches.by_id(path)
    alike = (f"/v1{path}", path.rstrip("/"), path.removeprefix("/v1"))
    near = next((each for each in alike if each in ROUTES and each != "/"), "")
    raise TandemError("not_found", f"there is no {path[:64]!r} here" + (f"; did you mean {near}?" if near else ""))
