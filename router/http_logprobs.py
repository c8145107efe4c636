"""Log probabilities in the two shapes of OpenAI's API."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from tandem.proto.worker_pb2 import TokenLogprobs
from tandem.router.tokenizer import ModelText

LOWEST = -9999.0
"""Stands for minus infinity, which JSON cannot write; vLLM uses it too."""


def chat_logprobs(
    text: ModelText, token_ids: Sequence[int], logprobs: Sequence[TokenLogprobs], top: int
) -> dict[str, Any]:
    """`top`: alternatives to list for each token."""

    def entry(token_id: int, logprob: float) -> dict[str, Any]:
        raw = text.token_bytes(token_id)
        return {
            "token": raw.decode("utf-8", errors="replace"),
            "logprob": max(logprob, LOWEST),
            "bytes": list(raw),
        }

    content = [
        {
            **entry(token_id, token.logprob),
            "top_logprobs": [
                entry(other, value) for other, value in zip(token.top_ids[:top], token.top_logprobs[:top], strict=True)
            ],
        }
        for token_id, token in zip(token_ids, logprobs, strict=True)
    ]
    return {"content": content, "refusal": None}


def completion_logprobs(
    text: ModelText, token_ids: Sequence[int], logprobs: Sequence[TokenLogprobs | None], top: int, offset: int
) -> dict[str, Any]:
    """`offset`: characters of the choice's text before the first of these tokens. None: the first token of a prompt."""
    tokens = [text.token_text(token_id) for token_id in token_ids]
    offsets: list[int] = []
    for token in tokens:
        offsets.append(offset)
        offset += len(token)
    values: list[float | None] = []
    tops: list[dict[str, float] | None] = []
    for token_text, entry in zip(tokens, logprobs, strict=True):
        if entry is None:
            values.append(None)
            tops.append(None)
            continue
        values.append(max(entry.logprob, LOWEST))
        alternatives: dict[str, float] = {}
        for other, value in zip(entry.top_ids[:top], entry.top_logprobs[:top], strict=True):
            alternatives.setdefault(text.token_text(other), max(value, LOWEST))
        alternatives.setdefault(token_text, max(entry.logprob, LOWEST))
        tops.append(alternatives)
    return {"text_offset": offsets, "token_logprobs": values, "tokens": tokens, "top_logprobs": tops}
