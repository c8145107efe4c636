"""What writes an answer as JSON; what those of completions and chat share, with the quick way to write an event."""

from __future__ import annotations

import time
from typing import Any, Protocol

import msgspec

from tandem.common.errors import TandemError
from tandem.router.calls.choice import Choice, Delta
from tandem.router.calls.generate import Call, Usage
from tandem.router.requests.bodies import GenerationBody
from tandem.router.text.served_model import ServedModel
from tandem.router.web.errors import error_body
from tandem.router.web.large_json import encoded

DONE = b"data: [DONE]\n\n"

_CHOICE_END = b',"logprobs":null,"finish_reason":null}]'
_encode = msgspec.json.encode


class Shapes(Protocol):
    """Shapes of the answer to one request, in the API that it came by."""

    named_events: bool
    """Clients look at the names of events; else they expect `choices` in each."""

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


class CompletionsShapes:
    """Events of /v1/completions and /v1/chat/completions."""

    named_events = False

    def __init__(self, answer_id: str, kind: str, model: ServedModel, body: GenerationBody, call: Call) -> None:
        """`kind`: the `object` of a whole answer; chat events have `.chunk` added, as OpenAI writes it."""
        include_usage = body.include_usage
        self.text = model.text
        self.head: dict[str, Any] = {
            "id": answer_id,
            "object": kind,
            "created": int(time.time()),
            "model": model.name,
            "system_fingerprint": None,
        }
        event_head = {**self.head, "object": f"{kind}.chunk" if kind == "chat.completion" else kind}
        self._include_usage = include_usage
        self._usage_so_far = call.usage if body.continuous_usage else None
        self._event_head = event_head
        self._prefix = b"data: " + _encode(event_head)[:-1] + b',"choices":[{"index":'
        self._suffix = _CHOICE_END + (b',"usage":null' if include_usage else b"") + b"}\n\n"

    def event(self, choices: list[dict[str, Any]], **extra: Any) -> bytes:
        """An event with these choices, and `extra` fields."""
        value = {**self._event_head, "choices": choices}
        if self._usage_so_far is not None:
            value["usage"] = usage_object(self._usage_so_far())
        elif self._include_usage:
            value["usage"] = None
        return b"data: " + encoded(value | extra) + b"\n\n"

    def text_event(self, index: int, opening: bytes, text: str, closing: bytes) -> bytes:
        """An event with nothing but new text; made once per token, so its constant parts are encoded beforehand."""
        suffix = self._suffix
        if self._usage_so_far is not None:
            suffix = b'%b,"usage":%b}\n\n' % (_CHOICE_END, _encode(usage_object(self._usage_so_far())))
        return b"%b%d,%b%b%b%b" % (self._prefix, index, opening, _encode(text), closing, suffix)

    def ending(self, usage: Usage) -> bytes:
        if not self._include_usage:
            return DONE
        return self.event([], usage=usage_object(usage)) + DONE

    def failure(self, error: TandemError) -> bytes:
        return b"data: " + _encode(error_body(error)) + b"\n\n"


def usage_object(usage: Usage) -> dict[str, Any]:
    """JSON of usage in OpenAI's shape; where cached tokens came from is ours."""
    details: dict[str, Any] = {"cached_tokens": usage.cached_tokens}
    if usage.cached_by_tier:
        details["cached_tokens_by_tier"] = dict(usage.cached_by_tier)
    if usage.near_tokens:
        details["cached_tokens_near"] = usage.near_tokens
    return {
        "prompt_tokens": usage.prompt_tokens,
        "completion_tokens": usage.completion_tokens,
        "total_tokens": usage.prompt_tokens + usage.completion_tokens,
        "prompt_tokens_details": details,
    }
