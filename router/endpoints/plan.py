"""What a request asks for, made of its body by its endpoint. HTTP, gRPC and batches share it; each runs the calls and
sends the answer in its own way."""

from __future__ import annotations

import asyncio
import base64
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from dataclasses import dataclass
from typing import Any, Protocol, TypeVar

import msgspec

from tandem.router.answers.large_answers import written
from tandem.router.answers.shapes import Shapes
from tandem.router.asks.tool_choice import ToolUse
from tandem.router.calls.choice import ChoiceSpec, Delta
from tandem.router.calls.generate import Call, account_of
from tandem.router.requests.embedding import EmbeddingsBody, Vector, vectors
from tandem.router.tenants.caller import Caller
from tandem.router.web.body_memory import BodyMemory
from tandem.router.web.large_json import encoded_parts

T = TypeVar("T")


class Asker(Protocol):
    """Whoever brings a request: an exchange of HTTP, of gRPC, or a line of a batch."""

    caller: Caller

    async def off_loop(self, function: Callable[..., T], *args: Any) -> T:
        """The result of a function that takes long where the body is large. Raises TandemError `overloaded`, and what
        the function raises."""


@dataclass(frozen=True, slots=True)
class Runner:
    """How an asker has the calls of a plan run, where the answer is JSON and comes whole."""

    request_id: str
    caller: Caller
    memory: BodyMemory
    open: Callable[[Sequence[ChoiceSpec]], AbstractAsyncContextManager[Call]]
    read: Callable[[Call], Awaitable[list[Delta]]]
    """All of a call, a delta per choice."""
    explains: bool = False
    """The answer has the account of its last call."""


@dataclass(frozen=True, slots=True)
class TextPlan:
    """One call that generates text."""

    choices: Sequence[ChoiceSpec]
    shapes: Callable[[str, Call], Shapes]
    """Shapes of the answer as JSON, by the request's id and its call."""
    stream: bool
    tools: ToolUse | None = None
    """None: the answer is text, whatever it looks like."""
    echoed: str | None = None
    """Text before that of every choice, where `echo` asks for it. None: its prompt's."""
    prompt_text: str | None = None
    """Text of the prompt, where the answer tells of it."""

    @property
    def calls(self) -> Sequence[Sequence[ChoiceSpec]]:
        """The choices of each call, to be run one after the other."""
        return (self.choices,)

    @asynccontextmanager
    async def answered(self, runner: Runner) -> AsyncIterator[list[bytes]]:
        """Parts of the answer's JSON; the call is open meanwhile. Raises TandemError."""
        async with runner.open(self.choices) as call:
            shapes = self.shapes(runner.request_id, call)
            deltas = list(zip(call.choices, await runner.read(call), strict=True))
            usage, explain = call.usage(), explained(call, runner)

            def write() -> list[bytes]:
                parts = encoded_parts(shapes.answer(deltas, usage) | explain)
                deltas.clear()  # of a long answer that takes a moment, too: not on the event loop
                return parts

            yield await written(call, runner.memory, write)


@dataclass(frozen=True, slots=True)
class EmbeddingPlan:
    """Calls that make vectors, one after the other: each of a group of inputs."""

    calls: Sequence[Sequence[ChoiceSpec]]
    body: EmbeddingsBody
    model: str

    @asynccontextmanager
    async def answered(self, runner: Runner) -> AsyncIterator[list[bytes]]:
        """The answer's JSON. The account of a call is that of the last group. Raises TandemError."""
        memory = runner.memory
        data: list[dict[str, Any]] = []
        explain: dict[str, Any] = {}
        prompt_tokens = 0
        for choices in self.calls:
            async with runner.open(choices) as call:
                await runner.read(call)
                for vector in vectors(call.choices, self.body.dimensions):
                    embedding = msgspec.json.encode(_shape(vector, self.body.encoding_format))
                    memory.hold(memory.size + len(embedding), runner.caller.tenant)
                    data.append({"object": "embedding", "index": len(data), "embedding": msgspec.Raw(embedding)})
                    await asyncio.sleep(0)  # a long vector takes half a millisecond
                prompt_tokens += call.usage().prompt_tokens
                explain = explained(call, runner)
        usage = {"prompt_tokens": prompt_tokens, "total_tokens": prompt_tokens}
        answer = {"object": "list", "data": data, "model": self.model, "usage": usage, **explain}
        yield [msgspec.json.encode(answer)]


Plan = TextPlan | EmbeddingPlan


def explained(call: Call, runner: Runner) -> dict[str, Any]:
    """What the answer tells of the call beside what its API has."""
    return {"explain": account_of(call)} if runner.explains else {}


def _shape(vector: Vector, encoding_format: str | None) -> str | list[float]:
    if encoding_format == "base64":
        return base64.b64encode(vector.tobytes()).decode()
    values: list[float] = vector.tolist()
    return values
