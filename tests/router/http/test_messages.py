"""/v1/messages: the shapes that Anthropic's clients expect."""

from __future__ import annotations

import datetime
import hashlib
import json
from pathlib import Path
from typing import Any

import httpx
import pytest

from tandem.common.sampling import Constraint
from tests.router.conftest import House, until
from tests.router.fake_worker import FakeWorker, Script
from tests.router.tool_models import WEATHER, accepts, bare_router, calls_text, prompt_of, saying, write_tool_model

URL = "/v1/messages"
PARIS = '{"city":"Paris"}'
FUNCTION: dict[str, Any] = WEATHER["function"]  # type: ignore[assignment]
TOOL = {"name": "get_weather", "description": FUNCTION["description"], "input_schema": FUNCTION["parameters"]}
HELLO: dict[str, Any] = {"messages": [{"role": "user", "content": "Hello"}], "max_tokens": 100}


@pytest.fixture(scope="module")
def model_with_tools(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tool_model(tmp_path_factory.mktemp("model") / "tiny", "hermes")


async def pair(
    house: House, tmp_path_factory: pytest.TempPathFactory, text: str, **settings: Any
) -> tuple[FakeWorker, httpx.AsyncClient]:
    house.model = write_tool_model(tmp_path_factory.mktemp("model") / "tiny", "hermes")
    script = Script(tokens=saying(house.model, text), stop_token_id=2, per_output=3, cached_tokens=4, delay_s=0.001)
    return await house.pair(script, **settings)


async def ask(client: httpx.AsyncClient, **fields: Any) -> dict[str, Any]:
    response = await client.post(URL, json={**HELLO, **fields})
    assert response.status_code == 200, response.text
    answer: dict[str, Any] = response.json()
    return answer


def stream_events(text: str) -> list[tuple[str, Any]]:
    found: list[tuple[str, Any]] = []
    for block in text.strip().split("\n\n"):
        name, _, data = block.partition("\n")
        found.append((name.removeprefix("event: "), json.loads(data.removeprefix("data: "))))
    return found


async def test_text(house: House, tmp_path_factory: pytest.TempPathFactory) -> None:
    worker, client = await pair(house, tmp_path_factory, "Hello there, user!")
    answer = await ask(client, system=[{"type": "text", "text": "Be brief."}])
    prompt_tokens = len(worker.submits[0].prompt_token_ids)
    assert answer["id"].startswith("msg_")
    assert {key: answer[key] for key in ("type", "role", "model", "content", "stop_reason", "stop_sequence")} == {
        "type": "message",
        "role": "assistant",
        "model": "tiny",
        "content": [{"type": "text", "text": "Hello there, user!"}],
        "stop_reason": "end_turn",
        "stop_sequence": None,
    }
    assert answer["usage"]["input_tokens"] == prompt_tokens - 4
    assert answer["usage"]["cache_read_input_tokens"] == 4
    assert prompt_of(house.model, worker.submits[0]).startswith("<|im_start|>system\nBe brief.<|im_end|>")


async def test_stream_of_text_and_tool_use(house: House, tmp_path_factory: pytest.TempPathFactory) -> None:
    _, client = await pair(house, tmp_path_factory, "Let me see.\n" + calls_text("hermes", ("get_weather", PARIS)))
    response = await client.post(URL, json={**HELLO, "tools": [TOOL], "stream": True})
    seen = stream_events(response.text)
    assert all(name == data["type"] for name, data in seen)
    names = [name for name, _ in seen]
    assert [name for name, before in zip(names, ["", *names], strict=False) if name != before] == [
        "message_start",
        "content_block_start",
        "content_block_delta",
        "content_block_stop",
        "content_block_start",
        "content_block_delta",
        "content_block_stop",
        "message_delta",
        "message_stop",
    ]
    assert seen[0][1]["message"]["content"] == []
    assert seen[0][1]["message"]["usage"]["cache_read_input_tokens"] == 4
    blocks = [data["content_block"] for name, data in seen if name == "content_block_start"]
    assert blocks[0] == {"type": "text", "text": ""}
    assert {**blocks[1], "id": ""} == {"type": "tool_use", "id": "", "name": "get_weather", "input": {}}
    deltas = [(data["index"], data["delta"]) for name, data in seen if name == "content_block_delta"]
    assert "".join(delta["text"] for index, delta in deltas if index == 0) == "Let me see."
    assert "".join(delta["partial_json"] for index, delta in deltas if index == 1) == PARIS
    assert seen[-2][1]["delta"] == {"stop_reason": "tool_use", "stop_sequence": None}
    assert seen[-2][1]["usage"]["output_tokens"] > 5


async def test_tool_use_and_results_make_a_conversation(house: House, tmp_path_factory: pytest.TempPathFactory) -> None:
    worker, client = await pair(house, tmp_path_factory, calls_text("hermes", ("get_weather", PARIS)))
    answer = await ask(client, tools=[TOOL])
    assert answer["stop_reason"] == "tool_use"
    (used,) = answer["content"]
    assert (used["type"], used["name"], used["input"]) == ("tool_use", "get_weather", {"city": "Paris"})
    result = {"type": "tool_result", "tool_use_id": used["id"], "content": [{"type": "text", "text": "22 degrees"}]}
    turns = [
        *HELLO["messages"],
        {"role": "assistant", "content": [{"type": "thinking", "thinking": "hm"}, used]},
        {"role": "user", "content": [result, {"type": "text", "text": "And now?"}]},
    ]
    await ask(client, tools=[TOOL], messages=turns)
    prompt = prompt_of(house.model, worker.submits[-1])
    assert calls_text("hermes", ("get_weather", PARIS)) in prompt.replace('{"city": "Paris"}', PARIS)
    assert "<|im_start|>tool\n22 degrees<|im_end|>\n<|im_start|>user\nAnd now?<|im_end|>" in prompt


async def test_tool_choice(house: House, tmp_path_factory: pytest.TempPathFactory) -> None:
    worker, client = await pair(house, tmp_path_factory, "Hello")
    for choice in ({"type": "auto"}, {"type": "none"}):
        await ask(client, tools=[TOOL], tool_choice=choice)
        assert not worker.submits[-1].sampling.HasField("constraint")
    for choice in ({"type": "any"}, {"type": "tool", "name": "get_weather"}):
        await ask(client, tools=[TOOL], tool_choice=choice)
        constraint = Constraint.from_proto(worker.submits[-1].sampling.constraint)
        assert constraint is not None
        assert accepts(house.model, constraint, calls_text("hermes", ("get_weather", PARIS)))
        assert not accepts(house.model, constraint, "Hello")


async def test_reasons_to_stop(house: House, tmp_path_factory: pytest.TempPathFactory) -> None:
    _, client = await pair(house, tmp_path_factory, "one two three")
    stopped = await ask(client, stop_sequences=[" two"])
    assert (stopped["stop_reason"], stopped["stop_sequence"]) == ("stop_sequence", " two")
    assert stopped["content"] == [{"type": "text", "text": "one"}]
    cut = await ask(client, max_tokens=1)
    assert (cut["stop_reason"], cut["stop_sequence"]) == ("max_tokens", None)


async def test_keys_come_in_anthropics_header_too(
    house: House, tmp_path_factory: pytest.TempPathFactory, tmp_path: Path
) -> None:
    keys = tmp_path / "keys"
    keys.write_text(f"ann:{hashlib.sha256(b'sk-ann').hexdigest()}\n")
    _, client = await pair(house, tmp_path_factory, "Hello", api_keys_file=keys)
    assert (await client.post(URL, json=HELLO, headers={"x-api-key": "sk-ann"})).status_code == 200
    refused = await client.post(URL, json=HELLO, headers={"x-api-key": "wrong"})
    assert refused.status_code == 401
    assert refused.json()["type"] == "error"
    assert refused.json()["error"]["type"] == "authentication_error"


async def test_an_error_in_mid_stream_is_an_event(house: House) -> None:
    worker, client = await house.pair(Script(hold_after=2), worker_wait_s=0.05)
    async with client.stream("POST", URL, json={**HELLO, "stream": True}) as response:
        parts = response.aiter_text()
        seen = await anext(parts)
        await worker.kill()
        seen += "".join([part async for part in parts])
    name, data = stream_events(seen)[-1]
    assert (name, data["type"], data["error"]["type"]) == ("error", "error", "overloaded_error")


async def test_a_client_that_goes_away_cancels(house: House) -> None:
    worker, client = await house.pair(Script(delay_s=0.01))
    async with client.stream("POST", URL, json={**HELLO, "stream": True}) as response:
        await anext(response.aiter_bytes())
    await until(lambda: worker.cancels)


@pytest.mark.parametrize(
    ("change", "field"),
    [
        ({"max_tokens": None}, "max_tokens"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"messages": []}, "messages"),
        ({"messages": [{"role": "system", "content": "a"}]}, "messages[0].role"),
        ({"messages": [{"role": "user", "content": [{"type": "image"}]}]}, "messages[0].content[0].type"),
        ({"messages": [{"role": "user", "content": [{"type": "tool_use"}]}]}, "messages[0].content[0].type"),
        ({"messages": [{"role": "assistant", "content": [{"type": "tool_use"}]}]}, "messages[0].content[0]"),
        ({"messages": [{"role": "user", "content": [{"type": "text"}]}]}, "messages[0].content[0]"),
        ({"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}, "messages"),
        ({"output_config": {"format": {"type": "json_schema"}}}, "output_config.format.schema"),
        ({"output_config": {"format": {"type": "json_schema", "schema": {"type": "x"}}}}, "output_config.format"),
        ({"temperature": 1.5}, "temperature"),
        ({"stop_sequences": [""]}, "stop_sequences"),
        ({"tools": [{"name": "a b", "input_schema": {}}]}, "tools[0].name"),
        ({"tools": [{"name": "a", "input_schema": {"type": "string"}}]}, "tools[0].input_schema.type"),
        ({"tool_choice": {"type": "any"}}, "tool_choice"),
        ({"tools": [TOOL], "tool_choice": {"type": "tool"}}, "tool_choice.name"),
    ],
)
async def test_bad_fields_are_named(model_with_tools: Path, change: dict[str, Any], field: str) -> None:
    async with bare_router(model_with_tools) as client:
        response = await client.post(URL, json={**HELLO, **change})
    assert response.status_code == 400, response.text
    error = response.json()
    assert error["type"] == "error"
    assert error["error"]["type"] == "invalid_request_error"
    assert error["error"]["message"].startswith(field)


async def test_tokens_are_counted_as_they_will_be_read(house: House, tmp_path_factory: pytest.TempPathFactory) -> None:
    worker, client = await pair(house, tmp_path_factory, "Hello")
    body = {"messages": HELLO["messages"], "system": "Be brief.", "tools": [TOOL]}
    counted = await client.post(f"{URL}/count_tokens", json=body)
    await ask(client, **body)
    assert counted.json() == {"input_tokens": len(worker.submits[0].prompt_token_ids)}
    long = {"messages": [{"role": "user", "content": "Hello " * 3000}]}
    assert (await client.post(f"{URL}/count_tokens", json=long)).json()["input_tokens"] > 3000


async def test_output_config_is_a_schema(house: House, tmp_path_factory: pytest.TempPathFactory) -> None:
    worker, client = await pair(house, tmp_path_factory, '{"ok":true}')
    schema = {"type": "object", "properties": {"ok": {"type": "boolean"}}, "required": ["ok"]}
    await ask(client, output_config={"effort": "low", "format": {"type": "json_schema", "schema": schema}})
    constraint = Constraint.from_proto(worker.submits[0].sampling.constraint)
    assert constraint is not None
    assert accepts(house.model, constraint, '{"ok":true}')
    assert not accepts(house.model, constraint, "yes")


async def test_what_the_output_is_not_held_to_is_named(house: House, tmp_path_factory: pytest.TempPathFactory) -> None:
    """As the fields of this API, and of the responses API, are called."""
    _, client = await pair(house, tmp_path_factory, "[]")
    schema = {"type": "array", "uniqueItems": True}
    tool = {"name": "f", "input_schema": {"properties": {"a": schema}}}
    body = {"output_config": {"format": {"type": "json_schema", "schema": schema}}}
    answer = await client.post(URL, json={**HELLO, **body})
    assert answer.headers["x-tandem-ignored"] == "output_config.format.schema.uniqueItems"
    answer = await client.post(URL, json={**HELLO, "tools": [tool], "tool_choice": {"type": "any"}})
    assert answer.headers["x-tandem-ignored"] == "tools[0].input_schema.properties.a.uniqueItems"
    body = {"input": "a", "text": {"format": {"type": "json_schema", "name": "x", "schema": schema}}}
    answer = await client.post("/v1/responses", json=body)
    assert answer.headers["x-tandem-ignored"] == "text.format.schema.uniqueItems"


async def test_turns_of_one_side_become_one(house: House, tmp_path_factory: pytest.TempPathFactory) -> None:
    worker, client = await pair(house, tmp_path_factory, "Hello")
    used = {"type": "tool_use", "id": "1", "name": "get_weather", "input": {"city": "Paris"}}
    turns = [
        {"role": "user", "content": "a"},
        {"role": "user", "content": [{"type": "text", "text": "b"}]},
        {"role": "assistant", "content": "c"},
        {"role": "assistant", "content": [used]},
        {"role": "user", "content": "d"},
    ]
    await ask(client, messages=turns)
    prompt = prompt_of(house.model, worker.submits[0])
    assert prompt.count("<|im_start|>") == 4
    assert "user\na\nb<|im_end|>" in prompt
    assert "assistant\nc<tool_call>" in prompt.replace("c\n<tool_call>", "c<tool_call>")


async def test_anthropics_clients_get_their_shapes_everywhere(bare_client: httpx.AsyncClient) -> None:
    """As its Python client asks: it takes the id of a request from `request-id`, and pages from `has_more`."""
    version = {"anthropic-version": "2023-06-01"}
    for path, headers in ((f"{URL}/batches", {}), ("/v1/models/claude", version), ("/v1/nothing", version)):
        missing = await bare_client.get(path, headers=headers)
        assert (missing.status_code, missing.json()["type"]) == (404, "error")
        assert missing.json()["error"]["type"] == "not_found_error"
        assert missing.json()["request_id"] == missing.headers["request-id"] == missing.headers["x-request-id"]
    for path in (URL, f"{URL}/count_tokens"):
        refused = await bare_client.get(path)
        assert (refused.status_code, refused.headers["allow"]) == (405, "POST, OPTIONS")
        assert (refused.json()["type"], refused.json()["error"]["type"]) == ("error", "invalid_request_error")
    listed = (await bare_client.get("/v1/models", headers=version)).json()
    assert (listed["has_more"], listed["first_id"], listed["last_id"]) == (False, "tiny", "tiny")
    (model,) = listed["data"]
    assert (model["type"], model["id"], model["display_name"]) == ("model", "tiny", "tiny")
    assert datetime.datetime.fromisoformat(model["created_at"]).utcoffset() == datetime.timedelta(0)
    assert (await bare_client.get("/v1/models/tiny", headers=version)).json() == model
