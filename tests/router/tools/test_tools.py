"""Functions in chat requests: what the model is told, what it must write, and what the client gets."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest

from tandem.common.sampling import Constraint
from tests.router.conftest import House, events, joined
from tests.router.fake_worker import FakeWorker, Script
from tests.router.tool_models import (
    CLOCK,
    WEATHER,
    accepts,
    bare_router,
    calls_text,
    prompt_of,
    saying,
    write_tool_model,
)

CHAT = "/v1/chat/completions"
HELLO = [{"role": "user", "content": "Hello"}]
FORMS = ["hermes", "llama3_json", "mistral", "mistral_named"]
PARIS = '{"city":"Paris"}'


@pytest.fixture(scope="module")
def model_with_tools(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tool_model(tmp_path_factory.mktemp("model") / "tiny", "hermes")


async def pair(
    house: House, tmp_path_factory: pytest.TempPathFactory, form: str, text: str, *, per_output: int = 3
) -> tuple[FakeWorker, httpx.AsyncClient]:
    """A worker that writes `text`, whatever it is asked."""
    house.model = write_tool_model(tmp_path_factory.mktemp("model") / "tiny", form)
    script = Script(tokens=saying(house.model, text), stop_token_id=2, per_output=per_output)
    return await house.pair(script)


async def ask(client: httpx.AsyncClient, **fields: Any) -> dict[str, Any]:
    response = await client.post(CHAT, json={"messages": HELLO, "tools": [WEATHER, CLOCK], **fields})
    assert response.status_code == 200, response.text
    answer: dict[str, Any] = response.json()
    return answer


@pytest.mark.parametrize("form", FORMS)
async def test_calls_whole_and_streamed(house: House, tmp_path_factory: pytest.TempPathFactory, form: str) -> None:
    _, client = await pair(house, tmp_path_factory, form, calls_text(form, ("get_weather", PARIS), ("clock", "{}")))
    choice = (await ask(client))["choices"][0]
    assert choice["finish_reason"] == "tool_calls"
    assert choice["message"]["content"] is None
    calls = choice["message"]["tool_calls"]
    assert [call["function"] for call in calls] == [
        {"name": "get_weather", "arguments": PARIS},
        {"name": "clock", "arguments": "{}"},
    ]
    assert len({call["id"] for call in calls}) == 2

    response = await client.post(CHAT, json={"messages": HELLO, "tools": [WEATHER, CLOCK], "stream": True})
    streamed: dict[int, dict[str, Any]] = {}
    choices = [event["choices"][0] for event in events(response.text)[:-1]]
    for delta in [part for choice in choices for part in choice["delta"].get("tool_calls", [])]:
        if delta["index"] not in streamed:
            assert delta["type"] == "function"
            streamed[delta["index"]] = {"name": delta["function"]["name"], "arguments": ""}
        else:
            assert set(delta) == {"index", "function"}
        streamed[delta["index"]]["arguments"] += delta["function"]["arguments"]
    assert [streamed[i] for i in sorted(streamed)] == [call["function"] for call in calls]
    assert [choice["finish_reason"] for choice in choices] == [None] * (len(choices) - 1) + ["tool_calls"]
    assert not any(choice["delta"].get("content") for choice in choices)


async def test_official_client_streams_and_parses_calls(house: House, tmp_path_factory: pytest.TempPathFactory) -> None:
    text = "Let me see.\n" + calls_text("hermes", ("get_weather", PARIS))
    _, client = await pair(house, tmp_path_factory, "hermes", text)
    tools = [{**WEATHER, "function": {**WEATHER["function"], "strict": True}}]  # type: ignore[dict-item]
    async with (
        openai.AsyncOpenAI(base_url=f"{client.base_url}/v1", api_key="none", max_retries=0) as official,
        official.chat.completions.stream(model="tiny", messages=HELLO, tools=tools) as stream,  # type: ignore[arg-type]
    ):
        async for _ in stream:
            pass
        answer = await stream.get_final_completion()
    message = answer.choices[0].message
    assert message.content == "Let me see."
    assert message.tool_calls is not None
    assert message.tool_calls[0].function.name == "get_weather"
    assert message.tool_calls[0].function.parsed_arguments == {"city": "Paris"}
    assert answer.choices[0].finish_reason == "tool_calls"


@pytest.mark.parametrize("form", FORMS)
async def test_earlier_calls_and_their_results_reach_the_template(
    house: House, tmp_path_factory: pytest.TempPathFactory, form: str
) -> None:
    worker, client = await pair(house, tmp_path_factory, form, "Sunny.")
    written = '{"city": "Paris"}'
    call = {"id": "call12345", "type": "function", "function": {"name": "get_weather", "arguments": written}}
    messages = [
        *HELLO,
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "tool", "tool_call_id": "call12345", "content": "22 degrees"},
    ]
    answer = await ask(client, messages=messages)
    assert answer["choices"][0]["message"] == {"role": "assistant", "content": "Sunny.", "refusal": None}
    prompt = prompt_of(house.model, worker.submits[0])
    assert calls_text(form, ("get_weather", written)).removesuffix("</tool_call>") in prompt
    assert "<|im_start|>tool\n22 degrees<|im_end|>" in prompt
    told, _, _ = prompt.partition("\n")
    clock = {"type": "function", "function": {"name": "clock", "parameters": {"type": "object", "properties": {}}}}
    assert json.loads(told) == [WEATHER, clock]


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("written", ['{"city": "Par', '{"city"', "{", '"Paris"', '{"a": 1e999}'])
async def test_a_call_that_was_cut_off_can_be_sent_back_as_it_came(
    house: House, tmp_path_factory: pytest.TempPathFactory, form: str, written: str
) -> None:
    worker, client = await pair(house, tmp_path_factory, form, "Sunny.")
    call = {"id": "call12345", "type": "function", "function": {"name": "get_weather", "arguments": written}}
    said = {"role": "assistant", "content": None, "refusal": None, "tool_calls": [call, call]}
    await ask(client, messages=[*HELLO, said, {"role": "user", "content": "Go on"}])
    item = {
        "type": "function_call",
        "call_id": "1",
        "name": "get_weather",
        "arguments": written,
        "status": "incomplete",
    }
    tool = {"type": "function", **WEATHER["function"]}  # type: ignore[dict-item]
    body = {"input": [{"role": "user", "content": "Hello"}, item, item, {"role": "user", "content": "Go on"}]}
    answer = await client.post("/v1/responses", json={**body, "tools": [tool]})
    assert answer.is_success, answer.text
    used = {"type": "tool_use", "id": "1", "name": "get_weather", "input": written}
    anthropic = {"name": "get_weather", "input_schema": WEATHER["function"]["parameters"]}  # type: ignore[index]
    turns = [*HELLO, {"role": "assistant", "content": [used, used]}, {"role": "user", "content": "Go on"}]
    body = {"max_tokens": 20, "messages": turns, "tools": [anthropic]}
    assert (await client.post("/v1/messages", json=body)).is_success
    for submit in worker.submits:
        prompt = prompt_of(house.model, submit)
        assert prompt.count(calls_text(form, ("get_weather", written)).removesuffix("\n</tool_call>")) in (1, 2)
    assert len(worker.submits) == 3


async def test_numbers_of_several_tools_are_exact(house: House, tmp_path_factory: pytest.TempPathFactory) -> None:
    worker, client = await pair(house, tmp_path_factory, "hermes", calls_text("hermes", ("clock", "{}")))
    number = {"type": "object", "properties": {"id": {"enum": [2**53 + 1, 2**60 + 1]}}, "required": ["id"]}
    tools = [{"type": "function", "function": {"name": name, "parameters": number}} for name in ("get", "put")]
    schema = {"type": "json_schema", "json_schema": {"name": "x", "schema": number}}
    for fields in ({"tool_choice": "required"}, {"tool_choice": "auto", "response_format": schema}):
        await ask(client, tools=tools, **fields)
        constraint = Constraint("lark", worker.submits[-1].sampling.constraint.lark)
        for name in ("get", "put"):
            for value in (2**53 + 1, 2**60 + 1):
                assert accepts(house.model, constraint, calls_text("hermes", (name, f'{{"id":{value}}}')))
            assert not accepts(house.model, constraint, calls_text("hermes", (name, f'{{"id":{2**53}}}')))
        assert accepts(house.model, constraint, f'{{"id":{2**53 + 1}}}') == ("response_format" in fields)


async def test_with_choice_none_the_model_is_not_told_of_tools(
    house: House, tmp_path_factory: pytest.TempPathFactory
) -> None:
    text = calls_text("hermes", ("clock", "{}"))
    worker, client = await pair(house, tmp_path_factory, "hermes", text)
    answer = await ask(client, tool_choice="none")
    assert "get_weather" not in prompt_of(house.model, worker.submits[0])
    assert answer["choices"][0]["message"]["content"] == text
    assert answer["choices"][0]["finish_reason"] == "stop"
    assert not worker.submits[0].sampling.HasField("constraint")


@pytest.mark.parametrize("form", FORMS)
async def test_required_and_named_force_calls_in_the_models_form(
    house: House, tmp_path_factory: pytest.TempPathFactory, form: str
) -> None:
    worker, client = await pair(house, tmp_path_factory, form, calls_text(form, ("clock", "{}")))
    named = {"type": "function", "function": {"name": "get_weather"}}
    for choice in ("auto", "required", named):
        await ask(client, tool_choice=choice)
    auto, required, forced = [submit.sampling.constraint for submit in worker.submits]
    assert auto.WhichOneof("kind") is None

    def allowed(constraint: Any, *calls: tuple[str, str]) -> bool:
        return accepts(house.model, Constraint("lark", constraint.lark), calls_text(form, *calls))

    weather, clock = ("get_weather", PARIS), ("clock", "{}")
    assert allowed(required, weather)
    assert allowed(required, clock)
    assert allowed(required, weather, clock) == (form != "llama3_json")
    assert allowed(forced, weather)
    assert not allowed(forced, clock)
    assert not allowed(forced, weather, weather)
    assert not allowed(required, ("get_weather", '{"days": 1}')), "the city is required"
    assert not allowed(required, ("clock", '{"a":1}')), "a function without parameters has no arguments"
    assert not accepts(house.model, Constraint("lark", required.lark), "Hello")


async def test_one_call_only_without_parallel_calls(house: House, tmp_path_factory: pytest.TempPathFactory) -> None:
    worker, client = await pair(house, tmp_path_factory, "hermes", calls_text("hermes", ("clock", "{}")))
    await ask(client, tool_choice="required", parallel_tool_calls=False)
    constraint = Constraint("lark", worker.submits[0].sampling.constraint.lark)
    assert accepts(house.model, constraint, calls_text("hermes", ("clock", "{}")))
    assert not accepts(house.model, constraint, calls_text("hermes", ("clock", "{}"), ("clock", "{}")))


async def test_schema_for_the_answer_leaves_calls_possible(
    house: House, tmp_path_factory: pytest.TempPathFactory
) -> None:
    worker, client = await pair(house, tmp_path_factory, "hermes", '{"a":1}')
    schema = {"type": "object", "properties": {"a": {"type": "integer"}}, "required": ["a"]}
    answer = await ask(client, response_format={"type": "json_schema", "json_schema": {"name": "x", "schema": schema}})
    assert answer["choices"][0]["message"]["content"] == '{"a":1}'
    constraint = Constraint("lark", worker.submits[0].sampling.constraint.lark)
    assert accepts(house.model, constraint, '{"a":1}')
    assert accepts(house.model, constraint, calls_text("hermes", ("clock", "{}")))
    assert not accepts(house.model, constraint, "Hello")


async def test_tokens_and_logprobs_are_all_reported_with_tools(
    house: House, tmp_path_factory: pytest.TempPathFactory
) -> None:
    text = calls_text("hermes", ("get_weather", PARIS))
    worker, client = await pair(house, tmp_path_factory, "hermes", text)
    body = {"messages": HELLO, "tools": [WEATHER], "stream": True, "return_token_ids": True, "logprobs": True}
    response = await client.post(CHAT, json=body)
    choices = [event["choices"][0] for event in events(response.text)[:-1]]
    assert joined(choice.get("token_ids", []) for choice in choices) == worker.script.tokens(worker.submits[0])
    assert [choice["delta"].get("role") for choice in choices] == ["assistant"] + [None] * (len(choices) - 1)


async def test_each_choice_has_its_own_calls(house: House, tmp_path_factory: pytest.TempPathFactory) -> None:
    _, client = await pair(house, tmp_path_factory, "mistral", calls_text("mistral", ("clock", "{}")))
    choices = (await ask(client, n=3))["choices"]
    ids = [choice["message"]["tool_calls"][0]["id"] for choice in choices]
    assert len(set(ids)) == 3
    assert all(len(call_id) == 9 and call_id.isalnum() for call_id in ids)


async def test_a_call_that_is_cut_off_ends_with_length(house: House, tmp_path_factory: pytest.TempPathFactory) -> None:
    text = calls_text("hermes", ("get_weather", PARIS))
    _, client = await pair(house, tmp_path_factory, "hermes", text)
    answer = await ask(client, max_tokens=40)
    assert answer["choices"][0]["finish_reason"] == "length"
    assert answer["choices"][0]["message"]["tool_calls"][0]["function"]["name"] == "get_weather"


def changed(**fields: Any) -> dict[str, Any]:
    return {"type": "function", "function": {**WEATHER["function"], **fields}}  # type: ignore[dict-item]


@pytest.mark.parametrize(
    ("change", "param"),
    [
        ({"tools": [WEATHER, WEATHER]}, "tools[1].function.name"),
        ({"tools": [changed(name="a b")]}, "tools[0].function.name"),
        ({"tools": [changed(parameters={"type": "array"})]}, "tools[0].function.parameters.type"),
        ({"tools": [{"type": "custom", "custom": {"name": "x"}}]}, "tools[0].type"),
        ({"tools": [CLOCK] * 129}, "tools"),
        ({"tools": [], "tool_choice": "required"}, "tool_choice"),
        ({"tool_choice": "perhaps"}, "tool_choice"),
        ({"tool_choice": {"type": "function", "function": {"name": "other"}}}, "tool_choice"),
        (
            {"tools": [changed(parameters={"properties": {"a": {"type": "what"}}})], "tool_choice": "required"},
            "tools[0].function.parameters",
        ),
        (
            {
                "tools": [changed(strict=True, parameters={"properties": {"a": {"not": {}}}})],
                "tool_choice": "required",
            },
            "tools[0].function.parameters",
        ),
        ({"guided_choice": ["a", "b"]}, "tools"),
        ({"functions": [{"name": "x"}]}, "functions"),
        ({"messages": [{"role": "user", "content": "a", "tool_calls": [
            {"function": {"name": "clock", "arguments": "{}"}}]}]}, "messages[0].tool_calls"),
        ({"chat_template_kwargs": {"tools": []}}, "chat_template_kwargs"),
    ],
)  # fmt: skip
async def test_bad_fields_are_named(model_with_tools: Path, change: dict[str, object], param: str) -> None:
    async with bare_router(model_with_tools) as client:
        response = await client.post(CHAT, json={"messages": HELLO, "tools": [WEATHER], **change})
    assert response.status_code == 400, response.text
    assert response.json()["error"]["param"] == param


async def test_a_model_that_knows_no_tools_says_so(bare_client: httpx.AsyncClient) -> None:
    response = await bare_client.post(CHAT, json={"messages": HELLO, "tools": [WEATHER]})
    assert (response.status_code, response.json()["error"]["param"]) == (400, "tools")
    assert "chat template" in response.json()["error"]["message"]
