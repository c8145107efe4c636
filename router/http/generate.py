"""Answers a request that goes to the workers: one JSON object, or a stream of server-sent events."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from functools import partial
from typing import Any

import msgspec

from tandem.common.errors import TandemError
from tandem.router.answers.large_answers import written
from tandem.router.answers.shapes import Shapes
from tandem.router.calls.choice import ChoiceSpec, Delta
from tandem.router.calls.generate import STALLED_S, Call, account_of, limited_sending
from tandem.router.endpoints.plan import Runner, TextPlan
from tandem.router.endpoints.plans import StandsForChat, input_tokens
from tandem.router.endpoints.table import Endpoint
from tandem.router.service import Service
from tandem.router.web.exchange import ClientGone, Exchange
from tandem.router.web.request_fields import BodyReader

KEEPALIVE = b": keep-alive\n\n"


def generating(endpoint: Endpoint[Any]) -> Callable[[Exchange, Service], Awaitable[None]]:
    """The handler of an endpoint."""

    async def handler(exchange: Exchange, service: Service) -> None:
        """Reads the body, plans, and answers: in events where the request says `stream`, else as one object. Raises
        TandemError."""
        body = await exchange.decode(endpoint.reader)
        exchange.name(body.request_id)
        exchange.ignore(endpoint.ignored(body))
        plan = await endpoint.plan(body, service, exchange)
        exchange.ignore([name for choices in plan.calls for choice in choices for name in choice.ignored])
        if isinstance(plan, TextPlan) and plan.stream:
            async with _call(exchange, service, plan.choices, streaming=True) as call:
                await _stream(exchange, call, plan.shapes(exchange.request_id, call))
            return
        runner = Runner(
            request_id=exchange.request_id,
            caller=exchange.caller,
            memory=exchange.memory,
            open=partial(_call, exchange, service),
            read=partial(_whole, exchange),
            explains=_wants_account(exchange),
        )
        async with plan.answered(runner) as parts:
            await exchange.reply(parts)

    return handler


def counting(reader: BodyReader[StandsForChat], head: dict[str, str]) -> Callable[[Exchange, Service], Awaitable[None]]:
    """The handler that tells how many tokens the model would read. `head`: what the answer begins with."""

    async def handler(exchange: Exchange, service: Service) -> None:
        body = await exchange.decode(reader)
        await exchange.reply_json({**head, "input_tokens": await input_tokens(body, service, exchange)})

    return handler


def _call(
    exchange: Exchange, service: Service, choices: Sequence[ChoiceSpec], *, streaming: bool = False
) -> AbstractAsyncContextManager[Call]:
    return service.call(
        exchange.request_id,
        choices,
        arrived=exchange.arrived,
        traceparent=exchange.traceparent,
        streaming=streaming,
    )


def _wants_account(exchange: Exchange) -> bool:
    return exchange.header(b"x-tandem-explain") == "1"


async def _whole(exchange: Exchange, call: Call) -> list[Delta]:
    async with _while_connected(exchange, call):
        return await call.result()


@asynccontextmanager
async def _while_connected(exchange: Exchange, call: Call) -> AsyncIterator[None]:
    """Ends the call when its client goes away. Raises ClientGone."""
    watcher = asyncio.create_task(_watch(exchange, call))
    try:
        yield
    except _Disconnected as error:
        raise ClientGone from error
    finally:
        watcher.cancel()


class _Disconnected(TandemError):
    """Made anew each time: an exception that is raised twice keeps the frames of both, and all they hold."""

    def __init__(self) -> None:
        super().__init__("cancelled", "the client went away")


async def _watch(exchange: Exchange, call: Call) -> None:
    await exchange.wait_for_disconnect()
    call.fail(_Disconnected())


async def _stream(exchange: Exchange, call: Call, shapes: Shapes) -> None:
    """Raises TandemError before the first byte; later errors are an event."""
    started = False
    try:
        async with _while_connected(exchange, call), limited_sending(call):
            while not call.finished:
                deltas = await call.next()
                if started:
                    events = b"".join([shapes.chunks(delta) for delta in deltas]) if deltas else KEEPALIVE
                else:  # what it tells of the prompt may be long

                    def begun(deltas: list[Delta] = deltas) -> bytes:
                        return shapes.opening() + b"".join([shapes.chunks(delta) for delta in deltas])

                    events = await written(call, exchange.memory, begun) or KEEPALIVE
                    started = True
                    await exchange.start_events()
                if call.finished:
                    if _wants_account(exchange):
                        events += _account_event(call, shapes)
                    events += shapes.ending(call.usage())
                await exchange.send_events(events, last=call.finished)
    except TimeoutError as error:
        raise ClientGone from error
    except TandemError as error:
        if not started:
            raise
        await _send_failure(exchange, shapes.failure(error))


async def _send_failure(exchange: Exchange, event: bytes) -> None:
    try:
        async with asyncio.timeout(STALLED_S):
            await exchange.send_events(event, last=True)
    except TimeoutError as error:
        raise ClientGone from error


def _account_event(call: Call, shapes: Shapes) -> bytes:
    account = {"type": "tandem.explain", "object": "tandem.explain", "choices": [], "explain": account_of(call)}
    name = b"event: tandem.explain\n" if shapes.named_events else b""
    return name + b"data: " + msgspec.json.encode(account) + b"\n\n"
