"""Answers a generation request: one JSON object, or a stream of server-sent events. The shapes come from a `Format`."""

from __future__ import annotations

import asyncio
import time
from typing import Any, Protocol

import msgspec

from tandem.common.errors import TandemError
from tandem.router.choice import Choice, Delta
from tandem.router.generate import Call, Usage
from tandem.router.http_errors import error_body
from tandem.router.http_exchange import ClientGone, Exchange

KEEPALIVE = b": keep-alive\n\n"
DONE = b"data: [DONE]\n\n"
STALLED_S = 30.0
"""After its deadline a call may take this long to reach a client that reads slowly."""


class Format(Protocol):
    """Writes the OpenAI shapes of one request."""

    def opening(self) -> bytes:
        """Events before any token."""

    def chunks(self, delta: Delta) -> bytes:
        """Events for what is new of one choice."""

    def ending(self, usage: Usage) -> bytes:
        """Events after the last choice has ended, without [DONE]."""

    def answer(self, deltas: list[tuple[Choice, Delta]], usage: Usage) -> dict[str, Any]:
        """The whole answer of a request that does not stream."""


async def answer(exchange: Exchange, call: Call, shapes: Format) -> None:
    """Streams if the call does. A client that goes away ends the call. Raises TandemError before the first byte."""
    watcher = asyncio.create_task(_watch(exchange, call))
    try:
        if call.spec.streaming:
            await _stream(exchange, call, shapes)
        else:
            deltas = await call.result()
            pairs = list(zip(call.choices, deltas, strict=True))
            await exchange.reply_json(shapes.answer(pairs, call.usage()))
    except TandemError as error:
        if isinstance(error, _Disconnected):
            raise ClientGone from error
        raise
    finally:
        watcher.cancel()


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
        async with asyncio.timeout(max(0.0, call.deadline - time.monotonic()) + STALLED_S):
            while not call.finished:
                deltas = await call.next()
                events = b"".join([shapes.chunks(delta) for delta in deltas]) if deltas else KEEPALIVE
                if not started:
                    started = True
                    await exchange.start_events()
                    events = shapes.opening() + events
                if call.finished:
                    events += shapes.ending(call.usage()) + DONE
                await exchange.send_events(events, last=call.finished)
    except TandemError as error:
        if isinstance(error, _Disconnected) or not started:
            raise
        await exchange.send_events(b"data: " + msgspec.json.encode(error_body(error)) + b"\n\n", last=True)
    except TimeoutError as error:
        raise ClientGone from error
