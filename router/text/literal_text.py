"""Text of clients in a chat is text: what equals a special token, such as `<|im_end|>`, is not that token.

A template joins its own special tokens and the clients' text into one string, so special tokens in that text are hidden
behind names that nobody can guess before it is rendered. In what was rendered the tokens of the template are renamed,
the hidden text comes back, and a copy of the tokenizer that knows special tokens by their new names alone does the rest
as ever. A chat without such text, which is nearly every one, is left as it is.
"""

from __future__ import annotations

import json
import re
import secrets
from collections.abc import Collection
from dataclasses import dataclass, field
from typing import Any

from tokenizers import Tokenizer

from tandem.router.tools.arguments import CutArguments


@dataclass(frozen=True, slots=True)
class RenderedChat:
    text: str
    renamed: str | None = None
    """The same with new names for the special tokens that the template wrote, where there are others in the text."""


@dataclass(slots=True)
class Hidden:
    """What was hidden of one request."""

    special: SpecialNames
    _texts: list[str] = field(default_factory=list)
    _name: str = field(default_factory=lambda: f"hidden{secrets.token_hex(8)}x")

    def hide(self, value: Any) -> Any:
        """A copy of a JSON value."""
        if isinstance(value, str):
            return self._text(value)
        if isinstance(value, dict):
            return {self.hide(key): self.hide(content) for key, content in value.items()}
        if isinstance(value, list):
            return [self.hide(content) for content in value]
        return CutArguments(self.hide(value.text)) if isinstance(value, CutArguments) else value

    def _text(self, text: str) -> str:
        """Also without the beginning of a token at its end, which what follows in the template might complete."""
        if not self.special.may_be_in(text):
            return text
        text = self.special.tokens.sub(lambda found: self._hidden(found.group()), text)
        end = len(text.rstrip())
        start = self.special.start_of_beginning(text, end)
        return text if start == end else text[:start] + self._hidden(text[start:end]) + text[end:]

    def _hidden(self, text: str) -> str:
        self._texts.append(text)
        return f"{self._name}{len(self._texts) - 1}x"

    def shown(self, rendered: str) -> RenderedChat:
        """The rendered text with the hidden text in its place."""
        if not self._texts:
            return RenderedChat(rendered)
        renamed = self.special.tokens.sub(lambda found: self.special.new_name(found.group()), rendered)
        return RenderedChat(self._shown(rendered), self._shown(renamed))

    def _shown(self, rendered: str) -> str:
        return re.sub(f"{self._name}([0-9]+)x", lambda found: self._texts[int(found.group(1))], rendered)


class SpecialNames:
    """Special tokens as texts, and other names for them. Other processes can be given it."""

    def __init__(self, names: Collection[str]) -> None:
        self.names = frozenset(names)
        self._suffix = secrets.token_hex(8)
        self.tokens = _any_of(self.names)
        self._firsts = frozenset(name[0] for name in self.names)
        self._beginnings = {name[:end] for name in self.names for end in range(1, len(name))}
        self._longest = max(map(len, self._beginnings), default=0)

    def may_be_in(self, text: str) -> bool:
        """False for most texts, in no time: neither a token nor the beginning of one is in them."""
        return any(first in text for first in self._firsts)

    def start_of_beginning(self, text: str, end: int) -> int:
        """Where the beginning of a token is that `text[:end]` ends with; `end` where it ends with none."""
        starts = range(max(0, end - self._longest), end)
        return next((start for start in starts if text[start:end] in self._beginnings), end)

    def new_name(self, token: str) -> str:
        return token + self._suffix


class SpecialTokens(SpecialNames):
    """Those of one tokenizer, which are left out when output is decoded."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        added = tokenizer.get_added_tokens_decoder().values()
        super().__init__({token.content for token in added if token.special and token.content})
        self._tokenizer = tokenizer

    def __reduce__(self) -> tuple[Any, ...]:
        """Without the tokenizer."""
        return _names_alone, (self.names, self._suffix)

    def renamed_tokenizer(self) -> Tokenizer:
        """A copy that finds special tokens in a text by their new names."""
        content = json.loads(self._tokenizer.to_str())
        for token in content["added_tokens"]:
            if token["content"] in self.names:
                token["content"] = self.new_name(token["content"])
        model = content["model"]
        vocabulary = model.get("vocab")
        if isinstance(vocabulary, dict):
            model["vocab"] = {self._renamed(token): number for token, number in vocabulary.items()}
        elif isinstance(vocabulary, list):
            model["vocab"] = [[self._renamed(token), *rest] for token, *rest in vocabulary]
        if isinstance(model.get("unk_token"), str):
            model["unk_token"] = self._renamed(model["unk_token"])
        return Tokenizer.from_str(json.dumps(content))

    def _renamed(self, token: str) -> str:
        return self.new_name(token) if token in self.names else token


def _names_alone(names: frozenset[str], suffix: str) -> SpecialNames:
    found = SpecialNames(names)
    found._suffix = suffix
    return found


def _any_of(words: Collection[str]) -> re.Pattern[str]:
    """The longest at a place; matches nothing where there are none."""
    return re.compile("|".join(map(re.escape, sorted(words, key=len, reverse=True))) or r"[^\s\S]")


NOTHING_SPECIAL = SpecialNames(())
