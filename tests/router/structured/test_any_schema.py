"""Whatever schema a client sends is refused at once, or what is generated under it ends and is valid."""

from __future__ import annotations

import contextlib
import json
from typing import Any

import jsonschema
from hypothesis import example, given, settings
from hypothesis import strategies as st

from tests.router.structured.walks import lark_of, prepared, walk

WIDE = [2**53 + 1, 2**53 + 3, 2**63 - 1, 2**63, -(2**63), 2**64 - 1, 10**20 + 1, -(10**18) - 1]
NUMBERS = st.sampled_from([*WIDE, 0, 1, -3, 7, 2.5, -0.25]) | st.integers(-9, 99)
NAMES = st.sampled_from(["a", "b", "id", "a b", "é", '"', "<|im_end|>"])
VALUES = st.recursive(
    st.none() | st.booleans() | NUMBERS | NAMES,
    lambda inner: st.lists(inner, max_size=2) | st.dictionaries(NAMES, inner, max_size=2),
    max_leaves=4,
)


def some(**keywords: st.SearchStrategy[Any]) -> st.SearchStrategy[dict[str, Any]]:
    return st.fixed_dictionaries({}, optional=keywords)


SCALARS = st.one_of(
    st.fixed_dictionaries(
        {"type": st.sampled_from(["integer", "number", ["integer", "null"]])},
        optional=dict.fromkeys(("minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum"), NUMBERS),
    ),
    st.fixed_dictionaries(
        {"type": st.just("string")},
        optional={
            "minLength": st.integers(0, 5),
            "maxLength": st.integers(0, 9),
            "pattern": st.sampled_from(["^a", "b", "^[a-f]{1,4}$", "^(?!a)b", "^x{3}$"]),
        },
    ),
    st.fixed_dictionaries({"enum": st.lists(VALUES, max_size=3)}),
    st.fixed_dictionaries({"const": VALUES}),
    st.sampled_from([{"type": "boolean"}, {"type": "null"}, True, False, {"$ref": "#"}, {"$ref": "#/$defs/n"}]),
)


def larger(inner: st.SearchStrategy[Any]) -> st.SearchStrategy[Any]:
    objects = some(
        type=st.just("object"),
        properties=st.dictionaries(NAMES, inner, max_size=3),
        required=st.lists(NAMES, max_size=2, unique=True),
        additionalProperties=inner,
        patternProperties=st.dictionaries(st.sampled_from(["^a", "^b", "d$"]), inner, max_size=2),
        anyOf=st.lists(some(properties=st.dictionaries(NAMES, inner, max_size=1)), min_size=1, max_size=2),
        allOf=st.lists(some(properties=st.dictionaries(NAMES, inner, max_size=1)), min_size=1, max_size=2),
    )
    arrays = st.fixed_dictionaries(
        {"type": st.just("array")},
        optional={
            "items": inner,
            "prefixItems": st.lists(inner, min_size=1, max_size=2),
            "minItems": st.integers(0, 2),
            "maxItems": st.integers(0, 3),
        },
    )
    options = st.fixed_dictionaries({"anyOf": st.lists(inner, min_size=1, max_size=3)})
    return (
        objects
        | arrays
        | options
        | st.fixed_dictionaries({"$ref": st.just("#/$defs/n")}, optional={"allOf": st.lists(inner, max_size=1)})
    )


ANY = st.recursive(SCALARS, larger, max_leaves=6).filter(lambda schema: isinstance(schema, dict))


@given(schema=ANY, definition=ANY, seed=st.integers(0, 9))
@example({"$ref": "#"}, True, 0)
@example({"type": "object", "properties": {"a": {"$ref": "#"}}}, True, 0)
@example({"type": "object", "patternProperties": {"^a": {}, "d$": {}}}, True, 0)
@settings(max_examples=250, deadline=None)
def test_it_is_refused_or_its_output_is_valid(schema: Any, definition: Any, seed: int) -> None:
    whole = {**schema, "$defs": {"n": definition}}
    answer = prepared(whole)
    if answer["problem"]:
        assert len(answer["problem"]) < 400
        return
    text = walk(lark_of(answer), seed)
    if text is None or answer["ignored"]:
        return
    with contextlib.suppress(RecursionError):  # the validator's own, where anyOf leads to itself
        jsonschema.Draft202012Validator(whole).validate(json.loads(text))
