"""POST /v1/chat/completions"""

from __future__ import annotations

from typing import Any

import msgspec

from tandem.common.errors import TandemError
from tandem.router.choice import Choice, ChoiceSpec, Delta, with_seeds
from tandem.router.dispatch import SequenceSpec
from tandem.router.generate import Usage
from tandem.router.http_answers import answer
from tandem.router.http_exchange import Exchange
from tandem.router.http_logprobs import chat_logprobs
from tandem.router.http_shapes import Shapes, usage_object
from tandem.router.http_types import ChatBody
from tandem.router.sampling_fields import MAX_LOGPROBS, in_range, invalid, output_tokens, sampling_params, stop_strings
from tandem.router.service import Service

_DECODER = msgspec.json.Decoder(ChatBody)


async def chat_completions(exchange: Exchange, service: Service) -> None:
    body = await exchange.decode(_DECODER)
    service.model.check_name(body.model)
    body.check()
    text = service.model.render_chat(
        body.template_messages(),
        add_generation_prompt=body.add_generation_prompt,
        **_template_variables(body.chat_template_kwargs),
    )
    prompt = await service.model.text_prompt(text, param="messages", add_special_tokens=False)
    completion_param = "max_tokens" if body.max_completion_tokens is None else "max_completion_tokens"
    max_tokens = output_tokens(
        body.max_tokens if body.max_completion_tokens is None else body.max_completion_tokens,
        default=None,
        prompt_tokens=len(prompt.token_ids),
        max_model_len=service.max_model_len,
        param=completion_param,
        prompt_param="messages",
    )
    sampling = sampling_params(
        body,
        defaults=service.model.defaults,
        vocab_size=service.model.vocab_size,
        max_tokens=max_tokens,
        logprobs=_logprobs(body),
    )
    spec = ChoiceSpec(
        SequenceSpec(prompt, sampling, exchange.caller, body.cache_salt or "", body.priority or 0),
        stop=stop_strings(body),
        include_stop=bool(body.include_stop_str_in_output),
        skip_special_tokens=body.skip_special_tokens is not False,
        keep_tokens=bool(body.return_token_ids) or sampling.logprobs is not None,
    )
    choices = with_seeds(spec, body.n or 1)
    with service.call(
        exchange.request_id,
        choices,
        arrived=exchange.arrived,
        traceparent=exchange.traceparent,
        streaming=bool(body.stream),
    ) as call:
        await answer(exchange, call, ChatShapes(exchange.request_id, service, body, spec))


def _logprobs(body: ChatBody) -> int | None:
    in_range("top_logprobs", body.top_logprobs, 0, MAX_LOGPROBS)
    if not body.logprobs:
        if body.top_logprobs:
            raise invalid("top_logprobs", "needs logprobs: true")
        return None
    return body.top_logprobs or 0


def _template_variables(variables: dict[str, Any] | None) -> dict[str, Any]:
    for name in ("messages", "add_generation_prompt", "self"):
        if variables and name in variables:
            raise TandemError(
                "invalid_request", f"chat_template_kwargs must not set {name}", param="chat_template_kwargs"
            )
    return variables or {}


class ChatShapes(Shapes):
    """Events and answers of one chat request."""

    def __init__(self, request_id: str, service: Service, body: ChatBody, spec: ChoiceSpec) -> None:
        super().__init__(f"chatcmpl-{request_id}", "chat.completion", service, include_usage=body.include_usage)
        self._num_choices = body.n or 1
        self._top = body.top_logprobs or 0
        self._logprobs = bool(body.logprobs)
        self._token_ids = bool(body.return_token_ids)
        self._prompt_ids = spec.sequence.prompt.token_ids

    def opening(self) -> bytes:
        events: list[bytes] = []
        for index in range(self._num_choices):
            choice: dict[str, Any] = {
                "index": index,
                "delta": {"role": "assistant", "content": ""},
                "logprobs": None,
                "finish_reason": None,
            }
            extra = {"prompt_token_ids": self._prompt_ids} if self._token_ids else {}
            events.append(self.event([choice], **extra))
        return b"".join(events)

    def chunks(self, delta: Delta) -> bytes:
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

    def answer(self, deltas: list[tuple[Choice, Delta]], usage: Usage) -> dict[str, Any]:
        choices: list[dict[str, Any]] = []
        for _, delta in deltas:
            choice: dict[str, Any] = {
                "index": delta.index,
                "message": {"role": "assistant", "content": delta.piece.text, "refusal": None},
                "logprobs": self._logprobs_of(delta),
                "finish_reason": delta.finish_reason,
                "stop_reason": delta.stop_reason,
            }
            if self._token_ids:
                choice["token_ids"] = delta.piece.token_ids
            choices.append(choice)
        extra = {"prompt_token_ids": self._prompt_ids} if self._token_ids else {}
        return {**self.head, "choices": choices, "usage": usage_object(usage), **extra}

    def _detailed(self, delta: Delta, content: dict[str, str], finish_reason: str | None) -> dict[str, Any]:
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
        return chat_logprobs(self.text, delta.piece.token_ids, delta.piece.logprobs, self._top)
