"""One line of a batch while it is run: its request comes from a file, and its answer goes to one.

The endpoint's plan says what is to be computed and how the answer is written, so a line is checked, computed, counted
and answered as if a client had sent it, in the lowest band.
"""

from __future__ import annotations

import logging
import time
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, replace
from typing import Any, TypeVar

import msgspec

from tandem.common.errors import TandemError
from tandem.router.batch.order import Item, prompt_keys
from tandem.router.calls.choice import ChoiceSpec
from tandem.router.calls.generate import Call
from tandem.router.endpoints.plan import Plan, Runner, TextPlan
from tandem.router.endpoints.table import ENDPOINTS
from tandem.router.fields.sampling import invalid
from tandem.router.service import Service
from tandem.router.tenants.caller import UNLIMITED, Caller
from tandem.router.web.body_memory import BodyMemory
from tandem.router.web.errors import error_body
from tandem.router.web.off_loop import off_loop
from tandem.router.web.request_fields import log_ignored
from tandem.router.web.request_ids import named_in_body

log = logging.getLogger(__name__)

BATCH_ENDPOINTS = ("/v1/chat/completions", "/v1/completions", "/v1/embeddings", "/v1/responses")
"""OpenAI's, as far as this router has them."""

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Answer:
    """The answer to one line: HTTP status and JSON body."""

    status: int
    body: bytes
    error: TandemError | None = None
    """Why it failed."""


def batch_caller(caller: Caller) -> Caller:
    """The tenant in the lowest band. Its rates are for what clients wait for; a batch takes what is left over."""
    return replace(caller, batch=True, rates=UNLIMITED)


class LineExchange:
    """An asker. `look_at` and `answer` read the line, each once: between them it costs no memory. Both raise OSError
    where it cannot be read."""

    def __init__(
        self, service: Service, path: str, caller: Caller, request_id: str, size: int, read: Callable[[], bytes]
    ) -> None:
        """`path`: one of BATCH_ENDPOINTS. `caller`: see `batch_caller`. `read`: the request's JSON, about `size` bytes;
        blocks."""
        self.caller = caller
        self._service = service
        self._path = path
        self._request_id = request_id
        self._size = size
        self._read = read
        self._memory = BodyMemory()

    async def off_loop(self, function: Callable[..., T], *args: Any) -> T:
        """See `Asker`."""
        return await off_loop(self._service.work, self.caller, self._size, function, *args)

    async def look_at(self) -> Item:
        """What the order needs to know of it. Nothing, where it will be refused: its result will say so."""
        try:
            _, plan = await self._plan()
            return item_of(plan)
        except TandemError:
            return Item()
        except OSError:
            raise
        except Exception:
            log.exception("request %s of a batch could not be looked at", self._request_id)
            return Item()
        finally:
            self._memory.release()

    async def answer(self, opened: Callable[[Call], None]) -> Answer:
        """What HTTP would answer. `opened` is told each call once it has begun."""
        try:
            return Answer(200, await self._computed(opened))
        except TandemError as error:
            return _refusal(error)
        except OSError:
            raise
        except Exception:
            log.exception("request %s of a batch failed", self._request_id)
            return _refusal(TandemError("internal", "an internal error; the router's log has more"))
        finally:
            self._memory.release()

    async def _computed(self, opened: Callable[[Call], None]) -> bytes:
        arrived = time.monotonic()
        request_id, plan = await self._plan()

        @asynccontextmanager
        async def call_of(choices: Sequence[ChoiceSpec]) -> AsyncIterator[Call]:
            async with self._service.call(request_id, choices, arrived=arrived) as call:
                opened(call)
                yield call

        runner = Runner(request_id, self.caller, self._memory, call_of, Call.result)
        async with plan.answered(runner) as parts:
            return b"".join(parts)

    async def _plan(self) -> tuple[str, Plan]:
        """The request's id, and what it asks for. Raises TandemError."""
        endpoint = ENDPOINTS[self._path]
        self._memory.hold(self._size, self.caller.tenant)
        body, ignored = await self.off_loop(lambda: endpoint.reader.read(self._read()))
        log_ignored([*ignored, *endpoint.ignored(body)], self._path)
        request_id = named_in_body(body.request_id, self._request_id)
        plan = await endpoint.plan(body, self._service, self)
        if isinstance(plan, TextPlan) and plan.stream:
            raise invalid("stream", "must be left out: a batch has no streams")
        return request_id, plan


def item_of(plan: Plan) -> Item:
    """What the order needs to know of a request."""
    sequences = [choice.sequence for choices in plan.calls for choice in choices]
    prompts = {id(sequence.prompt): sequence.prompt for sequence in sequences}
    first = sequences[0]
    shares = isinstance(plan, TextPlan)  # nothing tells when the KV of an embedding is there
    return Item(
        keys=prompt_keys(first.prompt.token_ids, first.wanted_salt) if shares else b"",
        prompt_tokens=sum(len(prompt.token_ids) for prompt in prompts.values()),
        output_tokens=sum(sequence.sampling.max_tokens for sequence in sequences),
    )


def _refusal(error: TandemError) -> Answer:
    return Answer(error.kind.http_status, msgspec.json.encode(error_body(error)), error)
