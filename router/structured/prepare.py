"""From the schema of a request to what the grammar's library takes, and what of it cannot be held."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

from tandem.router.structured.closing import closed
from tandem.router.structured.finite import without_endless
from tandem.router.structured.keywords import Enforceable, Problem, SchemaError
from tandem.router.structured.numbers import ExactRules, parse
from tandem.router.structured.references import with_definitions

WHITESPACE = r"[ \n\r\t]{0,16}"
"""What may stand between two tokens of JSON, where it is asked for. Bounded: a weak model left alone writes blanks for
ever."""
_OPTIONS: dict[str, type] = {
    "item_separator": str,
    "key_separator": str,
    "whitespace_flexible": bool,
    "whitespace_pattern": str,
    "coerce_one_of": bool,
    "lenient": bool,
    "json_allowed_escapes": str,
    "json_allow_general_unicode_escapes": bool,
}
"""Types of the options in `x-guidance`, the library's own key at the top of a schema."""


@dataclass(frozen=True, slots=True)
class SchemaOptions:
    """How strictly a schema is read."""

    lenient: bool = True
    """Keywords that cannot be enforced are ignored, and named, instead of refused."""
    closed: bool = True
    """Objects have no other keys than those declared, unless the schema says otherwise."""
    whitespace: str | None = None
    """A pattern of what may stand between two tokens of JSON. None: nothing, or what `x-guidance` says."""


@dataclass(frozen=True, slots=True)
class Prepared:
    """A schema as part of a grammar in Lark."""

    expression: str
    """`%json` and a schema, or the name of one of `rules`."""
    rules: tuple[str, ...]
    ignored: tuple[str, ...]
    """Places of keywords that the output is not held to."""


def prepare(text: str, options: SchemaOptions, prefix: str, problem: Problem) -> Prepared:
    """`prefix`: for names of rules, all lower case. Raises SchemaError, ValueError, RecursionError."""
    schema = parse(text)
    if isinstance(schema, bool):
        schema = {} if schema else {"enum": []}
    if not isinstance(schema, dict):
        raise SchemaError("a JSON schema is an object")
    guidance = _guidance(schema.pop("x-guidance", {}), options)
    enforceable = Enforceable(options.lenient or guidance["lenient"], problem)
    schema = closed(without_endless(enforceable.rid(with_definitions(schema))), unless_said=options.closed)
    settings = {**guidance, "lenient": False}
    exact = ExactRules(schema, {**settings, "whitespace_flexible": False, "whitespace_pattern": None}, prefix)
    if not exact.wide(schema):
        content = json.dumps({**schema, "x-guidance": settings}, ensure_ascii=False)
        return Prepared(f"%json {content}", (), tuple(enforceable.ignored))
    if any(key in guidance for key in ("item_separator", "key_separator")):
        raise SchemaError("x-guidance: separators cannot be combined with numbers beyond 2**53")
    expression = exact.expression(schema)
    if not expression:
        raise SchemaError("no value can match it")
    return Prepared(expression, tuple(exact.rules), tuple(enforceable.ignored))


def _guidance(given: Any, options: SchemaOptions) -> dict[str, Any]:
    """The library's options. The request's own fields go before the schema's."""
    if not isinstance(given, dict):
        raise SchemaError("x-guidance must be an object")
    for name, value in given.items():
        if name not in _OPTIONS:
            raise SchemaError(f"x-guidance.{name} is not known; there are {', '.join(_OPTIONS)}")
        if value is not None and not isinstance(value, _OPTIONS[name]):
            raise SchemaError(f"x-guidance.{name} must be a {_OPTIONS[name].__name__}")
    given = {name: value for name, value in given.items() if value is not None}
    if given.get("whitespace_flexible") and "whitespace_pattern" not in given:
        given["whitespace_pattern"] = WHITESPACE
    if options.whitespace is not None:
        given["whitespace_pattern"] = options.whitespace
    return {"whitespace_flexible": False, "coerce_one_of": True, "lenient": False, **given}
