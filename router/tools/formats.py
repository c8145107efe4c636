"""The forms in which models write tool calls, and how a model's chat template tells which one is its own."""

from __future__ import annotations

import secrets
import string
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from tandem.common.errors import ConfigError
from tandem.router.tools import hermes, llama3, mistral
from tandem.router.tools.events import ToolParser

Rules = Callable[[Sequence[tuple[str, str]], bool, Callable[[str], str]], list[str]]
"""(name and rule of the arguments of each function, whether several calls may be made, how a special token is written)
-> rules of a grammar in Lark, of which `calls` is the answer."""

_LETTERS = string.ascii_letters + string.digits


@dataclass(frozen=True, slots=True)
class ToolFormat:
    """One form of tool calls: how to read it, and how to hold the output to it."""

    name: str
    marks: tuple[str, ...]
    """Tokens that begin or end a tool call; special in some tokenizers."""
    parser: Callable[[frozenset[str]], ToolParser]
    """Takes the names of the functions that the model was told of."""
    rules: Rules
    short_ids: bool = False
    """The template insists on call ids of nine letters and digits."""

    def new_id(self) -> str:
        if self.short_ids:
            return "".join(secrets.choice(_LETTERS) for _ in range(9))
        return f"call_{secrets.token_hex(12)}"


HERMES = ToolFormat("hermes", (hermes.OPEN, hermes.CLOSE), hermes.HermesParser, hermes.hermes_rules)
LLAMA3 = ToolFormat("llama3_json", (llama3.TAG,), llama3.Llama3Parser, llama3.llama3_rules)
MISTRAL = ToolFormat("mistral", (mistral.MARK,), mistral.MistralParser, mistral.mistral_list_rules, short_ids=True)
MISTRAL_NAMED = ToolFormat(
    "mistral_named", (mistral.MARK, mistral.ARGS), mistral.MistralParser, mistral.mistral_named_rules, short_ids=True
)
FORMATS = {kind.name: kind for kind in (HERMES, LLAMA3, MISTRAL, MISTRAL_NAMED)}


def format_named(name: str) -> ToolFormat:
    """Raises ConfigError."""
    if name not in FORMATS:
        raise ConfigError(f"--tool-format {name!r}: there are {', '.join(FORMATS)}")
    return FORMATS[name]


def detect(template: str) -> ToolFormat | None:
    """The form that the template writes for tool calls of earlier turns. None: it knows no tools, or another form."""
    if "tools" not in template:
        return None
    if mistral.MARK in template:
        return MISTRAL_NAMED if mistral.ARGS in template else MISTRAL
    if hermes.OPEN in template:
        return None if "<function=" in template else HERMES  # XML between the same marks: Qwen3-Coder
    if "<|start_header_id|>" in template and "parameters" in template:
        return LLAMA3
    return None
