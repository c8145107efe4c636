"""POST /v1/completions"""

from __future__ import annotations

from typing import Any

from tandem.proto.worker_pb2 import TokenLogprobs
from tandem.router.choice import Choice, Delta
from tandem.router.completion_request import plan_completion
from tandem.router.generate import Usage
from tandem.router.http_answers import answer
from tandem.router.http_exchange import Exchange
from tandem.router.http_logprobs import completion_logprobs
from tandem.router.http_shapes import Shapes, usage_object
from tandem.router.http_types import CompletionBody
from tandem.router.request_fields import BodyReader
from tandem.router.served_model import Prompt
from tandem.router.service import Service

_READER = BodyReader(CompletionBody)


async def completions(exchange: Exchange, service: Service) -> None:
    body = await exchange.decode(_READER)
    choices = await plan_completion(body, service, exchange.caller)
    with service.call(
        exchange.request_id,
        choices,
        arrived=exchange.arrived,
        traceparent=exchange.traceparent,
        streaming=bool(body.stream),
    ) as call:
        await answer(exchange, call, CompletionShapes(exchange.request_id, service, body, call.choices))


class CompletionShapes(Shapes):
    """Events and answers of one completions request."""

    def __init__(self, request_id: str, service: Service, body: CompletionBody, choices: list[Choice]) -> None:
        super().__init__(f"cmpl-{request_id}", "text_completion", service, include_usage=body.include_usage)
        self._top = body.logprobs
        self._echo = bool(body.echo)
        self._token_ids = bool(body.return_token_ids)
        self._skip_special = body.skip_special_tokens is not False
        self._choices = choices
        self._offsets = [0] * len(choices)
        """Characters of logprob tokens written so far, per choice."""
        self._opened: set[int] = set()

    def opening(self) -> bytes:
        return b""

    def chunks(self, delta: Delta) -> bytes:
        first = delta.index not in self._opened
        self._opened.add(delta.index)
        plain = not delta.piece.token_ids and not (first and (self._echo or self._token_ids))
        events = b""
        if plain:
            if delta.piece.text:
                events = self.text_event(delta.index, b'"text":', delta.piece.text, b"")
        elif delta.piece.text or delta.finish_reason is None or (first and self._echo):
            events = self.event([self._choice(delta, first, None)])
            plain = True
        if delta.finish_reason is not None:
            last = Delta(delta.index, type(delta.piece)()) if plain else delta
            choice = self._choice(last, first and not plain, delta.finish_reason)
            choice["text"] = ""
            choice["stop_reason"] = delta.stop_reason
            if plain:
                choice["logprobs"] = None
            events += self.event([choice])
        return events

    def answer(self, deltas: list[tuple[Choice, Delta]], usage: Usage) -> dict[str, Any]:
        choices = [self._choice(delta, True, delta.finish_reason) for _, delta in deltas]
        for choice, (_, delta) in zip(choices, deltas, strict=True):
            choice["stop_reason"] = delta.stop_reason
        return {**self.head, "choices": choices, "usage": usage_object(usage)}

    def _choice(self, delta: Delta, first: bool, finish_reason: str | None) -> dict[str, Any]:
        prompt = self._choices[delta.index].spec.sequence.prompt
        echo = self._echo and first
        text = self._prompt_text(prompt) + delta.piece.text if echo else delta.piece.text
        choice: dict[str, Any] = {
            "index": delta.index,
            "text": text,
            "logprobs": self._logprobs_of(delta, prompt, echo),
            "finish_reason": finish_reason,
        }
        if self._token_ids:
            if first:
                choice["prompt_token_ids"] = prompt.token_ids
            choice["token_ids"] = delta.piece.token_ids
        return choice

    def _logprobs_of(self, delta: Delta, prompt: Prompt, echo: bool) -> dict[str, Any] | None:
        if self._top is None:
            return None
        token_ids = list(delta.piece.token_ids)
        logprobs: list[TokenLogprobs | None] = list(delta.piece.logprobs)
        if echo:
            scored: list[TokenLogprobs | None] = list(self._choices[delta.index].prompt_logprobs)
            if len(scored) == len(prompt.token_ids):
                scored[0] = None
                token_ids = prompt.token_ids + token_ids
                logprobs = scored + logprobs
        shape = completion_logprobs(self.text, token_ids, logprobs, self._top, self._offsets[delta.index])
        self._offsets[delta.index] += sum(map(len, shape["tokens"]))
        return shape

    def _prompt_text(self, prompt: Prompt) -> str:
        if prompt.text is not None:
            return prompt.text
        return self.text.decode(prompt.token_ids, skip_special_tokens=self._skip_special)
