"""POST /v1/embeddings"""

from __future__ import annotations

import asyncio
import base64
from typing import Any

import msgspec

from tandem.router.calls.generate import account_of
from tandem.router.http.answers import wants_account, whole
from tandem.router.requests.embedding import EmbeddingsBody, Vector, plan_embeddings, vectors
from tandem.router.service import Service
from tandem.router.web.exchange import Exchange
from tandem.router.web.request_fields import BodyReader

_READER = BodyReader(EmbeddingsBody)


async def embeddings(exchange: Exchange, service: Service) -> None:
    """`explain` is of the last group of inputs."""
    body = await exchange.decode(_READER)
    data: list[dict[str, Any]] = []
    explain: dict[str, Any] = {}
    prompt_tokens = 0
    for group in await plan_embeddings(body, service, exchange.caller):
        async with service.call(
            exchange.request_id, group, arrived=exchange.arrived, traceparent=exchange.traceparent
        ) as call:
            await whole(exchange, call)
            for vector in vectors(call.choices, body.dimensions):
                embedding = msgspec.json.encode(_shape(vector, body.encoding_format))
                exchange.memory.hold(exchange.memory.size + len(embedding), exchange.caller.tenant)
                data.append({"object": "embedding", "index": len(data), "embedding": msgspec.Raw(embedding)})
                await asyncio.sleep(0)  # a long vector takes half a millisecond
            prompt_tokens += call.usage().prompt_tokens
            if wants_account(exchange):
                explain = {"explain": account_of(call)}
    usage = {"prompt_tokens": prompt_tokens, "total_tokens": prompt_tokens}
    await exchange.reply_json({"object": "list", "data": data, "model": service.model.name, "usage": usage, **explain})


def _shape(vector: Vector, encoding_format: str | None) -> str | list[float]:
    if encoding_format == "base64":
        return base64.b64encode(vector.tobytes()).decode()
    values: list[float] = vector.tolist()
    return values
