"""What /v1/messages answers: a list of content blocks, and in a stream the events that tell how each of them grows."""

from __future__ import annotations

from typing import Any

import msgspec

from tandem.common.errors import TandemError
from tandem.router.calls.choice import Choice, Delta
from tandem.router.calls.generate import Call, Usage
from tandem.router.fields.json_depth import too_deep
from tandem.router.requests.chat import AskedChat
from tandem.router.text.served_model import ServedModel
from tandem.router.tools.events import CallArguments, CallStart, Event, Text, collect
from tandem.router.web.errors import anthropic_error

_STOP_REASONS = {"stop": "end_turn", "length": "max_tokens"}


class MessageShapes:
    """Text, and uses of tools, in the order in which they were written."""

    named_events = True

    def __init__(self, model: ServedModel, asked: AskedChat, request_id: str, call: Call) -> None:
        self._request_id = request_id
        self._tools = asked.tools
        self._parser = asked.parser()
        self._call = call
        self._index = -1
        self._kind = ""
        """Kind of the block that is growing; empty: none is."""
        self._called = False
        self._last: Delta | None = None
        self._message: dict[str, Any] = {
            "id": f"msg_{request_id}",
            "type": "message",
            "role": "assistant",
            "model": model.name,
            "content": [],
            "stop_reason": None,
            "stop_sequence": None,
        }

    def opening(self) -> bytes:
        usage = {**_usage(self._call.usage()), "output_tokens": 0}
        return _event("message_start", message={**self._message, "usage": usage})

    def chunks(self, delta: Delta) -> bytes:
        return b"".join(map(self._event_of, self._parsed(delta)))

    def ending(self, usage: Usage) -> bytes:
        """The end of the open block, then `message_delta` with the stop reason and usage, then `message_stop`."""
        return (
            self._stop_block()
            + _event("message_delta", delta=self._stop(), usage=_usage(usage))
            + _event("message_stop")
        )

    def failure(self, error: TandemError) -> bytes:
        return b"event: error\ndata: %b\n\n" % msgspec.json.encode(anthropic_error(error, self._request_id))

    def answer(self, deltas: list[tuple[Choice, Delta]], usage: Usage) -> dict[str, Any]:
        """A message with at most one block of text and one `tool_use` block for each tool call."""
        text, calls = collect([event for _, delta in deltas for event in self._parsed(delta)])
        content: list[dict[str, Any]] = [{"type": "text", "text": text}] if text else []
        for called in calls:
            content.append(self._tool_use(called.name) | {"input": _object(called.arguments)})
        return {**self._message, **self._stop(), "content": content, "usage": _usage(usage)}

    def _parsed(self, delta: Delta) -> list[Event]:
        events = self._parser.feed(delta.piece.text)
        if delta.finish_reason is not None:
            self._last = delta
            events += self._parser.finish()
        self._called = self._called or any(isinstance(event, CallStart) for event in events)
        return events

    def _event_of(self, event: Event) -> bytes:
        match event:
            case Text(text):
                begin = b"" if self._kind == "text" else self._start_block({"type": "text", "text": ""})
                return begin + self._delta({"type": "text_delta", "text": text})
            case CallStart(_, name):
                return self._start_block(self._tool_use(name))
            case CallArguments(_, text):
                return self._delta({"type": "input_json_delta", "partial_json": text})

    def _tool_use(self, name: str) -> dict[str, Any]:
        assert self._tools is not None
        return {"type": "tool_use", "id": self._tools.format.new_id(), "name": name, "input": {}}

    def _start_block(self, block: dict[str, Any]) -> bytes:
        end = self._stop_block()
        self._index += 1
        self._kind = block["type"]
        return end + _event("content_block_start", index=self._index, content_block=block)

    def _stop_block(self) -> bytes:
        if not self._kind:
            return b""
        self._kind = ""
        return _event("content_block_stop", index=self._index)

    def _delta(self, delta: dict[str, str]) -> bytes:
        return _event("content_block_delta", index=self._index, delta=delta)

    def _stop(self) -> dict[str, str | None]:
        reason = self._last.finish_reason if self._last else None
        if reason == "stop" and self._called:
            return {"stop_reason": "tool_use", "stop_sequence": None}
        if reason == "stop" and self._last and isinstance(self._last.stop_reason, str):
            return {"stop_reason": "stop_sequence", "stop_sequence": self._last.stop_reason}
        return {"stop_reason": _STOP_REASONS.get(reason or ""), "stop_sequence": None}


def _usage(usage: Usage) -> dict[str, int]:
    """Cached tokens are counted apart, as Anthropic does."""
    return {
        "input_tokens": usage.prompt_tokens - usage.cached_tokens,
        "cache_creation_input_tokens": 0,
        "cache_read_input_tokens": usage.cached_tokens,
        "output_tokens": usage.completion_tokens,
    }


def _object(arguments: str) -> dict[str, Any]:
    """{} where the answer was cut off in the middle of them."""
    try:
        value = msgspec.json.decode(arguments)
    except (msgspec.MsgspecError, RecursionError):
        return {}
    return value if isinstance(value, dict) and not too_deep(value) else {}


def _event(kind: str, **fields: Any) -> bytes:
    return b"event: %b\ndata: %b\n\n" % (kind.encode(), msgspec.json.encode({"type": kind, **fields}))
