"""Log probabilities in the two shapes of OpenAI's API."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from tandem.proto.worker_pb2 import TokenLogprobs
from tandem.router.calls.choice import Choice
from tandem.router.text.choice_text import Piece
from tandem.router.text.tokenizer import ModelText
from tandem.router.web import large_json
from tandem.router.web.large_json import LongList, encoded_list

LOWEST = -9999.0
"""Stands for minus infinity, which JSON cannot write; vLLM uses it too."""
MANY = 4096
"""Short entries that are written at once."""


def chat_logprobs(
    text: ModelText, token_ids: Sequence[int], logprobs: Sequence[TokenLogprobs], top: int, *, as_ids: bool = False
) -> dict[str, Any]:
    """`top`: alternatives to list for each token. `as_ids`: tokens are written as `token_id:123`."""
    return {
        "content": encoded_list(chat_entries(text, token_ids, logprobs, top, as_ids=as_ids), _tokens_at_once(top)),
        "refusal": None,
    }


def chat_entries(
    text: ModelText, token_ids: Sequence[int], logprobs: Sequence[TokenLogprobs], top: int, *, as_ids: bool = False
) -> Iterator[dict[str, Any]]:
    """One for each token."""

    def entry(token_id: int, logprob: float) -> dict[str, Any]:
        """One token with its log probability (not below `LOWEST`) and its bytes."""
        raw = text.token_bytes(token_id)
        return {
            "token": as_id(token_id) if as_ids else raw.decode("utf-8", errors="replace"),
            "logprob": max(logprob, LOWEST),
            "bytes": list(raw),
        }

    for token_id, token in zip(token_ids, logprobs, strict=True):
        yield {
            **entry(token_id, token.logprob),
            "top_logprobs": [
                entry(other, value) for other, value in zip(token.top_ids[:top], token.top_logprobs[:top], strict=True)
            ],
        }


def completion_logprobs(
    text: ModelText, piece: Piece, logprobs: Sequence[TokenLogprobs | None], top: int, *, as_ids: bool = False
) -> dict[str, Any]:
    """Log-probabilities of the tokens of `piece`. None in `logprobs`: the first token of a prompt."""

    def name(token_id: int) -> str:
        return as_id(token_id) if as_ids else text.token_text(token_id)

    tokens = list(map(as_id, piece.token_ids)) if as_ids else piece.token_texts

    def tops() -> Iterator[dict[str, float] | None]:
        """Log probabilities by text for each output token: the `top` likeliest and the token itself. None where it has
        none."""
        for token, entry in zip(tokens, logprobs, strict=True):
            if entry is None:
                yield None
                continue
            alternatives: dict[str, float] = {}
            for other, value in zip(entry.top_ids[:top], entry.top_logprobs[:top], strict=True):
                alternatives.setdefault(name(other), max(value, LOWEST))
            alternatives.setdefault(token, max(entry.logprob, LOWEST))
            yield alternatives

    values = [None if entry is None else max(entry.logprob, LOWEST) for entry in logprobs]
    return {
        "text_offset": encoded_list(piece.offsets, MANY),
        "token_logprobs": encoded_list(values, MANY),
        "tokens": encoded_list(tokens, MANY),
        "top_logprobs": encoded_list(tops()),
    }


def prompt_logprobs(text: ModelText, choice: Choice, top: int) -> LongList:
    """What was likely at each token of the prompt, by id, in vLLM's shape; null for the first token."""

    def entry(token_id: int, logprob: float, rank: int) -> dict[str, Any]:
        return {"logprob": max(logprob, LOWEST), "rank": rank, "decoded_token": text.token_text(token_id)}

    def scored() -> Iterator[dict[str, dict[str, Any]] | None]:
        """Entries by token id for each prompt token; None for the first, which nothing precedes."""
        yield None
        for token_id, token in zip(choice.spec.sequence.prompt.token_ids[1:], choice.prompt_logprobs[1:], strict=True):
            listed = {str(token_id): entry(token_id, token.logprob, token.rank)}
            for place, (other, value) in enumerate(zip(token.top_ids[:top], token.top_logprobs[:top], strict=True)):
                listed.setdefault(str(other), entry(other, value, place + 1))
            yield listed

    return encoded_list(scored(), _tokens_at_once(top))


def _tokens_at_once(top: int) -> int:
    """Tokens whose entries, with those of their alternatives, are ENTRIES_AT_ONCE objects; each entry is two."""
    return max(1, large_json.ENTRIES_AT_ONCE // (2 * (1 + top)))


def as_id(token_id: int) -> str:
    return f"token_id:{token_id}"
