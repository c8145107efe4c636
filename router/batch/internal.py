"""Runs one line of a batch through the handler that answers the same request over HTTP, without a connection.

So a line is checked, computed, counted and answered exactly as if a client had sent it.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import msgspec

from tandem.common.errors import TandemError
from tandem.common.fairness import LAST_BAND
from tandem.router.batch.order import Item, prompt_keys
from tandem.router.calls.choice import ChoiceSpec
from tandem.router.calls.generate import Call
from tandem.router.fields.sampling import invalid
from tandem.router.service import Service
from tandem.router.tenants.caller import UNLIMITED, Caller
from tandem.router.web.exchange import Exchange

if TYPE_CHECKING:  # uvicorn keeps them private
    from uvicorn._types import ASGIReceiveEvent, ASGISendEvent, HTTPScope

    from tandem.router.http.app import Handler

log = logging.getLogger(__name__)

PRIORITY = LAST_BAND
"""Lower values go first: whatever a client waits for goes before a batch."""
ENDPOINTS = ("/v1/chat/completions", "/v1/completions", "/v1/embeddings", "/v1/responses")
"""OpenAI's, as far as this router has them."""


@dataclass(frozen=True, slots=True)
class Answer:
    status: int
    body: bytes
    error: TandemError | None = None
    """Why it failed."""


def batch_caller(caller: Caller) -> Caller:
    """The tenant in the lowest band. Its rates are for what clients wait for; a batch takes what is left over."""
    return replace(caller, priority_min=PRIORITY, priority_max=PRIORITY, rates=UNLIMITED)


class Inside:
    """The front door's handlers, called from inside."""

    def __init__(self, service: Service, handlers: dict[str, Handler]) -> None:
        self.service = service
        self.handlers = {path: handlers[path] for path in ENDPOINTS if path in handlers}

    async def answer(
        self, endpoint: str, body: dict[str, Any], caller: Caller, request_id: str, opened: Callable[[Call], None]
    ) -> Answer:
        """`opened` is told the call once it has begun; some endpoints have none."""
        exchange, sent = self._exchange(endpoint, body, caller, request_id)
        error: TandemError | None = None
        try:
            if body.get("stream"):
                raise invalid("stream", "must be left out: a batch has no streams")
            await self.handlers[endpoint](exchange, _Watched(self.service, opened))
        except TandemError as raised:
            error = raised
        except Exception:
            log.exception("request %s of a batch failed", request_id)
            error = TandemError("internal", "an internal error; the router's log has more")
        finally:
            exchange.release()
        if error is not None:
            sent.clear()
            await exchange.reply_error(error)
        return Answer(exchange.status, b"".join(sent), error)

    async def look_at(self, endpoint: str, body: dict[str, Any], caller: Caller) -> Item:
        """What the order needs to know: the handler gets as far as opening its call, and no further."""
        if endpoint not in ("/v1/chat/completions", "/v1/completions") or body.get("stream"):
            return Item()
        exchange, _ = self._exchange(endpoint, body, caller, "batch-plan")
        try:
            await self.handlers[endpoint](exchange, _Planning(self.service))
        except _Planned as planned:
            return _item(planned.choices)
        except TandemError:
            pass  # its result will say the same
        except Exception:
            log.exception("a request of a batch could not be looked at")
        finally:
            exchange.release()
        return Item()

    def _exchange(
        self, endpoint: str, body: dict[str, Any], caller: Caller, request_id: str
    ) -> tuple[Exchange, list[bytes]]:
        """And the parts of the answer's body."""
        content = msgspec.json.encode({**body, "priority": PRIORITY})
        unread = [content]
        sent: list[bytes] = []

        async def receive() -> ASGIReceiveEvent:
            if unread:
                return {"type": "http.request", "body": unread.pop(), "more_body": False}
            await asyncio.get_running_loop().create_future()  # nobody hangs up
            return {"type": "http.disconnect"}

        async def send(event: ASGISendEvent) -> None:
            if event["type"] == "http.response.body":
                sent.append(event.get("body", b""))

        scope: HTTPScope = {
            "type": "http",
            "asgi": {"version": "3.0", "spec_version": "2.3"},
            "http_version": "1.1",
            "method": "POST",
            "scheme": "http",
            "path": endpoint,
            "raw_path": endpoint.encode(),
            "query_string": b"",
            "root_path": "",
            "headers": [(b"content-type", b"application/json"), (b"x-request-id", request_id.encode())],
            "client": None,
            "server": None,
        }
        exchange = Exchange(scope, receive, send, len(content), self.service.work)
        exchange.caller = caller
        return exchange, sent


class _Watched(Service):
    """The same service (it shares all state), which tells of the call that it opens."""

    __slots__ = ("_opened",)

    def __init__(self, service: Service, opened: Callable[[Call], None]) -> None:
        self.__dict__ = service.__dict__
        self._opened = opened

    @asynccontextmanager
    async def call(self, *args: Any, **kwargs: Any) -> AsyncIterator[Call]:
        async with super().call(*args, **kwargs) as call:
            self._opened(call)
            yield call


class _Planned(Exception):
    def __init__(self, choices: Sequence[ChoiceSpec]) -> None:
        super().__init__()
        self.choices = choices


class _Planning(Service):
    """The same service, which opens no call."""

    def __init__(self, service: Service) -> None:
        self.__dict__ = service.__dict__

    @asynccontextmanager
    async def call(self, request_id: str, choices: Sequence[ChoiceSpec], **kwargs: Any) -> AsyncIterator[Call]:
        raise _Planned(choices)
        yield  # a generator, as what it stands for


def _item(choices: Sequence[ChoiceSpec]) -> Item:
    prompts = {id(choice.sequence.prompt): choice.sequence.prompt for choice in choices}
    first = choices[0].sequence
    return Item(
        keys=prompt_keys(first.prompt.token_ids, first.wanted_salt),
        prompt_tokens=sum(len(prompt.token_ids) for prompt in prompts.values()),
        output_tokens=sum(choice.sequence.sampling.max_tokens for choice in choices),
    )
