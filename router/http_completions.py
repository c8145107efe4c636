"""POST /v1/completions"""

from __future__ import annotations

from typing import Any

import msgspec

from tandem.common.sampling import Constraint
from tandem.proto.worker_pb2 import TokenLogprobs
from tandem.router.caller import Caller
from tandem.router.choice import Choice, ChoiceSpec, Delta, with_seeds
from tandem.router.constraints import constraint_of
from tandem.router.dispatch import SequenceSpec
from tandem.router.generate import Usage
from tandem.router.http_answers import answer
from tandem.router.http_contexts import recipe
from tandem.router.http_exchange import Exchange
from tandem.router.http_logprobs import completion_logprobs
from tandem.router.http_shapes import Shapes, usage_object
from tandem.router.http_types import MAX_CHOICES, CompletionBody
from tandem.router.sampling_fields import MAX_LOGPROBS, in_range, invalid, output_tokens, sampling_params, stop_strings
from tandem.router.served_model import Prompt
from tandem.router.service import Service

DEFAULT_MAX_TOKENS = 16
"""OpenAI's."""

_DECODER = msgspec.json.Decoder(CompletionBody)


async def completions(exchange: Exchange, service: Service) -> None:
    body = await exchange.decode(_DECODER)
    service.model.check_name(body.model)
    body.check()
    in_range("logprobs", body.logprobs, 0, MAX_LOGPROBS)
    n = body.n or 1
    prompts = await _prompts_after_context(body, service, exchange.caller)
    if len(prompts) * n > MAX_CHOICES:
        raise invalid("prompt", f"x n may make at most {MAX_CHOICES} choices, got {len(prompts) * n}")
    constraint = await constraint_of(body)
    choices: list[ChoiceSpec] = []
    for prompt in prompts:
        choices += with_seeds(_spec(body, prompt, service, exchange.caller, constraint), n)
    with service.call(
        exchange.request_id,
        choices,
        arrived=exchange.arrived,
        traceparent=exchange.traceparent,
        streaming=bool(body.stream),
    ) as call:
        await answer(exchange, call, CompletionShapes(exchange.request_id, service, body, call.choices))


async def _prompts_after_context(body: CompletionBody, service: Service, caller: Caller) -> list[Prompt]:
    if body.context is None:
        return await _prompts(body.prompt, service)
    before = await recipe(service, caller, body.context)
    prompts = await _prompts(body.prompt, service, add_special_tokens=False)  # the context begins the sequence
    return [Prompt([*before, *prompt.token_ids]) for prompt in prompts]


async def _prompts(
    given: str | list[str | int | list[int]], service: Service, *, add_special_tokens: bool = True
) -> list[Prompt]:
    """The four forms: a text, texts, token ids, lists of token ids."""
    model = service.model
    if isinstance(given, str):
        return [await model.text_prompt(given, param="prompt", add_special_tokens=add_special_tokens)]
    if not given:
        raise invalid("prompt", "must not be empty")
    texts = [item for item in given if isinstance(item, str)]
    ids = [item for item in given if isinstance(item, int)]
    lists = [item for item in given if isinstance(item, list)]
    if len(ids) == len(given):
        return [model.token_prompt(ids, param="prompt")]
    if len(given) > MAX_CHOICES:
        raise invalid("prompt", f"may hold at most {MAX_CHOICES} prompts, got {len(given)}")
    if len(texts) == len(given):
        return [
            await model.text_prompt(text, param=f"prompt[{i}]", add_special_tokens=add_special_tokens)
            for i, text in enumerate(texts)
        ]
    if len(lists) == len(given):
        return [model.token_prompt(entry, param=f"prompt[{i}]") for i, entry in enumerate(lists)]
    raise invalid("prompt", "must be a string, strings, token ids, or lists of token ids, not a mixture")


def _spec(
    body: CompletionBody, prompt: Prompt, service: Service, caller: Caller, constraint: Constraint | None
) -> ChoiceSpec:
    score_only = bool(body.echo) and body.max_tokens == 0
    max_tokens = output_tokens(
        1 if score_only else body.max_tokens,
        default=DEFAULT_MAX_TOKENS,
        prompt_tokens=len(prompt.token_ids),
        max_model_len=service.max_model_len,
        param="max_tokens",
        prompt_param="prompt",
    )
    sampling = sampling_params(
        body,
        defaults=service.model.defaults,
        vocab_size=service.model.vocab_size,
        max_tokens=max_tokens,
        logprobs=body.logprobs,
        prompt_logprobs=body.logprobs if body.echo else None,
        constraint=constraint,
    )
    return ChoiceSpec(
        SequenceSpec(prompt, sampling, caller, body.cache_salt or "", caller.priority(body.priority)),
        stop=stop_strings(body),
        include_stop=bool(body.include_stop_str_in_output),
        skip_special_tokens=body.skip_special_tokens is not False,
        keep_tokens=bool(body.return_token_ids) or sampling.logprobs is not None,
        no_output=score_only,
    )


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
