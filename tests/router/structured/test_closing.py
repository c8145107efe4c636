"""Objects have the keys that are declared for them, wherever they are declared, unless the schema says otherwise."""

from __future__ import annotations

import json
from typing import Any

import pytest

from tests.router.structured.walks import accepts, lark_of, prepared

A: dict[str, Any] = {"properties": {"a": {"type": "null"}}, "required": ["a"]}
B: dict[str, Any] = {"properties": {"b": {"type": "null"}}, "required": ["b"]}
OBJECT = {"type": "object"}
ONE, BOTH, MORE = {"a": None}, {"a": None, "b": None}, {"a": None, "b": None, "c": 1}


@pytest.mark.parametrize(
    ("schema", "good", "bad"),
    [
        (OBJECT | A, [ONE], [BOTH, {}]),
        (OBJECT | A | {"additionalProperties": True}, [ONE, BOTH, MORE], [{}]),
        (OBJECT | A | {"additionalProperties": {"type": "integer"}}, [ONE, {"a": None, "c": 1}], [BOTH]),
        (OBJECT | A | {"unevaluatedProperties": False}, [ONE], [BOTH]),
        (OBJECT | A | {"unevaluatedProperties": {"type": "integer"}}, [{"a": None, "c": 1}], [BOTH]),
        (OBJECT | {"properties": {}}, [{}], [ONE]),
        (OBJECT | {"properties": {"x": A}}, [{"x": ONE}], [{"x": BOTH}, {"x": ONE, "c": 1}]),
        ({"type": "array", "items": A | OBJECT}, [[ONE]], [[BOTH]]),
        (OBJECT | {"patternProperties": {"^a": {"type": "null"}}}, [ONE, {}], [{"c": 1}]),
        (OBJECT | {"properties": {"b": {"type": "null"}}, "required": ["a", "b"]}, [{"b": None, "a": 1}], [ONE]),
        (OBJECT | {"allOf": [A, B]}, [BOTH], [ONE, MORE]),
        (OBJECT | {"allOf": [A], **B}, [BOTH], [ONE, MORE]),
        (OBJECT | {"allOf": [A, B | {"additionalProperties": True}]}, [BOTH, MORE], [ONE]),
        ({"$ref": "#/$defs/a", **B, "$defs": {"a": A | OBJECT}}, [BOTH], [{"b": None}, ONE, MORE]),
        ({"$ref": "#/$defs/a", "$defs": {"a": A | OBJECT}}, [ONE], [BOTH]),
        ({"allOf": [{"$ref": "#/$defs/a"}], "title": "A", "$defs": {"a": A | OBJECT}}, [ONE], [BOTH]),
        (OBJECT | {"anyOf": [A, B]}, [ONE, {"b": None}], [BOTH, {}]),
        (OBJECT | {"properties": {"k": {"const": 1}}, "required": ["k"], "oneOf": [A, B]},
         [{"k": 1, "a": None}, {"k": 1, "b": None}], [{"k": 1}, ONE, {"k": 1, "a": None, "b": None}]),
        ({"anyOf": [{"$ref": "#/$defs/a"}, {"type": "string"}], "$defs": {"a": A | OBJECT}}, [ONE, "x"], [BOTH]),
        (OBJECT, [{}, MORE, {"x": {"y": [{"z": {}}]}}], [[], 1]),
        (OBJECT | {"required": ["a"]}, [ONE, MORE], [{}]),
        (OBJECT | {"properties": {"n": {"$ref": "#"}}}, [{"n": {"n": {}}}, {}], [{"n": {"m": 1}}]),
        ({"$defs": {"n": OBJECT | {"properties": {"n": {"allOf": [{"$ref": "#/$defs/n"}], "description": "x"}}}},
          "$ref": "#/$defs/n"}, [{"n": {"n": {}}}], [{"n": {"m": 1}}, {"m": 1}]),
        ({"const": {"z": 1}}, [{"z": 1}], [{}]),
        (OBJECT | {"properties": {"x": {"$ref": "#/components/schemas/x"}}, "$schema": "mine",
                   "components": {"schemas": {"x": A | OBJECT, "y": {}}}}, [{"x": ONE}, {}], [{"x": BOTH}, {"y": 1}]),
    ],
)  # fmt: skip
def test_keys(schema: dict[str, Any], good: list[Any], bad: list[Any]) -> None:
    lark, as_said = lark_of(prepared(schema)), lark_of(prepared(schema, closed=False))
    for value in good:
        text = json.dumps(value, separators=(",", ":"))
        assert accepts(lark, text), value
        assert accepts(as_said, text), value
    for value in bad:
        assert not accepts(lark, json.dumps(value, separators=(",", ":"))), value


def test_an_object_of_which_nothing_is_declared_has_bounds() -> None:
    lark = lark_of(prepared(OBJECT))
    assert accepts(lark, json.dumps({str(key): 1 for key in range(64)}, separators=(",", ":")))
    assert not accepts(lark, json.dumps({str(key): 1 for key in range(65)}, separators=(",", ":")))
    assert not accepts(lark, '{"a":' * 30 + "1" + "}" * 30)
    assert accepts(
        lark_of(prepared(OBJECT | {"maxProperties": 99})),
        json.dumps(dict.fromkeys(map(str, range(99)), 1), separators=(",", ":")),
    )
