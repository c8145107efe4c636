"""What /v1/responses answers: a list of items, and in a stream the events that tell how each of them grows."""

from __future__ import annotations

import time
from typing import Any

import msgspec

from tandem.common.errors import TandemError
from tandem.router.answers.logprobs import chat_entries
from tandem.router.calls.choice import Choice, Delta
from tandem.router.calls.generate import Call, Usage
from tandem.router.requests.chat import AskedChat
from tandem.router.text.served_model import ServedModel
from tandem.router.tools.events import CallArguments, CallStart, Event, Text


class ResponseShapes:
    """A message and function calls, in the order in which they were written."""

    named_events = True

    def __init__(
        self, model: ServedModel, asked: AskedChat, given: dict[str, Any], request_id: str, call: Call
    ) -> None:
        """`given`: fields of the request that the answer repeats."""
        self._id = request_id
        self._tools = asked.tools
        self._parser = asked.parser()
        self._model_text = model.text
        self._top: int | None = asked.spec.sequence.sampling.logprobs
        self._items: list[dict[str, Any]] = []
        self._open = False
        """The last item is still growing."""
        self._events: list[bytes] = []
        self._number = 0
        self._finish_reason: str | None = None
        self._response: dict[str, Any] = {
            "id": f"resp_{request_id}",
            "object": "response",
            "created_at": int(time.time()),
            "status": "in_progress",
            "background": False,
            "error": None,
            "incomplete_details": None,
            "model": model.name,
            "output": [],
            "previous_response_id": None,
            "reasoning": {"effort": None, "summary": None},
            "store": False,
            "temperature": asked.spec.sequence.sampling.temperature,
            "top_p": asked.spec.sequence.sampling.top_p,
            "truncation": "disabled",
            "usage": None,
            **given,
        }

    def opening(self) -> bytes:
        self._emit("response.created", response=self._response)
        self._emit("response.in_progress", response=self._response)
        return self._take()

    def chunks(self, delta: Delta) -> bytes:
        self._grow(delta)
        return self._take()

    def ending(self, usage: Usage) -> bytes:
        response = self._finished(usage)
        self._emit(f"response.{response['status']}", response=response)
        return self._take()

    def failure(self, error: TandemError) -> bytes:
        self._emit("error", code=error.code, message=error.message, param=error.param)
        return self._take()

    def answer(self, deltas: list[tuple[Choice, Delta]], usage: Usage) -> dict[str, Any]:
        for _, delta in deltas:
            self._grow(delta)
        return self._finished(usage)

    def _grow(self, delta: Delta) -> None:
        events = self._parser.feed(delta.piece.text)
        if delta.finish_reason is not None:
            self._finish_reason = delta.finish_reason
            events += self._parser.finish()
        logprobs = self._logprobs_of(delta)
        for event in events:
            self._take_event(event, logprobs)
            logprobs = []

    def _take_event(self, event: Event, logprobs: list[msgspec.Raw]) -> None:
        match event:
            case Text(text):
                if not self._open or self._items[-1]["type"] != "message":
                    self._begin_message()
                part = self._items[-1]["content"][0]
                part["text"] += text
                part["logprobs"] += logprobs
                self._emit("response.output_text.delta", delta=text, logprobs=logprobs, **self._part_place())
            case CallStart(_, name):
                self._close()
                assert self._tools is not None
                call_id = self._tools.format.new_id()
                self._begin({"type": "function_call", "call_id": call_id, "name": name, "arguments": ""}, "fc")
            case CallArguments(_, text):
                self._items[-1]["arguments"] += text
                self._emit("response.function_call_arguments.delta", delta=text, **self._place())

    def _begin_message(self) -> None:
        self._close()
        self._begin({"type": "message", "role": "assistant", "content": []}, "msg")
        part = {"type": "output_text", "text": "", "annotations": [], "logprobs": []}
        self._emit("response.content_part.added", part=part, **self._part_place())
        self._items[-1]["content"].append(part)

    def _begin(self, item: dict[str, Any], prefix: str) -> None:
        item = {"id": f"{prefix}_{self._id}_{len(self._items)}", "status": "in_progress", **item}
        self._items.append(item)
        self._open = True
        self._emit("response.output_item.added", output_index=len(self._items) - 1, item=item)

    def _close(self) -> None:
        if not self._open:
            return
        item, self._open = self._items[-1], False
        item["status"] = "incomplete" if self._finish_reason == "length" else "completed"
        if item["type"] == "message":
            part = item["content"][0]
            place = self._part_place()
            self._emit("response.output_text.done", text=part["text"], logprobs=part["logprobs"], **place)
            self._emit("response.content_part.done", part=part, **place)
        else:
            self._emit("response.function_call_arguments.done", arguments=item["arguments"], **self._place())
        self._emit("response.output_item.done", output_index=len(self._items) - 1, item=item)

    def _finished(self, usage: Usage) -> dict[str, Any]:
        if not self._items:
            self._begin_message()
        self._close()
        cut = self._finish_reason == "length"
        return {
            **self._response,
            "status": "incomplete" if cut else "completed",
            "incomplete_details": {"reason": "max_output_tokens"} if cut else None,
            "output": self._items,
            "usage": {
                "input_tokens": usage.prompt_tokens,
                "input_tokens_details": {"cached_tokens": usage.cached_tokens, "cache_write_tokens": 0},
                "output_tokens": usage.completion_tokens,
                "output_tokens_details": {"reasoning_tokens": 0},
                "total_tokens": usage.prompt_tokens + usage.completion_tokens,
            },
        }

    def _place(self) -> dict[str, Any]:
        return {"item_id": self._items[-1]["id"], "output_index": len(self._items) - 1}

    def _part_place(self) -> dict[str, Any]:
        return {**self._place(), "content_index": 0}

    def _logprobs_of(self, delta: Delta) -> list[msgspec.Raw]:
        """JSON of the entries: they are kept to the end, and would take ten times as much as objects."""
        if self._top is None:
            return []
        entries = chat_entries(self._model_text, delta.piece.token_ids, delta.piece.logprobs, self._top)
        return [msgspec.Raw(msgspec.json.encode(entry)) for entry in entries]

    def _emit(self, kind: str, **fields: Any) -> None:
        event = {"type": kind, "sequence_number": self._number, **fields}
        self._number += 1
        self._events.append(b"event: %b\ndata: %b\n\n" % (kind.encode(), msgspec.json.encode(event)))

    def _take(self) -> bytes:
        events, self._events = b"".join(self._events), []
        return events
