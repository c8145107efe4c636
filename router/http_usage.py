"""GET /v1/usage: what the caller's tenant has used; for a tenant with `admin`, what each has."""

from __future__ import annotations

import msgspec

from tandem.router.http_exchange import Exchange
from tandem.router.service import Service
from tandem.router.usage import TenantUsage, merged


async def usage(exchange: Exchange, service: Service) -> None:
    """Of all replicas on this machine."""
    assert exchange.accounts is not None  # the HTTP application sets it
    tenant = None if exchange.caller.admin else exchange.caller.tenant
    reports = [exchange.accounts.usage.report(tenant)]
    answers = await service.siblings.ask("usage", tenant=tenant)
    reports += [msgspec.convert(answer, list[TenantUsage]) for answer in answers.values()]
    found = merged(reports)
    await exchange.reply_json({"object": "list", "data": [each.describe() for each in found]})
