"""What the output must match: OpenAI's `response_format` and vLLM's guided fields, as one checked `Constraint`.

The worker enforces it by token masks. The router builds it and has it checked with the same library, so that a schema
that cannot be used is a 400 that names the field, and never a failure in mid-stream.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

from tandem.common.errors import TandemError
from tandem.common.sampling import Constraint
from tandem.router.asks.constraint_check import CHECK, Answer, Question
from tandem.router.fields.json_depth import PROBLEM, too_deep
from tandem.router.fields.sampling import SamplingFields, invalid
from tandem.router.fields.strict import Fields
from tandem.router.structured.prepare import WHITESPACE, SchemaOptions
from tandem.router.tenants.caller import Caller
from tandem.router.text.tokenizer import ModelText
from tandem.router.tools.grammar import literal

MAX_CONSTRAINT_CHARACTERS = 128 * 1024
"""Most characters of a schema, expression or grammar. OpenAI's limit on schemas is about the same."""
MAX_CHOICES_LISTED = 1024
ALL_MASKS_S = 0.25
"""Processor time to find what may come next in all answers of a request, on average."""


class JsonSchemaFormat(Fields):
    """`response_format.json_schema`: the schema that the output must match."""

    name: str | None = None
    description: str | None = None
    schema: dict[str, Any] | None = None
    strict: bool | None = None


class ResponseFormat(Fields):
    type: Literal["text", "json_object", "json_schema"]
    json_schema: JsonSchemaFormat | None = None


class StructuredOutputs(Fields):
    """vLLM's. At most one of those that say what the output must be; the others are options of a JSON schema."""

    json: dict[str, Any] | str | None = None
    regex: str | None = None
    choice: list[str] | None = None
    grammar: str | None = None
    json_object: bool | None = None
    disable_any_whitespace: bool | None = None
    disable_additional_properties: bool | None = None
    whitespace_pattern: str | None = None
    structural_tag: Any = None


class ConstraintFields(SamplingFields, kw_only=True):
    """Sampling fields, and those that say what the output must match."""

    response_format: ResponseFormat | None = None
    guided_json: dict[str, Any] | str | None = None
    guided_regex: str | None = None
    guided_choice: list[str] | None = None
    guided_grammar: str | None = None
    guided_whitespace_pattern: str | None = None
    structured_outputs: StructuredOutputs | None = None


@dataclass(frozen=True, slots=True)
class CheckedConstraint:
    """A constraint that the workers' library has accepted."""

    constraint: Constraint
    ignored: tuple[str, ...] = ()
    """Fields that the output is not held to, by their names."""
    expression: str = ""
    """The schema itself as part of a grammar in Lark, together with `rules`."""
    rules: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Asking:
    """Whose constraint it is, and for how much of what model."""

    caller: Caller
    text: ModelText
    answers: int = 1
    """Answers that the request is to have."""


async def constraint_of(fields: ConstraintFields, asking: Asking) -> CheckedConstraint | None:
    """Raises TandemError `invalid_request` where it cannot be used, or where more than one is asked for."""
    found = _found(fields)
    if not found:
        return None
    if len(found) > 1:
        raise invalid(found[1][0], f"cannot be combined with {found[0][0]}; one of them says what the output must be")
    param, constraint = found[0]
    if constraint.kind == "json_schema":
        return await checked_schema(constraint.text, _options(fields), param, asking, place=_PLACES.get(param, param))
    await check(constraint, param, asking)
    return CheckedConstraint(constraint)


async def check(constraint: Constraint, param: str, asking: Asking) -> None:
    """Checks an expression or a grammar. Raises TandemError `invalid_request` naming `param`."""
    await _answer(Question(constraint.kind, constraint.text, str(asking.text.path)), param, asking)


async def checked_schema(
    schema: str, options: SchemaOptions, param: str, asking: Asking, *, prefix: str = "s", place: str = ""
) -> CheckedConstraint:
    """`prefix`: of the names of its rules, in a grammar that holds several. `place`: where in the request the schema
    is; empty: `param`.

    Raises TandemError `invalid_request` naming `param`.
    """
    answer = await _answer(Question("json_schema", schema, str(asking.text.path), options, prefix), param, asking)
    if answer.expression.startswith("%json "):
        constraint = Constraint("json_schema", answer.expression.removeprefix("%json "))
    else:
        constraint = Constraint("lark", "\n".join([f"start: {answer.expression}", *answer.rules]))
    ignored = tuple(f"{place or param}.{at}" for at in answer.ignored)
    return CheckedConstraint(constraint, ignored, answer.expression, answer.rules)


async def _answer(question: Question, param: str, asking: Asking) -> Answer:
    if len(question.text) > MAX_CONSTRAINT_CHARACTERS:
        raise _too_long(param)
    answer = await CHECK.answer(question, asking.caller)
    if answer.problem:
        raise invalid(param, f"cannot be used: {answer.problem}")
    if asking.answers * answer.mask_s > ALL_MASKS_S:
        raise invalid(
            "n",
            f"makes {asking.answers} answers, and to find what may come next with this {param} takes "
            f"{1000 * answer.mask_s:.1f} ms for each token of each; the most is {1000 * ALL_MASKS_S:.0f} ms together: "
            "ask for fewer answers, or use fewer rules that match the same text",
        )
    return answer


_PLACES = {"response_format": "response_format.json_schema.schema"}
"""Places of schemas by field, where errors name the fields around them."""


def _options(fields: ConstraintFields) -> SchemaOptions:
    wanted = fields.response_format and fields.response_format.json_schema
    given = fields.structured_outputs or StructuredOutputs()
    whitespace = fields.guided_whitespace_pattern or given.whitespace_pattern
    if whitespace is None and given.disable_any_whitespace is not None:
        whitespace = "" if given.disable_any_whitespace else WHITESPACE
    return SchemaOptions(
        lenient=not (wanted and wanted.strict),
        closed=given.disable_additional_properties is not False,
        whitespace=whitespace,
    )


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
        if given.structural_tag is not None:
            raise invalid("structured_outputs.structural_tag", "is not supported")
        found += [
            ("structured_outputs.json", _json("structured_outputs.json", given.json)),
            ("structured_outputs.regex", _regex(given.regex)),
            ("structured_outputs.choice", _choice("structured_outputs.choice", given.choice)),
            ("structured_outputs.grammar", _grammar(given.grammar)),
            (
                "structured_outputs.json_object",
                _schema({"type": "object"}, "structured_outputs.json_object") if given.json_object else None,
            ),
        ]
    return [(param, constraint) for param, constraint in found if constraint is not None]


def _response_format(given: ResponseFormat | None) -> Constraint | None:
    if given is None or given.type == "text":
        return None
    if given.type == "json_object":
        return _schema({"type": "object"}, "response_format")
    if given.json_schema is None or given.json_schema.schema is None:
        raise invalid("response_format.json_schema.schema", "is required with type json_schema")
    return _schema(given.json_schema.schema, "response_format.json_schema.schema")


def _json(param: str, given: dict[str, Any] | str | None) -> Constraint | None:
    if not isinstance(given, str):
        return None if given is None else _schema(given, param)
    if len(given) > MAX_CONSTRAINT_CHARACTERS:
        raise _too_long(param)
    try:
        schema = json.loads(given)
    except (ValueError, RecursionError) as error:
        raise invalid(param, f"is not valid JSON: {str(error)[:120]}") from error
    if not isinstance(schema, dict):
        raise invalid(param, "must be a JSON schema, which is an object")
    if too_deep(schema):
        raise invalid(param, PROBLEM)
    return Constraint("json_schema", given)  # as it came: the numbers are exact in it


def _schema(schema: dict[str, Any], param: str) -> Constraint:
    return Constraint("json_schema", schema_text(schema, param))


def schema_text(schema: dict[str, Any], param: str) -> str:
    """Raises TandemError naming `param` where it would be too long, before it is written."""
    left = MAX_CONSTRAINT_CHARACTERS
    parts: list[Any] = [schema]
    while parts:
        part = parts.pop()
        left -= len(part) if isinstance(part, str) else 1
        if left < 0:
            raise _too_long(param)
        if isinstance(part, dict):
            parts += part.keys()
            parts += part.values()
        elif isinstance(part, list):
            parts += part
    return json.dumps(schema, ensure_ascii=False)


def _too_long(param: str) -> TandemError:
    return invalid(param, f"may have at most {MAX_CONSTRAINT_CHARACTERS} characters")


def _regex(given: str | None) -> Constraint | None:
    return None if given is None else Constraint("regex", given)


def _grammar(given: str | None) -> Constraint | None:
    return None if given is None else Constraint("lark", given)


def _choice(param: str, given: Sequence[str] | None) -> Constraint | None:
    if given is None:
        return None
    if not given or len(given) > MAX_CHOICES_LISTED or not all(given):
        raise invalid(param, f"must hold 1 to {MAX_CHOICES_LISTED} strings, none of them empty")
    if sum(map(len, given)) > MAX_CONSTRAINT_CHARACTERS:
        raise _too_long(param)
    return Constraint("lark", "start: " + " | ".join(map(literal, dict.fromkeys(given))))
