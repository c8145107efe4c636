"""Output that a model without sense would write under a constraint, token by token, through the real matcher."""

from __future__ import annotations

import json
import random
from functools import cache
from pathlib import Path
from typing import Any

from llguidance import LLMatcher, LLTokenizer
from tokenizers import Tokenizer

from tandem.router.asks.constraint_process import answered

FOLDER = Path(__file__).resolve().parents[3] / "examples/small_model/model"
TOKENIZER = str(FOLDER / "tokenizer.json")
SHORT = 60
"""After so many tokens it tries to come to an end."""
ENDINGS = ('"', "}", "]", '"}', "}}", '"]', ",", ":", '",', '":')


def prepared(
    schema: Any, *, lenient: bool = True, closed: bool = True, whitespace: str | None = None
) -> dict[str, Any]:
    """What the checking process answers."""
    text = schema if isinstance(schema, str) else json.dumps(schema)
    options = {"lenient": lenient, "closed": closed, "whitespace": whitespace}
    return answered({"kind": "json_schema", "text": text, "options": options, "prefix": "s", "tokenizer": TOKENIZER})


def lark_of(answer: dict[str, Any]) -> str:
    assert not answer["problem"], answer["problem"]
    return "\n".join([f"start: {answer['expression']}", *answer["rules"], '%llguidance {"no_forcing": true}'])


@cache
def vocabulary() -> tuple[LLTokenizer, Tokenizer]:
    return LLTokenizer(TOKENIZER), Tokenizer.from_file(TOKENIZER)


@cache
def endings() -> frozenset[int]:
    return frozenset(vocabulary()[1].token_to_id(text) for text in ENDINGS) - {None}


def matcher(lark: str) -> LLMatcher:
    found = LLMatcher(vocabulary()[0], LLMatcher.grammar_from_lark(lark), log_level=0)
    assert not found.is_error(), found.get_error()
    return found


def walk(lark: str, seed: int, most: int = 600) -> str | None:
    """A whole text; None where it did not come to an end. Fails where it cannot go on."""
    draw, one = random.Random(seed), matcher(lark)
    tokens: list[int] = []
    ends = set(vocabulary()[0].eos_tokens)
    while len(tokens) < most:
        if one.is_stopped():
            return str(vocabulary()[1].decode(tokens))
        mask = one.compute_bitmask()
        assert not one.is_error(), one.get_error()
        allowed = [8 * place + bit for place, bits in enumerate(mask) if bits for bit in range(8) if bits >> bit & 1]
        assert allowed
        if ends & set(allowed) and (len(tokens) > SHORT or draw.random() < 0.5 or ends >= set(allowed)):
            return str(vocabulary()[1].decode(tokens))
        allowed = [token for token in allowed if token not in ends]
        if len(tokens) > SHORT:
            allowed = [token for token in allowed if token in endings()] or allowed
        tokens.append(draw.choice(allowed))
        one.consume_token(tokens[-1])
        assert not one.is_error(), one.get_error()
    return None


def accepts(lark: str, text: str) -> bool:
    one = matcher(lark)
    ids = vocabulary()[1].encode(text, add_special_tokens=False).ids
    return one.try_consume_tokens(ids) == len(ids) and one.is_accepting()
