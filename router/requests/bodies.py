"""Bodies of HTTP requests, in OpenAI's shape with vLLM's extensions.

Types are strict. What becomes of fields that are not here says `field_table.py`.
"""

from __future__ import annotations

from typing import Any

from tandem.common.sampling import MAX_LOGPROBS
from tandem.router.asks.constraints import ConstraintFields
from tandem.router.asks.tool_choice import Tool, ToolChoice
from tandem.router.fields.sampling import check_salt, in_range, invalid
from tandem.router.fields.strict import Fields
from tandem.router.fields.truncation import Side
from tandem.router.text.messages import Message

MAX_CHOICES = 64
"""Prompts x n of one request."""
MAX_N = 16


class StreamOptions(Fields):
    include_usage: bool | None = None
    continuous_usage_stats: bool | None = None
    """Usage so far in every event."""


class GenerationBody(ConstraintFields, kw_only=True):
    """What completions and chat share."""

    model: str | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    request_id: str | None = None
    return_token_ids: bool | None = None
    return_tokens_as_token_ids: bool | None = None
    """In log-probabilities tokens are written as `token_id:123`."""
    prompt_logprobs: int | None = None
    echo: bool | None = None
    add_special_tokens: bool | None = None
    truncate_prompt_tokens: int | None = None
    truncation_side: Side | None = None
    best_of: int | None = None

    @property
    def include_usage(self) -> bool:
        return bool(self.stream_options and self.stream_options.include_usage)

    @property
    def continuous_usage(self) -> bool:
        return bool(self.stream_options and self.stream_options.continuous_usage_stats)

    @property
    def fewest_tokens(self) -> int:
        """Nothing need be generated where the answer tells of the prompt."""
        return 0 if self.echo or self.prompt_logprobs is not None else 1

    def check(self) -> None:
        """Raises TandemError `invalid_request` on what is not supported."""
        in_range("n", self.n, 1, MAX_N)
        check_salt(self.cache_salt)
        if self.stream_options is not None and not self.stream:
            raise invalid("stream_options", "is only allowed with stream: true")
        in_range("prompt_logprobs", self.prompt_logprobs, 0, MAX_LOGPROBS)
        if self.stream and self.prompt_logprobs is not None:
            raise invalid("prompt_logprobs", "cannot be had with stream: true")
        if self.best_of is not None and self.best_of != (self.n or 1):
            raise invalid("best_of", "is not supported; leave it out or make it equal to n")


class CompletionBody(GenerationBody, kw_only=True):
    """Body of POST /v1/completions."""

    prompt: str | list[str | int | list[int]]
    logprobs: int | None = None
    context: str | None = None
    """Name of a context (`POST /v1/contexts`), whose tokens go before the prompt's."""

    def check(self) -> None:
        """Raises TandemError `invalid_request` on what is not supported."""
        GenerationBody.check(self)
        in_range("logprobs", self.logprobs, 0, MAX_LOGPROBS)
        if self.context is not None and self.cache_salt:
            raise invalid("cache_salt", "cannot be combined with context, whose KV is cached without one")
        if self.context is not None and self.truncate_prompt_tokens is not None:
            raise invalid("truncate_prompt_tokens", "cannot be combined with context, which would be cut")


class ChatBody(GenerationBody, kw_only=True):
    """Body of POST /v1/chat/completions."""

    messages: list[Message]
    max_completion_tokens: int | None = None
    logprobs: bool | None = None
    top_logprobs: int | None = None
    add_generation_prompt: bool | None = None
    """None: unless the final message is continued."""
    continue_final_message: bool | None = None
    """The model writes on at the end of the last message."""
    chat_template_kwargs: dict[str, Any] | None = None
    documents: list[dict[str, Any]] | None = None
    reasoning_effort: str | None = None
    return_prompt_text: bool | None = None

    tools: list[Tool] | None = None
    tool_choice: ToolChoice | None = None
    parallel_tool_calls: bool | None = None

    @property
    def answer_role(self) -> str:
        """The template has begun an answer of the assistant, or the last message goes on."""
        return "assistant" if self.generation_prompt else self.messages[-1].role

    @property
    def generation_prompt(self) -> bool:
        return not self.continue_final_message if self.add_generation_prompt is None else self.add_generation_prompt

    @property
    def output_limit(self) -> int | None:
        return self.max_tokens if self.max_completion_tokens is None else self.max_completion_tokens

    @property
    def echoed(self) -> str:
        """The text before the answer's own, where the answer goes on with the last message."""
        last = self.messages[-1]
        if not self.echo or last.role != self.answer_role or last.content is None:
            return ""
        return last.content if isinstance(last.content, str) else "\n".join(part.text or "" for part in last.content)

    def check(self) -> None:
        """Raises TandemError `invalid_request` on what is not supported."""
        GenerationBody.check(self)
        if not self.messages:
            raise invalid("messages", "must not be empty")
        if self.continue_final_message and self.add_generation_prompt:
            raise invalid("continue_final_message", "cannot be combined with add_generation_prompt: true")


class ContextBody(Fields):
    """Body of POST /v1/contexts. Exactly one of prompt and messages."""

    name: str
    model: str | None = None
    prompt: str | list[int] | None = None
    messages: list[Message] | None = None
    ttl_s: float = 3600.0
    version: int | None = None


class TokenizeBody(Fields):
    """vLLM's: of a text or of chat messages."""

    model: str | None = None
    prompt: str | None = None
    messages: list[Message] | None = None
    add_special_tokens: bool | None = None
    add_generation_prompt: bool | None = None
    """None: unless the final message is continued."""
    continue_final_message: bool | None = None
    tools: list[Tool] | None = None
    return_token_strs: bool | None = None
    chat_template_kwargs: dict[str, Any] | None = None


class DetokenizeBody(Fields):
    tokens: list[int]
    model: str | None = None
