"""/v1/contexts: prompt prefixes that a tenant has given a name."""

from __future__ import annotations

from functools import partial
from typing import Any

from tandem.proto import kvnode_pb2
from tandem.router.requests import contexts as named_contexts
from tandem.router.requests.bodies import ContextBody
from tandem.router.requests.contexts import contexts_of
from tandem.router.service import Service
from tandem.router.web.exchange import Exchange
from tandem.router.web.request_fields import BodyReader

_PREFIX = "/v1/contexts/"

_READER = BodyReader(ContextBody)


async def create(exchange: Exchange, service: Service) -> None:
    body = await exchange.decode(_READER)
    open_call = partial(service.call, exchange.request_id, arrived=exchange.arrived, traceparent=exchange.traceparent)
    await exchange.reply_json(_shape(await named_contexts.create(body, service, exchange.caller, open_call)))


async def list_contexts(exchange: Exchange, service: Service) -> None:
    found = await contexts_of(service).list(exchange.caller.tenant)
    await exchange.reply_json({"object": "list", "data": [_shape(context) for context in found]})


async def get(exchange: Exchange, service: Service) -> None:
    name = exchange.path.removeprefix(_PREFIX)
    await exchange.reply_json(_shape(await contexts_of(service).get(exchange.caller.tenant, name)))


async def drop(exchange: Exchange, service: Service) -> None:
    name = exchange.path.removeprefix(_PREFIX)
    await contexts_of(service).drop(exchange.caller.tenant, name)
    await exchange.reply_json({"name": name, "object": "context", "deleted": True})


def _shape(context: kvnode_pb2.Context) -> dict[str, Any]:
    return {
        "object": "context",
        "name": context.name,
        "version": context.version,
        "tokens": context.num_tokens,
        "resident_tokens": context.resident_tokens,
        "created_at": int(context.created_at),
        "expires_at": int(context.expires_at),
    }
