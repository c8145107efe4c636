"""GET /v1/requests/{id}: the account of one of the latest requests."""

from __future__ import annotations

from tandem.router.service import Service
from tandem.router.web.exchange import Exchange


async def request_account(exchange: Exchange, service: Service) -> None:
    request_id = exchange.path.removeprefix("/v1/requests/")
    await exchange.reply_json(await service.account(request_id, exchange.caller))
