"""GET /v1/usage: what the caller's tenant has used; for a tenant with `admin`, what each has."""

from __future__ import annotations

from tandem.router.service import Service
from tandem.router.web.exchange import Exchange


async def usage(exchange: Exchange, service: Service) -> None:
    """Usage of all routers on this machine."""
    found = await service.usage(exchange.caller)
    await exchange.reply_json({"object": "list", "data": [each.describe() for each in found]})
