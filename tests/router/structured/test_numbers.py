"""Integers beyond those that a 64-bit float holds are generated as they are, or refused."""

from __future__ import annotations

import json
from typing import Any

import pytest

from tests.router.structured.walks import accepts, lark_of, prepared, walk

ID, NEXT = 2**53 + 1, 2**53 + 2
RECORD = {"type": "object", "properties": {"id": {"enum": [ID, -ID]}, "name": {"type": "string"}}, "required": ["id"]}
INT64 = {"type": "integer", "minimum": -(2**63), "maximum": 2**63 - 1}
PAIR = {"type": "array", "prefixItems": [{"const": ID}, True], "items": False}


@pytest.mark.parametrize(
    ("schema", "good", "bad"),
    [
        ({"const": ID}, [ID], [NEXT, ID - 1]),
        ({"enum": [ID, "x", None]}, [ID, "x", None], [NEXT, "y"]),
        ({"type": "integer", "enum": [ID, "x"]}, [ID], ["x"]),
        ({"const": [1, {"a": ID}]}, [[1, {"a": ID}]], [[1, {"a": NEXT}]]),
        ({"type": "integer", "minimum": ID, "maximum": ID}, [ID], [NEXT, ID - 1]),
        ({"type": "integer", "exclusiveMinimum": ID, "exclusiveMaximum": ID + 2}, [NEXT], [ID, ID + 2]),
        ({"type": "integer", "minimum": ID, "exclusiveMinimum": True}, [NEXT], [ID]),
        (INT64, [-(2**63), 2**63 - 1, 0], [2**63, -(2**63) - 1]),
        ({"type": "integer", "maximum": 2**64 - 1, "minimum": 0}, [2**64 - 1, 0], [2**64, -1]),
        ({"type": "number", "maximum": ID}, [ID, 0.5, -1.25], [NEXT, NEXT + 0.0]),
        ({"type": ["integer", "null"], "minimum": ID}, [ID, None], [1, "x"]),
        ({"minimum": ID}, [ID, "x", None, [], True], [3]),
        (RECORD, [{"id": ID}, {"id": -ID, "name": "a"}], [{"id": NEXT}, {"name": "a"}, {"id": ID, "more": 1}]),
        (RECORD | {"additionalProperties": {"type": "null"}}, [{"id": ID, "z": None}], [{"id": ID, "z": 1}, {"id": 1}]),
        ({"type": "array", "items": {"const": ID}, "minItems": 1, "maxItems": 2}, [[ID], [ID, ID]], [[], [ID] * 3]),
        (PAIR, [[], [ID], [ID, {}]], [[1], [ID, 1, 1]]),
        ({"anyOf": [{"const": ID}, {"type": "string", "maxLength": 1}]}, [ID, "a"], [NEXT, "ab"]),
        (
            {"$defs": {"n": {"type": "object", "properties": {"id": {"const": ID}, "up": {"$ref": "#/$defs/n"}}}},
             "$ref": "#/$defs/n"},
            [{}, {"id": ID, "up": {"id": ID, "up": {}}}],
            [{"up": {"id": NEXT}}],
        ),
    ],
)  # fmt: skip
def test_exactly(schema: Any, good: list[Any], bad: list[Any]) -> None:
    lark = lark_of(prepared(schema))
    for value in good:
        assert accepts(lark, json.dumps(value, separators=(",", ":"))), value
    for value in bad:
        assert not accepts(lark, json.dumps(value, separators=(",", ":"))), value
    for seed in range(3):
        walk(lark, seed)


@pytest.mark.parametrize(
    ("schema", "problem"),
    [
        ('{"const": 1e400}', "too large"),
        ('{"enum": [NaN]}', "NaN"),
        ('{"maximum": -Infinity}', "Infinity"),
        ('{"const": 9007199254740993.5}', "more digits"),
        ('{"const": 1' + "0" * 400 + "}", "too many digits"),
        ('{"type": "integer", "multipleOf": 9007199254740993}', "multipleOf"),
        ('{"type": "integer", "multipleOf": 3, "minimum": 9007199254740993}', "multipleOf"),
        ('{"type": "integer", "minimum": 9007199254740993, "maximum": 9007199254740992}', "no value"),
        ('{"minimum": 9007199254740993, "maximum": [1]}', "maximum must be a number"),
        ('{"enum": {"a": 9007199254740993}}', "enum must be a list"),
        ('{"properties": {"a": {"const": 9007199254740993}}, "patternProperties": {"b": {}}}', "patternProperties"),
    ],
)
def test_what_cannot_be_held_is_refused(schema: str, problem: str) -> None:
    assert problem in prepared(schema)["problem"]


def test_a_float_is_the_number_that_it_was() -> None:
    for text in ("0.1", "1e22", "1e300", "-2.5e-7", "5e-324", "123456789.125"):
        for seed in range(2):
            assert float(walk(lark_of(prepared(f'{{"const": {text}}}')), seed) or "nan") == float(text)
