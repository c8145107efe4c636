"""Incremental decoding of one choice: text as soon as it is certain, never half a character."""

from __future__ import annotations

from collections.abc import Sequence

from tandem.router.text.tokenizer import ModelText

REPLACEMENT = "\ufffd"
CONTEXT_TOKENS = 6
"""Tokens decoded again with new ones, because a token's text can depend on those before it (leading spaces)."""
WINDOW_TOKENS = 24
MAX_STUCK_TOKENS = 8
"""A character has at most four bytes: after this many tokens without any text the bytes are really broken."""


class Detokenizer:
    """Feeds on token ids; the texts it returns, joined, are the decoded output.

    The window `_ids` is decoded as a whole and what has been returned of it already is cut off. A trailing U+FFFD may
    be the start of a character whose other bytes are still to come, so it is held back until the next token or
    `flush`. The method is that of text-generation-inference and vLLM.
    """

    def __init__(self, text: ModelText, prompt_token_ids: Sequence[int], *, skip_special_tokens: bool = True) -> None:
        self._text = text
        self._skip_special = skip_special_tokens
        self._ids = list(prompt_token_ids[-CONTEXT_TOKENS:])
        decoded = self._decode()
        self._returned = len(decoded.rstrip(REPLACEMENT))
        self._stuck = 0
        self.holding = False
        """Whether the last token has text that is still held back."""

    def feed(self, token_ids: Sequence[int]) -> str:
        """The text that these tokens make certain; may be empty. A broken character is held back for `MAX_STUCK_TOKENS`
        at the most."""
        self._ids += token_ids
        decoded = self._decode()
        certain = len(decoded.rstrip(REPLACEMENT))
        self.holding = certain < len(decoded)
        if certain <= self._returned and self.holding:
            self._stuck += len(token_ids)
            if self._stuck < MAX_STUCK_TOKENS:
                return ""
            certain = len(decoded) - 1
        self._stuck = 0
        new = decoded[self._returned : certain]
        self._returned = max(self._returned, certain)
        if len(self._ids) > WINDOW_TOKENS:
            self._shrink(decoded)
        return new

    def flush(self) -> str:
        """What is left at the end: broken characters stay U+FFFD."""
        if not self.holding:
            return ""
        decoded = self._decode()
        new = decoded[self._returned :]
        self._returned = max(self._returned, len(decoded))
        self.holding = False
        return new

    def hidden_name(self, token_id: int) -> str:
        """Name of a token that the text leaves out; empty where it does not."""
        return self.token_text(token_id) if self._skip_special and self._text.is_special_id(token_id) else ""

    def token_text(self, token_id: int) -> str:
        return self._text.token_text(token_id)

    def _shrink(self, decoded: str) -> None:
        """Forgets old tokens where the text does not change by it: not in the middle of a character's bytes."""
        for kept in range(CONTEXT_TOKENS, CONTEXT_TOKENS + MAX_STUCK_TOKENS):
            ending = self._text.decode(self._ids[-kept:], skip_special_tokens=self._skip_special)
            if decoded.endswith(ending) or (len(self._ids) > 4 * WINDOW_TOKENS):
                held = len(decoded) - self._returned
                self._ids = self._ids[-kept:]
                self._returned = max(0, len(ending) - held)
                return

    def _decode(self) -> str:
        return self._text.decode(self._ids, skip_special_tokens=self._skip_special)
