"""Grammars that force an answer to be tool calls, written as the model was trained to write them."""

from __future__ import annotations

import json
from collections.abc import Sequence


def literal(text: str) -> str:
    """A text in a grammar in Lark."""
    return json.dumps(text, ensure_ascii=False)


def json_calls(calls: Sequence[tuple[str, str]], arguments: str) -> str:
    """One JSON object that calls one of the functions. `calls`: name, and the rule that its arguments follow."""
    closing = literal("}")
    openings = [(literal(f'{{"name": "{name}", "{arguments}": '), rule) for name, rule in calls]
    return " | ".join(f"{opening} {rule} {closing}" for opening, rule in openings)
