"""Where a text can be cut so that its parts, tokenized one by one, give the token ids of the whole.

A Hugging Face tokenizer first takes its added tokens out of the raw text (leftmost, then longest); normalizer,
pre-tokenizer and model then see one stretch between two of them at a time. A cut before an added token that nothing can
reach across is therefore exact. That holds for a token

- that is found in the raw text (`normalized: false`) wherever it occurs: no such token contains it, or ends with
  what it begins with;
- that takes no white space from before it (`lstrip`) and is not only looked for between words (`single_word`);
- whose first character is neither white space nor part of a word, so that the token before it, with `rstrip` or
  `single_word`, cannot tell it from the end of the text.

Each part but the first starts with such a token, so none but the first is at the start of a text, which is where
Metaspace's `prepend_scheme: first` looks.
"""

from __future__ import annotations

import json
import re
from collections.abc import Collection, Iterator
from itertools import groupby
from os.path import commonprefix
from typing import Any

from tokenizers import Tokenizer
from tokenizers.models import BPE, Unigram, WordLevel, WordPiece

NORMALIZERS = {"BertNormalizer", "ByteLevel", "Lowercase", "NFC", "NFD", "NFKC", "NFKD", "Nmt", "Precompiled"}
NORMALIZERS |= {"Prepend", "Replace", "Strip", "StripAccents"}
PRE_TOKENIZERS = {"BertPreTokenizer", "ByteLevel", "CharDelimiterSplit", "Digits", "FixedLength", "Metaspace"}
PRE_TOKENIZERS |= {"Punctuation", "Split", "UnicodeScripts", "Whitespace", "WhitespaceSplit"}
POST_PROCESSORS = {"BertProcessing", "ByteLevel", "RobertaProcessing", "TemplateProcessing"}
"""Kinds of normalizers, pre-tokenizers and post-processors that are known to look at one stretch, or at offsets
only."""


def cut_pattern(tokenizer: Tokenizer) -> re.Pattern[str] | None:
    """Matches the tokens before which a text may be cut; None where there are none, or where parts might differ from
    the whole. Holds for encoding without special tokens around the text, truncation and padding."""
    safe = _safe_tokens(tokenizer) if parts_stand_alone(tokenizer) else []
    return re.compile(_any_of(safe)) if safe else None


def cut(text: str, pattern: re.Pattern[str]) -> list[str]:
    """The parts, in order; joined, they are the text."""
    starts = [match.start() for match in pattern.finditer(text)]
    if not starts or starts[0]:
        starts.insert(0, 0)
    return [text[start:end] for start, end in zip(starts, [*starts[1:], len(text)], strict=True)]


def parts_stand_alone(tokenizer: Tokenizer) -> bool:
    """Whether the tokenizer treats each stretch between added tokens by itself. False where any of its parts is not
    known to."""
    model = tokenizer.model
    drawn = (isinstance(model, BPE) and model.dropout) or (isinstance(model, Unigram) and model.alpha is not None)
    if drawn or not isinstance(model, BPE | Unigram | WordLevel | WordPiece):
        return False
    for component, known in (
        (tokenizer.normalizer, NORMALIZERS),
        (tokenizer.pre_tokenizer, PRE_TOKENIZERS),
        (tokenizer.post_processor, POST_PROCESSORS),
    ):
        for step in steps(component):
            if step.get("type") not in known:
                return False
            if step["type"] == "TemplateProcessing" and sum("Sequence" in piece for piece in step["single"]) != 1:
                return False  # it would repeat the text
    return True


def steps(component: Any) -> Iterator[dict[str, Any]]:
    """Settings of a tokenizer's component, a sequence taken apart."""
    todo = [] if component is None else [json.loads(component.__getstate__())]
    while todo:
        step = todo.pop(0)
        if step.get("type") == "Sequence":
            todo[:0] = next(value for value in step.values() if isinstance(value, list))
        else:
            yield step


def _safe_tokens(tokenizer: Tokenizer) -> list[str]:
    found = [token for token in tokenizer.get_added_tokens_decoder().values() if not token.normalized and token.content]
    inside = {
        content[start:end]
        for content in (token.content for token in found)
        for start in range(len(content))
        for end in range(start + 1, len(content) + 1)
        if end - start < len(content)
    }
    ends = {token.content[start:] for token in found for start in range(1, len(token.content))}
    return [
        token.content
        for token in found
        if not token.lstrip
        and not token.single_word
        and re.match(r"[^\w\s]", token.content)
        and token.content not in inside
        and not any(token.content[:end] in ends for end in range(1, len(token.content)))
    ]


def _any_of(words: Collection[str]) -> str:
    """A pattern of a trie: some models have thousands of added tokens, and an alternation tries each. No word may be
    the start of another."""
    prefix = commonprefix(list(words))  # noqa: RUF071 - of characters is what is wanted
    rests = sorted({word[len(prefix) :] for word in words})
    if len(rests) == 1:
        return re.escape(prefix + rests[0])
    groups = (list(group) for _, group in groupby(rests, key=lambda rest: rest[0]))
    return f"{re.escape(prefix)}(?:{'|'.join(map(_any_of, groups))})"
