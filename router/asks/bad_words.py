"""`bad_words` of a request as sequences of tokens, as vLLM has them: each word at a beginning and after a space."""

from __future__ import annotations

from collections.abc import Sequence

from tandem.router.fields.sampling import invalid
from tandem.router.tenants.caller import Caller
from tandem.router.text.tokenizer import ModelText

MAX_WORDS = 256
MAX_CHARACTERS = 256
"""Most characters of one word."""


async def bad_word_tokens(
    words: Sequence[str] | None, text: ModelText, vocab_size: int, caller: Caller
) -> tuple[tuple[int, ...], ...]:
    """Raises TandemError `invalid_request`.

    A model can still write a word with other tokens than the tokenizer would: only these sequences are forbidden.
    """
    if not words:
        return ()
    if len(words) > MAX_WORDS:
        raise invalid("bad_words", f"may hold at most {MAX_WORDS} words, got {len(words)}")
    spellings: dict[str, None] = {}
    for word in words:
        bare = word.lstrip()
        if not bare or len(word) > MAX_CHARACTERS:
            raise invalid("bad_words", f"must hold words of 1 to {MAX_CHARACTERS} characters that are not all blank")
        spellings |= {bare: None, f" {bare}": None}
    found = map(tuple, await text.encode_all(list(spellings), caller=caller))
    return tuple(dict.fromkeys(token_ids for token_ids in found if token_ids and max(token_ids) < vocab_size))
