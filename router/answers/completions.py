"""What /v1/completions answers."""

from __future__ import annotations

from typing import Any

from tandem.proto.worker_pb2 import TokenLogprobs
from tandem.router.answers.logprobs import completion_logprobs, prompt_logprobs
from tandem.router.answers.shapes import CompletionsShapes, usage_object
from tandem.router.calls.choice import Choice, Delta
from tandem.router.calls.generate import Call, Usage
from tandem.router.requests.bodies import CompletionBody
from tandem.router.text.choice_text import joined, prompt_piece, shifted
from tandem.router.text.served_model import Prompt, ServedModel
from tandem.router.web.large_json import encoded_ids


class CompletionShapes(CompletionsShapes):
    """Events and answers of one completions request."""

    def __init__(self, model: ServedModel, body: CompletionBody, request_id: str, call: Call) -> None:
        super().__init__(f"cmpl-{request_id}", "text_completion", model, body, call)
        self._top = body.logprobs
        self._echo = bool(body.echo)
        self._token_ids = bool(body.return_token_ids)
        self._as_ids = bool(body.return_tokens_as_token_ids)
        self._prompt_top = body.prompt_logprobs
        self._skip_special = body.skip_special_tokens is not False
        self._choices = call.choices
        self._decoded: dict[int, str] = {}
        """Texts of prompts that came as token ids."""
        self._opened: set[int] = set()

    def opening(self) -> bytes:
        return b""

    def chunks(self, delta: Delta) -> bytes:
        """Events in OpenAI's form; the first of a choice has the prompt where that is echoed."""
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
        """A `text_completion` object with every choice."""
        choices = [self._choice(delta, True, delta.finish_reason) for _, delta in deltas]
        for shape, (choice, delta) in zip(choices, deltas, strict=True):
            shape["stop_reason"] = delta.stop_reason
            if self._prompt_top is not None:
                shape["prompt_logprobs"] = prompt_logprobs(self.text, choice, self._prompt_top)
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
                choice["prompt_token_ids"] = encoded_ids(prompt.token_ids)
            choice["token_ids"] = encoded_ids(delta.piece.token_ids)
        return choice

    def _logprobs_of(self, delta: Delta, prompt: Prompt, echo: bool) -> dict[str, Any] | None:
        if self._top is None:
            return None
        piece, logprobs = delta.piece, list[TokenLogprobs | None](delta.piece.logprobs)
        if self._echo:
            piece = shifted(piece, len(self._prompt_text(prompt)))
        scored: list[TokenLogprobs | None] = list(self._choices[delta.index].prompt_logprobs)
        if echo and len(scored) == len(prompt.token_ids):
            scored[0] = None
            piece = joined(prompt_piece(self.text, prompt.token_ids, self._prompt_text(prompt)), piece)
            logprobs = scored + logprobs
        return completion_logprobs(self.text, piece, logprobs, self._top, as_ids=self._as_ids)

    def _prompt_text(self, prompt: Prompt) -> str:
        if prompt.text is not None:
            return prompt.text
        if id(prompt) not in self._decoded:
            decoded = self.text.decode(prompt.token_ids, skip_special_tokens=self._skip_special)
            self._decoded[id(prompt)] = decoded
        return self._decoded[id(prompt)]
