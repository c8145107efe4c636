"""What the output must match: OpenAI's `response_format` and vLLM's guided fields, as one checked `Constraint`.

The worker enforces it by token masks. The router builds it and has it checked with the same library, so that a schema
that cannot be used is a 400 that names the field, and never a failure in mid-stream.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any, Literal

import msgspec

from tandem.common.sampling import Constraint
from tandem.router.constraint_check import CHECK
from tandem.router.sampling_fields import SamplingFields, invalid
from tandem.router.tools.grammar import literal

MAX_CONSTRAINT_CHARACTERS = 128 * 1024
"""Of a schema, expression or grammar. OpenAI's limit on schemas is about the same."""
MAX_CHOICES_LISTED = 1024

_WHITESPACE = r"[ \n\r\t]{0,16}"
"""Between two tokens of JSON. Bounded: a weak model left alone likes to write blanks for ever."""


class JsonSchemaFormat(msgspec.Struct):
    name: str | None = None
    description: str | None = None
    schema: dict[str, Any] | None = None
    strict: bool | None = None


class ResponseFormat(msgspec.Struct):
    type: Literal["text", "json_object", "json_schema"]
    json_schema: JsonSchemaFormat | None = None


class StructuredOutputs(msgspec.Struct):
    """vLLM's. At most one of them."""

    json: dict[str, Any] | str | None = None
    regex: str | None = None
    choice: list[str] | None = None
    grammar: str | None = None
    json_object: bool | None = None
    whitespace_pattern: Any = None
    structural_tag: Any = None


class ConstraintFields(SamplingFields, kw_only=True):
    """And those that say what the output must match."""

    response_format: ResponseFormat | None = None
    guided_json: dict[str, Any] | str | None = None
    guided_regex: str | None = None
    guided_choice: list[str] | None = None
    guided_grammar: str | None = None
    structured_outputs: StructuredOutputs | None = None


async def constraint_of(fields: ConstraintFields) -> Constraint | None:
    """Raises TandemError `invalid_request` where it cannot be used, or where more than one is asked for."""
    found = _found(fields)
    if not found:
        return None
    if len(found) > 1:
        raise invalid(found[1][0], f"cannot be combined with {found[0][0]}; one of them says what the output must be")
    param, constraint = found[0]
    await check(constraint, param)
    return constraint


async def check(constraint: Constraint, param: str) -> None:
    """Raises TandemError `invalid_request` naming `param`."""
    size = len(constraint.text)
    if size > MAX_CONSTRAINT_CHARACTERS:
        raise invalid(param, f"may have at most {MAX_CONSTRAINT_CHARACTERS} characters, got {size}")
    problem = await CHECK.problem(constraint)
    if problem:
        raise invalid(param, f"cannot be used: {problem}")


def json_constraint(schema: dict[str, Any], *, lenient: bool = False) -> Constraint:
    return Constraint("json_schema", json_schema_text(schema, lenient=lenient))


def json_schema_text(schema: dict[str, Any], *, lenient: bool) -> str:
    """`lenient`: keywords that masks cannot enforce are ignored instead of refused."""
    options = {"whitespace_pattern": _WHITESPACE, "coerce_one_of": True, "lenient": lenient}
    return json.dumps({**schema, "x-guidance": options}, ensure_ascii=False)


def _found(fields: ConstraintFields) -> list[tuple[str, Constraint]]:
    found: list[tuple[str, Constraint | None]] = [
        ("response_format", _response_format(fields.response_format)),
        ("guided_json", _json("guided_json", fields.guided_json)),
        ("guided_regex", _regex(fields.guided_regex)),
        ("guided_choice", _choice("guided_choice", fields.guided_choice)),
        ("guided_grammar", _grammar(fields.guided_grammar)),
    ]
    given = fields.structured_outputs
    if given is not None:
        for name in ("whitespace_pattern", "structural_tag"):
            if getattr(given, name) is not None:
                raise invalid(f"structured_outputs.{name}", "is not supported")
        found += [
            ("structured_outputs.json", _json("structured_outputs.json", given.json)),
            ("structured_outputs.regex", _regex(given.regex)),
            ("structured_outputs.choice", _choice("structured_outputs.choice", given.choice)),
            ("structured_outputs.grammar", _grammar(given.grammar)),
            ("structured_outputs.json_object", json_constraint({"type": "object"}) if given.json_object else None),
        ]
    return [(param, constraint) for param, constraint in found if constraint is not None]


def _response_format(given: ResponseFormat | None) -> Constraint | None:
    if given is None or given.type == "text":
        return None
    if given.type == "json_object":
        return json_constraint({"type": "object"})
    if given.json_schema is None or given.json_schema.schema is None:
        raise invalid("response_format.json_schema.schema", "is required with type json_schema")
    return json_constraint(given.json_schema.schema, lenient=given.json_schema.strict is False)


def _json(param: str, given: dict[str, Any] | str | None) -> Constraint | None:
    if isinstance(given, str):
        try:
            given = json.loads(given)
        except (ValueError, RecursionError) as error:
            raise invalid(param, f"is not valid JSON: {str(error)[:120]}") from error
        if not isinstance(given, dict):
            raise invalid(param, "must be a JSON schema, which is an object")
    return None if given is None else json_constraint(given)


def _regex(given: str | None) -> Constraint | None:
    return None if given is None else Constraint("regex", given)


def _grammar(given: str | None) -> Constraint | None:
    return None if given is None else Constraint("lark", given)


def _choice(param: str, given: Sequence[str] | None) -> Constraint | None:
    if given is None:
        return None
    if not given or not all(given) or len(given) > MAX_CHOICES_LISTED:
        raise invalid(param, f"must hold 1 to {MAX_CHOICES_LISTED} strings, none of them empty")
    return Constraint("lark", "start: " + " | ".join(map(literal, given)))
