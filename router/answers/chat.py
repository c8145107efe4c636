"""What /v1/chat/completions answers."""

from __future__ import annotations

from typing import Any

from tandem.router.answers.logprobs import chat_logprobs, prompt_logprobs
from tandem.router.answers.shapes import CompletionsShapes, usage_object
from tandem.router.calls.choice import Choice, Delta
from tandem.router.calls.generate import Call, Usage
from tandem.router.requests.bodies import ChatBody
from tandem.router.requests.chat import AskedChat
from tandem.router.text.served_model import ServedModel
from tandem.router.tools.events import CallArguments, CallStart, Event, Text, collect
from tandem.router.web.large_json import encoded_ids


class ChatShapes(CompletionsShapes):
    """Events and answers of one chat request."""

    def __init__(
        self,
        model: ServedModel,
        body: ChatBody,
        asked: AskedChat,
        prompt_text: str | None,
        request_id: str,
        call: Call,
    ) -> None:
        """`prompt_text`: to be told of in the answer."""
        super().__init__(f"chatcmpl-{request_id}", "chat.completion", model, body, call)
        self._num_choices = body.n or 1
        self._role = body.answer_role
        self._echoed = body.echoed
        self._top = body.top_logprobs or 0
        self._as_ids = bool(body.return_tokens_as_token_ids)
        self._prompt_top = body.prompt_logprobs
        self._logprobs = bool(body.logprobs)
        self._token_ids = bool(body.return_token_ids)
        prompt = asked.spec.sequence.prompt
        self._of_prompt: dict[str, Any] = {"prompt_token_ids": encoded_ids(prompt.token_ids)} if self._token_ids else {}
        if prompt_text is not None:
            self._of_prompt["prompt_text"] = prompt_text
        self._tools = asked.tools
        self._parsers = [asked.tools.parser() for _ in range(self._num_choices)] if asked.tools else []
        self._called: set[int] = set()
        """Choices that have called a function."""

    def opening(self) -> bytes:
        """One event for each choice with its role, and with the text that it goes on from."""
        events: list[bytes] = []
        for index in range(self._num_choices):
            choice: dict[str, Any] = {
                "index": index,
                "delta": {"role": self._role, "content": self._echoed},
                "logprobs": None,
                "finish_reason": None,
            }
            events.append(self.event([choice], **self._of_prompt))
        return b"".join(events)

    def chunks(self, delta: Delta) -> bytes:
        """Events in OpenAI's form: text as it comes, and the finish reason in an event of its own."""
        if self._tools is not None:
            return self._chunks_with_tools(delta)
        events = b""
        detailed = bool(delta.piece.token_ids)
        if delta.piece.text and not detailed:
            events = self.text_event(delta.index, b'"delta":{"content":', delta.piece.text, b"}")
        elif delta.piece.text or (detailed and delta.finish_reason is None):
            events = self.event([self._detailed(delta, {"content": delta.piece.text}, None)])
            detailed = False
        if delta.finish_reason is not None:
            if detailed:  # tokens without text: end of sequence
                choice = self._detailed(delta, {}, delta.finish_reason)
            else:
                choice = {"index": delta.index, "delta": {}, "logprobs": None, "finish_reason": delta.finish_reason}
            choice["stop_reason"] = delta.stop_reason
            events += self.event([choice])
        return events

    def _chunks_with_tools(self, delta: Delta) -> bytes:
        """Events: at most one for what is new, then one for the end."""
        parts = self._parsed(delta)
        content = self._delta_of(parts)
        events = b""
        if content or delta.piece.token_ids:
            events = self.event([self._detailed(delta, content, None)])
        if delta.finish_reason is not None:
            choice = {"index": delta.index, "delta": {}, "logprobs": None, "finish_reason": self._finish(delta)}
            choice["stop_reason"] = delta.stop_reason
            events += self.event([choice])
        return events

    def answer(self, deltas: list[tuple[Choice, Delta]], usage: Usage) -> dict[str, Any]:
        """A `chat.completion` object with every choice."""
        choices: list[dict[str, Any]] = []
        for _, delta in deltas:
            choice: dict[str, Any] = {
                "index": delta.index,
                "message": self._message(delta),
                "logprobs": self._logprobs_of(delta),
                "finish_reason": self._finish(delta),
                "stop_reason": delta.stop_reason,
            }
            if self._token_ids:
                choice["token_ids"] = encoded_ids(delta.piece.token_ids)
            choices.append(choice)
        extra = dict(self._of_prompt)
        if self._prompt_top is not None:
            extra["prompt_logprobs"] = prompt_logprobs(self.text, deltas[0][0], self._prompt_top)
        return {**self.head, "choices": choices, "usage": usage_object(usage), **extra}

    def _message(self, delta: Delta) -> dict[str, Any]:
        message: dict[str, Any] = {"role": self._role, "content": self._echoed + delta.piece.text, "refusal": None}
        if self._tools is not None:
            text, calls = collect(self._parsed(delta))
            if calls:
                message["content"] = self._echoed + text or None
                message["tool_calls"] = [
                    {
                        "id": self._tools.format.new_id(),
                        "type": "function",
                        "function": {"name": call.name, "arguments": call.arguments},
                    }
                    for call in calls
                ]
        return message

    def _parsed(self, delta: Delta) -> list[Event]:
        parser = self._parsers[delta.index]
        events = parser.feed(delta.piece.text)
        if delta.finish_reason is not None:
            events += parser.finish()
        if any(isinstance(event, CallStart) for event in events):
            self._called.add(delta.index)
        return events

    def _delta_of(self, events: list[Event]) -> dict[str, Any]:
        """One delta: its text, and what is new of each tool call."""
        assert self._tools is not None
        texts: list[str] = []
        calls: dict[int, dict[str, Any]] = {}
        for event in events:
            match event:
                case Text(text):
                    texts.append(text)
                case CallStart(index, name):
                    function = {"name": name, "arguments": ""}
                    call_id = self._tools.format.new_id()
                    calls[index] = {"index": index, "id": call_id, "type": "function", "function": function}
                case CallArguments(index, text):
                    call = calls.setdefault(index, {"index": index, "function": {"arguments": ""}})
                    call["function"]["arguments"] += text
        delta: dict[str, Any] = {"content": "".join(texts)} if texts else {}
        if calls:
            delta["tool_calls"] = list(calls.values())
        return delta

    def _finish(self, delta: Delta) -> str | None:
        called = delta.finish_reason == "stop" and delta.index in self._called
        return "tool_calls" if called else delta.finish_reason

    def _detailed(self, delta: Delta, content: dict[str, Any], finish_reason: str | None) -> dict[str, Any]:
        choice: dict[str, Any] = {
            "index": delta.index,
            "delta": content,
            "logprobs": self._logprobs_of(delta),
            "finish_reason": finish_reason,
        }
        if self._token_ids:
            choice["token_ids"] = delta.piece.token_ids
        return choice

    def _logprobs_of(self, delta: Delta) -> dict[str, Any] | None:
        if not self._logprobs:
            return None
        return chat_logprobs(self.text, delta.piece.token_ids, delta.piece.logprobs, self._top, as_ids=self._as_ids)
