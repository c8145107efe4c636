"""GetRequest and `explain`: the account of a request as a message. See explain.py."""

from __future__ import annotations

from typing import Any

from google.protobuf import json_format

from tandem.proto import inference_pb2 as pb
from tandem.router.grpc_api.exchange import GrpcExchange
from tandem.router.service import Service


async def get_request(exchange: GrpcExchange, request: pb.GetRequestRequest, service: Service) -> pb.RequestAccount:
    return account_message(await service.account(request.id, exchange.caller))


def account_message(account: dict[str, Any], *, strict: bool = False) -> pb.RequestAccount:
    """`account`: as `Record.describe` makes it. `strict`: raises ParseError where it has what the message has not."""
    attempts = [
        {**attempt, "candidates": [_candidate(each) for each in attempt["candidates"]]}
        for attempt in account["attempts"]
    ]
    return json_format.ParseDict(
        {**account, "attempts": attempts}, pb.RequestAccount(), ignore_unknown_fields=not strict
    )


def _candidate(candidate: dict[str, Any]) -> dict[str, Any]:
    return {**candidate, "stored_tokens": dict(candidate["stored_tokens"])}
