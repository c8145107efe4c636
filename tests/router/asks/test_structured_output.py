"""`response_format` and guided fields: what workers are told to enforce, and what is refused."""

from __future__ import annotations

import json
from typing import Any

import httpx
import openai
import pydantic
import pytest

from tandem.common.sampling import Constraint
from tests.router.conftest import House
from tests.router.fake_worker import Script
from tests.router.tool_models import accepts, saying

HELLO = [{"role": "user", "content": "Hello"}]
SCHEMA = {
    "type": "object",
    "properties": {"name": {"type": "string"}, "age": {"type": "integer", "minimum": 0}},
    "required": ["name", "age"],
    "additionalProperties": False,
}
ANN = '{"name":"Ann","age":3}'
SPACED = '{"name": "Ann", "age": 3}'
WIDE = SPACED.replace(" ", " " * 30)
MORE = '{"name":"Ann","age":3,"more":[]}'
OPEN = {key: value for key, value in SCHEMA.items() if key != "additionalProperties"}
INDENTED = json.dumps(json.loads(ANN), indent=4)
MISSING = "response_format.json_schema.schema"


def named(schema: dict[str, Any], **more: Any) -> dict[str, Any]:
    return {"type": "json_schema", "json_schema": {"name": "person", "schema": schema, **more}}


@pytest.mark.parametrize(
    ("fields", "good", "bad"),
    [
        ({"response_format": {"type": "json_object"}}, '{"any":[1,null,{"b":{}}]}', "[1]"),
        ({"response_format": named(SCHEMA)}, ANN, '{"name": "Ann"}'),
        ({"response_format": named(SCHEMA)}, ANN, SPACED),
        ({"response_format": named(OPEN)}, ANN, MORE),
        ({"response_format": named(OPEN | {"additionalProperties": True})}, MORE, "[]"),
        ({"response_format": named(SCHEMA | {"x-guidance": {"whitespace_flexible": True}})}, INDENTED, WIDE),
        ({"guided_json": SCHEMA | {"x-guidance": {"item_separator": ", ?"}}}, ANN.replace(",", ", "), SPACED),
        ({"response_format": named({"oneOf": [{"const": 1}, {"const": "a"}]})}, '"a"', '"b"'),
        ({"response_format": named({"type": "array", "uniqueItems": True}, strict=False)}, "[1]", "{}"),
        ({"response_format": named({"const": 2**53 + 1})}, str(2**53 + 1), str(2**53)),
        ({"response_format": named({"enum": [2**63, "a"]})}, str(2**63), str(2**63 + 1)),
        ({"guided_json": {"type": "integer", "minimum": -(2**63), "maximum": 2**63 - 1}}, str(2**63 - 1), str(2**63)),
        ({"structured_outputs": {"json": '{"const": 18446744073709551616}'}}, str(2**64), str(2**64 - 1)),
        ({"guided_json": SCHEMA}, ANN, "Ann"),
        ({"guided_json": SCHEMA, "guided_whitespace_pattern": " ?"}, SPACED, INDENTED),
        ({"guided_json": json.dumps(SCHEMA)}, ANN, "Ann"),
        ({"guided_regex": r"\d{3}-\d{2}"}, "123-45", "123-456"),
        ({"guided_choice": ["yes", 'no "really"\n', "é/\\"]}, 'no "really"\n', "maybe"),
        ({"guided_choice": ["yes", 'no "really"\n', "é/\\"]}, "é/\\", "yes "),
        ({"guided_grammar": 'start: "a" b\nb: "b"+'}, "abbb", "a"),
        ({"structured_outputs": {"json": SCHEMA}}, ANN, "{}"),
        ({"structured_outputs": {"json": OPEN, "disable_additional_properties": True}}, ANN, MORE),
        ({"structured_outputs": {"json": OPEN, "disable_additional_properties": False}}, MORE, SPACED),
        ({"structured_outputs": {"json": SCHEMA, "disable_any_whitespace": True}}, ANN, SPACED),
        ({"structured_outputs": {"json": SCHEMA, "disable_any_whitespace": False}}, INDENTED, WIDE),
        ({"structured_outputs": {"json": SCHEMA, "whitespace_pattern": "\n?"}}, '{"name":\n"Ann","age":3}', SPACED),
        ({"structured_outputs": {"json_object": True}}, "{}", "1"),
        ({"structured_outputs": {"regex": "a|b"}}, "a", "ab"),
        ({"structured_outputs": {"choice": ["a", "b"]}}, "b", "c"),
        ({"structured_outputs": {"grammar": 'start: "x"'}}, "x", "y"),
    ],
)  # fmt: skip
async def test_workers_are_told_what_to_enforce(house: House, fields: dict[str, Any], good: str, bad: str) -> None:
    worker, client = await house.pair()
    body = {"messages": HELLO, "max_tokens": 2, **fields}
    assert (await client.post("/v1/chat/completions", json=body)).status_code == 200
    assert (await client.post("/v1/completions", json={"prompt": "a", "max_tokens": 2, **fields})).status_code == 200
    chat, plain = (Constraint.from_proto(submit.sampling.constraint) for submit in worker.submits)
    assert chat == plain
    assert chat is not None
    assert accepts(house.model, chat, good)
    assert not accepts(house.model, chat, bad)


async def test_what_the_output_is_not_held_to_is_named_in_a_header(house: House) -> None:
    """zod's pattern of an address looks ahead; nothing can be ignored where strict is true."""
    email = {"type": "string", "format": "email", "pattern": r"^(?!\.)(?!.*\.\.)([a-z]+)@([a-z]+\.)+[a-z]{2,}$"}
    schema = {"type": "object", "properties": {"to": {"type": "array", "items": email, "uniqueItems": True}}}
    worker, client = await house.pair()
    names = ["properties.to.uniqueItems", "properties.to.items.pattern"]
    for fields, place in (
        ({"response_format": named(schema)}, "response_format.json_schema.schema"),
        ({"response_format": named(schema, strict=False)}, "response_format.json_schema.schema"),
        ({"guided_json": schema}, "guided_json"),
        ({"structured_outputs": {"json": json.dumps(schema)}}, "structured_outputs.json"),
    ):
        for stream in (False, True):
            body = {"messages": HELLO, "max_tokens": 2, "stream": stream, **fields}
            answer = await client.post("/v1/chat/completions", json=body)
            assert answer.headers["x-tandem-ignored"].split(", ") == [f"{place}.{name}" for name in names]
        answer = await client.post("/v1/completions", json={"prompt": "a", "max_tokens": 2, **fields})
        assert answer.headers["x-tandem-ignored"].split(", ") == [f"{place}.{name}" for name in names]
    constraint = Constraint.from_proto(worker.submits[0].sampling.constraint)
    assert constraint is not None
    assert accepts(house.model, constraint, '{"to":["a@b.cd","a@b.cd"]}')
    assert not accepts(house.model, constraint, '{"to":["a"]}')
    body = {"messages": HELLO, "response_format": named(schema, strict=True)}
    refused = await client.post("/v1/chat/completions", json=body)
    assert (refused.status_code, refused.json()["error"]["param"]) == (400, "response_format")
    assert "properties.to.uniqueItems" in refused.json()["error"]["message"]


async def test_text_and_nothing_are_no_constraint(house: House) -> None:
    worker, client = await house.pair()
    for fields in ({}, {"response_format": {"type": "text"}}, {"structured_outputs": {}, "guided_json": None}):
        body = {"messages": HELLO, "max_tokens": 2, **fields}
        assert (await client.post("/v1/chat/completions", json=body)).status_code == 200
    assert not any(submit.sampling.HasField("constraint") for submit in worker.submits)


async def test_official_client_parses_into_a_model(house: House) -> None:
    class Person(pydantic.BaseModel):
        name: str
        age: int

    worker = await house.decode(script=Script(tokens=saying(house.model, ANN), stop_token_id=2))
    router = await house.router(worker)
    async with openai.AsyncOpenAI(base_url=f"{router.url}/v1", api_key="none", max_retries=0) as client:
        answer = await client.chat.completions.parse(model="tiny", messages=HELLO, response_format=Person)  # type: ignore[arg-type]
    assert answer.choices[0].message.parsed == Person(name="Ann", age=3)
    constraint = Constraint.from_proto(worker.submits[0].sampling.constraint)
    assert constraint is not None
    assert accepts(house.model, constraint, ANN)


async def test_a_large_schema_is_checked_off_the_event_loop(house: House) -> None:
    worker, client = await house.pair()
    schema = {"type": "object", "properties": {f"field{i}": {"type": "string"} for i in range(600)}}
    assert len(json.dumps(schema)) > 16_000
    body = {"prompt": "a", "max_tokens": 1, "guided_json": schema}
    assert (await client.post("/v1/completions", json=body)).status_code == 200
    schema["properties"]["field600"] = {"type": "nothing"}  # type: ignore[index]
    response = await client.post("/v1/completions", json=body)
    assert (response.status_code, response.json()["error"]["param"]) == (400, "guided_json")
    assert len(worker.submits) == 1


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"response_format": {"type": "json_schema"}}, MISSING),
        ({"response_format": {"type": "json_schema", "json_schema": {"name": "x"}}}, MISSING),
        ({"response_format": named({"type": "person"})}, "response_format"),
        ({"response_format": named({"type": "array", "uniqueItems": True}, strict=True)}, "response_format"),
        ({"response_format": named({"type": "string", "pattern": "(?!a)b"}, strict=True)}, "response_format"),
        ({"response_format": named({"x-guidance": {"no_such": 1}})}, "response_format"),
        ({"response_format": named({"properties": {"a": {"x-guidance": {}}}})}, "response_format"),
        ({"response_format": named({"$ref": "http://example.com/schema"})}, "response_format"),
        ({"response_format": named({"minimum": 5, "maximum": 2, "type": "integer"})}, "response_format"),
        ({"response_format": "json_object"}, "response_format"),
        ({"guided_json": "{"}, "guided_json"),
        ({"guided_json": "[]"}, "guided_json"),
        ({"guided_json": "[" * 100_000}, "guided_json"),
        ({"guided_json": {"description": "x" * 140_000}}, "guided_json"),
        ({"guided_regex": "("}, "guided_regex"),
        ({"guided_regex": "(?=a)b"}, "guided_regex"),
        ({"guided_choice": []}, "guided_choice"),
        ({"guided_choice": [""]}, "guided_choice"),
        ({"guided_choice": ["a"] * 1025}, "guided_choice"),
        ({"guided_grammar": "start: nothing"}, "guided_grammar"),
        ({"guided_grammar": ""}, "guided_grammar"),
        ({"structured_outputs": {"json": {"type": "person"}}}, "structured_outputs.json"),
        ({"structured_outputs": {"choice": "ab"}}, "structured_outputs.choice"),
        ({"structured_outputs": {"regex": "["}}, "structured_outputs.regex"),
        ({"structured_outputs": {"grammar": "?"}}, "structured_outputs.grammar"),
        ({"structured_outputs": {"structural_tag": "{}"}}, "structured_outputs.structural_tag"),
        ({"structured_outputs": {"regex": "a", "choice": ["a"]}}, "structured_outputs.choice"),
        ({"response_format": {"type": "json_object"}, "guided_regex": "a"}, "guided_regex"),
    ],
)  # fmt: skip
async def test_what_cannot_be_used_is_named(bare_client: httpx.AsyncClient, fields: dict[str, Any], param: str) -> None:
    response = await bare_client.post("/v1/chat/completions", json={"messages": HELLO, **fields})
    error = response.json()["error"]
    assert (response.status_code, error["param"], error["code"]) == (400, param, "invalid_request")
    assert len(error["message"]) < 400
