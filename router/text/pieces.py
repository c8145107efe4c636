"""Long texts in pieces whose token ids, one after the other, are those of the whole.

A thread that tokenizes a megabyte is gone for a second, and takes 150 MB. Where a pre-tokenizer never joins a blank to
what is before it, a text may be cut before a blank that stands alone between two words: what is before the cut ends
where a word ends anyway, and what is behind it begins as it would in the whole. That holds for the kinds below. For
others, or in text without blanks, a piece is as long as it has to be.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

from tokenizers import Tokenizer

from tandem.router.text.cuts import parts_stand_alone, steps

PIECE_CHARACTERS = 16 * 1024
"""About 5 ms of a thread."""

_BETWEEN_WORDS = re.compile(r"\S(?= \S)")
_NORMALIZERS = {"NFC", "NFD", "NFKC", "NFKD", "Lowercase", "BertNormalizer"}
"""They change characters, whatever is around them."""
_SPLITTERS = {"BertPreTokenizer", "Whitespace", "WhitespaceSplit"}
_CONTRACTIONS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_CASED = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+CONTRACTION|"
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*CONTRACTION|"
    r"DIGITS| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_UNCASED = _CONTRACTIONS + r"|[^\r\n\p{L}\p{N}]?\p{L}+|DIGITS| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_PATTERNS = frozenset(
    pattern.replace("CONTRACTION", contraction).replace("DIGITS", digits)
    for pattern in (_CASED, _UNCASED)
    for contraction in ("", _CONTRACTIONS + "?")
    for digits in (r"\p{N}", r"\p{N}{1,3}", r"\p{N}+")
) | {r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"}
"""Patterns of GPT-2, Llama 3, Qwen, GPT-4o, Mistral's Tekken and their like."""


def piece_pattern(tokenizer: Tokenizer) -> re.Pattern[str] | None:
    """Matches the character before a cut. None where pieces might differ from the whole."""
    if not parts_stand_alone(tokenizer):
        return None
    if any(step.get("type") not in _NORMALIZERS for step in steps(tokenizer.normalizer)):
        return None
    first = next(steps(tokenizer.pre_tokenizer), {})
    if not _splits_at_blanks(first):
        return None
    for token in tokenizer.get_added_tokens_decoder().values():
        if token.lstrip or token.rstrip or re.search(r"\S\s+\S", token.content):
            return None
    return _BETWEEN_WORDS


def pieces(text: str, pattern: re.Pattern[str] | None) -> Iterator[str]:
    """The text in order, each piece as long as it takes to find a place where it may end."""
    start = 0
    while pattern is not None and len(text) - start > PIECE_CHARACTERS:
        cut = _cut(text, start, pattern)
        yield text[start:cut]
        start = cut
    if start < len(text) or not text:
        yield text[start:]


def _cut(text: str, start: int, pattern: re.Pattern[str]) -> int:
    at = start + PIECE_CHARACTERS * 3 // 4
    while at < len(text):
        found = pattern.search(text, at, at + PIECE_CHARACTERS)
        if found is not None:
            return found.end()
        at += PIECE_CHARACTERS - 2  # a match has two characters behind it
    return len(text)


def _splits_at_blanks(step: dict[str, Any]) -> bool:
    match step.get("type"):
        case "ByteLevel":
            return bool(step.get("use_regex", True))
        case "Metaspace":
            return bool(step.get("split", True))
        case "Split":
            known = step.get("pattern", {}).get("Regex") in _PATTERNS
            return known and step.get("behavior") == "Isolated" and not step.get("invert")
        case kind:
            return kind in _SPLITTERS
