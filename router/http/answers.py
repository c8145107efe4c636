"""Answers a generation request: one JSON object, or a stream of server-sent events. The shapes come from a `Format`."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine
from typing import Any, Protocol, TypeVar

import msgspec

from tandem.common.errors import TandemError
from tandem.router.calls.choice import Choice, Delta
from tandem.router.calls.generate import Call, Usage, account_of
from tandem.router.http.large_answers import written
from tandem.router.web.exchange import ClientGone, Exchange
from tandem.router.web.large_json import encoded_parts

T = TypeVar("T")

KEEPALIVE = b": keep-alive\n\n"
STALLED_S = 30.0
"""After its deadline, or after it failed, a call may take this long to reach a client that reads slowly."""

TYPED_EVENTS = frozenset({"/v1/responses", "/v1/messages"})


class Format(Protocol):
    """Writes the shapes of one request in the API that it came by."""

    def opening(self) -> bytes:
        """Events before any token."""

    def chunks(self, delta: Delta) -> bytes:
        """Events for what is new of one choice."""

    def ending(self, usage: Usage) -> bytes:
        """Events after the last choice has ended."""

    def failure(self, error: TandemError) -> bytes:
        """The event that ends a stream which has begun."""

    def answer(self, deltas: list[tuple[Choice, Delta]], usage: Usage) -> dict[str, Any]:
        """The whole answer of a request that does not stream."""


async def answer(exchange: Exchange, call: Call, shapes: Format) -> None:
    """Streams if the call does. A client that goes away ends the call. Raises TandemError before the first byte."""
    exchange.ignore(name for choice in call.choices for name in choice.spec.ignored)
    if call.spec.streaming:
        await _while_connected(exchange, call, _stream(exchange, call, shapes))
    else:
        deltas, usage = await whole(exchange, call), call.usage()
        explain = {"explain": account_of(call)} if wants_account(exchange) else {}

        def write() -> list[bytes]:
            return encoded_parts(shapes.answer(deltas, usage) | explain)

        await exchange.reply(await written(call, exchange.memory, write))


async def whole(exchange: Exchange, call: Call) -> list[tuple[Choice, Delta]]:
    """All of a call that does not stream. A client that goes away ends it. Raises TandemError, ClientGone."""
    deltas = await _while_connected(exchange, call, call.result())
    return list(zip(call.choices, deltas, strict=True))


async def _while_connected(exchange: Exchange, call: Call, work: Coroutine[Any, Any, T]) -> T:
    """`work` on the call, which a client that goes away ends with ClientGone."""
    watcher = asyncio.create_task(_watch(exchange, call))
    try:
        return await work
    except _Disconnected as error:
        raise ClientGone from error
    finally:
        watcher.cancel()


def wants_account(exchange: Exchange) -> bool:
    return exchange.header(b"x-tandem-explain") == "1"


def _account_event(exchange: Exchange, call: Call) -> bytes:
    """Clients of APIs with typed events look at the type; those of completions expect choices."""
    account = {"type": "tandem.explain", "object": "tandem.explain", "choices": [], "explain": account_of(call)}
    typed = exchange.path in TYPED_EVENTS
    return (b"event: tandem.explain\n" if typed else b"") + b"data: " + msgspec.json.encode(account) + b"\n\n"


class _Disconnected(TandemError):
    """Made anew each time: an exception that is raised twice keeps the frames of both, and all they hold."""

    def __init__(self) -> None:
        super().__init__("cancelled", "the client went away")


async def _watch(exchange: Exchange, call: Call) -> None:
    await exchange.wait_for_disconnect()
    call.fail(_Disconnected())


async def _stream(exchange: Exchange, call: Call, shapes: Format) -> None:
    started = False
    try:
        try:
            async with asyncio.timeout(None) as patience:
                call.on_failed = lambda: patience.reschedule(asyncio.get_running_loop().time() + STALLED_S)
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
                        if wants_account(exchange):
                            events += _account_event(exchange, call)
                        events += shapes.ending(call.usage())
                    await exchange.send_events(events, last=call.finished)
        except TandemError as error:
            if isinstance(error, _Disconnected) or not started:
                raise
            async with asyncio.timeout(STALLED_S):
                await exchange.send_events(shapes.failure(error), last=True)
    except TimeoutError as error:
        raise ClientGone from error
    finally:
        call.on_failed = None
