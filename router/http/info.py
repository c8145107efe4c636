"""Everything that is not generation: models, tokenize, detokenize, health, version, metrics."""

from __future__ import annotations

import datetime
from typing import Any

import tandem
from tandem.common.errors import TandemError
from tandem.router.http.all_metrics import all_metrics
from tandem.router.metrics.router_metrics import CONTENT_TYPE
from tandem.router.requests.bodies import DetokenizeBody, TokenizeBody
from tandem.router.requests.tokenize import detokenized, tokenized
from tandem.router.service import Service
from tandem.router.web.exchange import Exchange
from tandem.router.web.large_json import encoded_ids, encoded_list, encoded_parts
from tandem.router.web.paging import page
from tandem.router.web.request_fields import BodyReader

_TOKENIZE = BodyReader(TokenizeBody)
_DETOKENIZE = BodyReader(DetokenizeBody)


async def models(exchange: Exchange, service: Service) -> None:
    """Those that the caller may use."""
    allowed = exchange.caller.models is None or service.model.name in exchange.caller.models
    data = [_model(exchange, service)] if allowed else []
    await exchange.reply_json(page(data, False) if exchange.anthropic else {"object": "list", "data": data})


async def model(exchange: Exchange, service: Service) -> None:
    """GET /v1/models/{id}. Raises TandemError `not_found` or `permission_denied`."""
    name = exchange.path.removeprefix("/v1/models/")
    if not name:
        raise TandemError("not_found", "name a model, or ask /v1/models for all", param="model")
    service.model.check_name(name)
    exchange.caller.check_model(service.model.name)
    await exchange.reply_json(_model(exchange, service))


async def tokenize(exchange: Exchange, service: Service) -> None:
    """POST /tokenize: token ids of a text or a chat."""
    body = await exchange.decode(_TOKENIZE)
    tokens = await tokenized(body, service.model, exchange.caller)
    max_model_len, token_text = service.max_model_len, service.model.text.token_text

    def answer() -> list[bytes]:
        strings = encoded_list(map(token_text, tokens)) if body.return_token_strs else None
        counts = {"count": len(tokens), "max_model_len": max_model_len}
        return encoded_parts({**counts, "tokens": encoded_ids(tokens), "token_strs": strings})

    await exchange.reply(await exchange.off_loop(answer))


async def detokenize(exchange: Exchange, service: Service) -> None:
    body = await exchange.decode(_DETOKENIZE)
    await exchange.reply_json({"prompt": await detokenized(body, service.model, exchange.caller)})


async def healthz(exchange: Exchange, service: Service) -> None:
    """The process is alive and its loop turns."""
    await exchange.reply_json({"status": "ok"})


async def readyz(exchange: Exchange, service: Service) -> None:
    """200 while a decode worker is connected and the router takes requests; says what it knows of each worker."""
    workers: list[dict[str, Any]] = []
    for client in service.fleet.clients:
        session = client.session
        workers.append(
            {
                "role": client.role_name,
                "target": client.target.address,
                "worker": session.name if session else None,
                "connected": session is not None,
                "draining": client.leaving or bool(session and session.status.draining),
                "problem": client.problem or None,
                "row_invariant": bool(session and session.info.row_invariant),
            }
        )
    ready = service.ready
    await exchange.reply_json(
        {
            "status": "ready" if ready else "not ready",
            "draining": service.draining,
            "workers": workers,
            "problems": [f"{source.name}: {source.problem}" for source in service.fleet.sources if source.problem],
        },
        status=200 if ready else 503,
    )


async def version(exchange: Exchange, service: Service) -> None:
    await exchange.reply_json({"version": tandem.__version__})


async def metrics(exchange: Exchange, service: Service) -> None:
    """Metrics of all processes that this router knows."""
    await exchange.reply(await all_metrics(service), content_type=CONTENT_TYPE.encode())


def _model(exchange: Exchange, service: Service) -> dict[str, Any]:
    name, created = service.model.name, service.model.created
    if exchange.anthropic:
        return {
            "type": "model",
            "id": name,
            "display_name": name,
            "created_at": datetime.datetime.fromtimestamp(created, datetime.UTC),
            "lifecycle": "active",
            "max_input_tokens": service.max_model_len,
            "max_tokens": service.max_model_len,
        }
    return {
        "id": name,
        "object": "model",
        "created": created,
        "owned_by": "tandem",
        "root": name,
        "parent": None,
        "max_model_len": service.max_model_len,
    }
