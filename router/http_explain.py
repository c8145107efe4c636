"""GET /v1/requests/{id}: the account of one of the latest requests."""

from __future__ import annotations

from tandem.common.errors import TandemError
from tandem.router.http_exchange import Exchange
from tandem.router.service import Service


async def request_account(exchange: Exchange, service: Service) -> None:
    """A tenant finds its own requests only; one with `admin` those of all."""
    request_id = exchange.path.removeprefix("/v1/requests/")
    tenant = None if exchange.caller.admin else exchange.caller.tenant
    record = service.explain.find(request_id, tenant)
    account = record.describe() if record is not None else None
    if account is None and service.siblings.count > 1:
        answers = await service.siblings.ask("request", id=request_id, tenant=tenant)
        account = next((answer for answer in answers.values() if answer is not None), None)
    if account is None:
        raise TandemError(
            "not_found",
            f"there is no account of request {request_id[:64]!r}: it is not yours, or too long ago",
            param="id",
        )
    await exchange.reply_json(account)
