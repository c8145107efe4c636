"""`truncate_prompt_tokens`: prompts that are too long are cut instead of refused."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, TypeVar

from tandem.router.fields.sampling import invalid, shown

Side = Literal["left", "right"]
T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Truncation:
    """How a prompt that is too long is cut."""

    keep: int
    """Tokens, special ones included."""
    side: Side
    """Where the cut is: `left` keeps the end of the prompt."""

    def cut(self, token_ids: list[T], keep: int | None = None) -> list[T]:
        keep = self.keep if keep is None else keep
        return token_ids[-keep:] if self.side == "left" else token_ids[:keep]


def truncation_of(
    asked: int | None, side: Side | None, *, output_tokens: int | None, max_model_len: int, default: Side = "left"
) -> Truncation | None:
    """`asked` -1: as many tokens as the model can read and leave room for `output_tokens`, as in vLLM.

    Raises TandemError `invalid_request`.
    """
    if asked is None:
        if side is not None:
            raise invalid("truncation_side", "needs truncate_prompt_tokens")
        return None
    if not (asked == -1 or 1 <= asked <= max_model_len):
        problem = f"must be -1 or between 1 and the context of {max_model_len} tokens, got {shown(asked)}"
        raise invalid("truncate_prompt_tokens", problem)
    room = max(1, max_model_len - (1 if output_tokens is None else output_tokens))
    return Truncation(room if asked == -1 else asked, side or default)
