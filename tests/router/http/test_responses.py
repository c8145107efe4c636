"""/v1/responses, through the official client wherever it can say what is meant."""

from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import openai
import pydantic
import pytest

from tandem.common.sampling import Constraint
from tests.router.conftest import House, events
from tests.router.fake_worker import FakeWorker, Script
from tests.router.tool_models import (
    WEATHER,
    accepts,
    bare_router,
    calls_text,
    prompt_of,
    saying,
    write_tool_model,
)

PARIS = '{"city":"Paris"}'
TOOL = {"type": "function", **WEATHER["function"]}  # type: ignore[dict-item]
URL = "/v1/responses"


@pytest.fixture(scope="module")
def model_with_tools(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tool_model(tmp_path_factory.mktemp("model") / "tiny", "hermes")


class Desk:
    """A client, and a worker that says what it is told to say."""

    def __init__(self, house: House, worker: FakeWorker, client: openai.AsyncOpenAI) -> None:
        self.house = house
        self.worker = worker
        self.client = client

    def will_say(self, text: str) -> None:
        self.worker.script.tokens = saying(self.house.model, text)

    @property
    def prompt(self) -> str:
        return prompt_of(self.house.model, self.worker.submits[-1])


@pytest.fixture
async def desk(house: House, tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Desk]:
    house.model = write_tool_model(tmp_path_factory.mktemp("model") / "tiny", "hermes")
    worker = await house.decode(script=Script(stop_token_id=2, per_output=3, cached_tokens=4, delay_s=0.001))
    router = await house.router(worker)
    async with openai.AsyncOpenAI(base_url=f"{router.url}/v1", api_key="none", max_retries=0) as client:
        yield Desk(house, worker, client)


async def test_text(desk: Desk) -> None:
    desk.will_say("Hello there, user!")
    answer = await desk.client.responses.create(model="tiny", input="Hi", instructions="Be brief.", temperature=0.5)
    assert answer.output_text == "Hello there, user!"
    assert (answer.status, answer.error, answer.incomplete_details) == ("completed", None, None)
    assert (answer.instructions, answer.temperature) == ("Be brief.", 0.5)
    assert (
        desk.prompt
        == "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"
    )
    usage = answer.usage
    assert usage is not None
    assert usage.input_tokens == len(desk.worker.submits[0].prompt_token_ids)
    assert usage.input_tokens_details.cached_tokens == 4
    assert usage.total_tokens == usage.input_tokens + usage.output_tokens


async def test_stream_of_text_and_a_call(desk: Desk) -> None:
    desk.will_say("Let me see.\n" + calls_text("hermes", ("get_weather", PARIS)))
    stream = await desk.client.responses.create(model="tiny", input="Hi", tools=[TOOL], stream=True)  # type: ignore[list-item]
    seen = [event async for event in stream]
    assert [event.sequence_number for event in seen] == list(range(len(seen)))
    kinds = [event.type.removeprefix("response.") for event in seen]
    shortened = [kind for kind, before in zip(kinds, [None, *kinds], strict=False) if kind != before]
    assert shortened == [
        "created",
        "in_progress",
        "output_item.added",
        "content_part.added",
        "output_text.delta",
        "output_text.done",
        "content_part.done",
        "output_item.done",
        "output_item.added",
        "function_call_arguments.delta",
        "function_call_arguments.done",
        "output_item.done",
        "completed",
    ]
    final: Any = seen[-1]
    message, call = final.response.output
    assert message.content[0].text == "Let me see." == final.response.output_text
    assert (call.name, call.arguments, call.status) == ("get_weather", PARIS, "completed")
    deltas = [event.delta for event in seen if event.type == "response.function_call_arguments.delta"]
    assert "".join(deltas) == PARIS
    assert len(deltas) > 1
    assert {event.item_id for event in seen if event.type == "response.output_text.delta"} == {message.id}


async def test_whole_and_streamed_answers_are_the_same(desk: Desk) -> None:
    desk.will_say(calls_text("hermes", ("get_weather", PARIS), ("get_weather", "{}")))
    whole = await desk.client.responses.create(model="tiny", input="Hi", tools=[TOOL])  # type: ignore[list-item]
    async with desk.client.responses.stream(model="tiny", input="Hi", tools=[{**TOOL, "strict": True}]) as stream:  # type: ignore[list-item]
        async for _ in stream:
            pass
        streamed = await stream.get_final_response()
    assert [(item.type, item.name, item.arguments) for item in streamed.output] == [  # type: ignore[union-attr]
        (item.type, item.name, item.arguments)  # type: ignore[union-attr]
        for item in whole.output
    ]
    assert len({item.call_id for item in whole.output}) == 2  # type: ignore[union-attr]


async def test_a_conversation_with_calls_reaches_the_template(desk: Desk) -> None:
    desk.will_say("Sunny.")
    answer = await desk.client.responses.create(
        model="tiny",
        input=[
            {"role": "user", "content": [{"type": "input_text", "text": "Weather?"}]},
            {"type": "reasoning", "id": "r1", "summary": []},
            {"type": "function_call", "call_id": "c1", "name": "get_weather", "arguments": PARIS},
            {"type": "function_call_output", "call_id": "c1", "output": "22 degrees"},
        ],
        tools=[TOOL],  # type: ignore[list-item]
    )
    assert answer.output_text == "Sunny."
    assert calls_text("hermes", ("get_weather", PARIS)) in desk.prompt.replace('{"city": "Paris"}', PARIS)
    assert "<|im_start|>tool\n22 degrees<|im_end|>" in desk.prompt


async def test_schema_and_forced_call_become_constraints(desk: Desk) -> None:
    class Person(pydantic.BaseModel):
        name: str

    desk.will_say('{"name": "Ann"}')
    parsed = await desk.client.responses.parse(model="tiny", input="Hi", text_format=Person)
    assert parsed.output_parsed == Person(name="Ann")
    schema = Constraint.from_proto(desk.worker.submits[-1].sampling.constraint)
    assert schema is not None
    assert accepts(desk.house.model, schema, '{"name":"Ann"}')
    choice: Any = {"type": "function", "name": "get_weather"}
    await desk.client.responses.create(model="tiny", input="Hi", tools=[TOOL], tool_choice=choice)  # type: ignore[list-item]
    forced = Constraint.from_proto(desk.worker.submits[-1].sampling.constraint)
    assert forced is not None
    assert accepts(desk.house.model, forced, calls_text("hermes", ("get_weather", PARIS)))


async def test_logprobs_cover_the_text(desk: Desk) -> None:
    desk.will_say("Hi you")
    answer: Any = await desk.client.responses.create(
        model="tiny", input="Hi", include=["message.output_text.logprobs"], top_logprobs=2
    )
    logprobs = answer.output[0].content[0].logprobs
    assert "".join(entry.token for entry in logprobs).startswith("Hi you")
    assert len(logprobs[0].top_logprobs) == 2


async def test_output_that_is_cut_off_is_incomplete(desk: Desk) -> None:
    desk.will_say("Hello there, user!")
    stream = await desk.client.responses.create(model="tiny", input="Hi", max_output_tokens=2, stream=True)
    *_, last = [event async for event in stream]
    assert last.type == "response.incomplete"
    assert last.response.incomplete_details is not None
    assert last.response.incomplete_details.reason == "max_output_tokens"


async def test_an_error_in_mid_stream_is_an_event(house: House) -> None:
    worker, client = await house.pair(Script(hold_after=2), worker_wait_s=0.05)
    async with client.stream("POST", URL, json={"input": "Hi", "stream": True}) as response:
        parts = response.aiter_text()
        seen = await anext(parts)
        await worker.kill()
        seen += "".join([part async for part in parts])
    last = seen.strip().split("\n\n")[-1]
    assert last.startswith("event: error\ndata: ")
    assert '"code":"worker_lost"' in last
    assert events(seen) == []  # every event has a name
    assert "[DONE]" not in seen


@pytest.mark.parametrize(
    ("change", "param"),
    [
        ({"input": []}, "input"),
        ({"input": [{"content": "a"}]}, "input[0].role"),
        ({"input": [{"role": "user"}]}, "input[0].content"),
        ({"input": [{"role": "user", "content": [{"type": "input_image"}]}]}, "input[0].content[0]"),
        ({"input": [{"type": "web_search_call"}]}, "input[0].type"),
        ({"input": [{"type": "function_call", "name": "x"}]}, "input[0]"),
        ({"max_output_tokens": 0}, "max_output_tokens"),
        ({"text": {"format": {"type": "json_schema", "name": "x"}}}, "text.format.schema"),
        ({"text": {"format": {"type": "json_schema", "name": "x", "schema": {"type": "y"}}}}, "text.format"),
        ({"tools": [{"type": "function", "name": "a b"}]}, "tools[0].name"),
        ({"tools": [{"type": "web_search"}]}, "tools[0].type"),
        ({"tool_choice": "required"}, "tool_choice"),
        ({"previous_response_id": "resp_1"}, "previous_response_id"),
        ({"temperature": 3}, "temperature"),
    ],
)
async def test_bad_fields_are_named(model_with_tools: Path, change: dict[str, Any], param: str) -> None:
    async with bare_router(model_with_tools) as client:
        response = await client.post(URL, json={"input": "Hi", **change})
    error = response.json()["error"]
    assert (response.status_code, error["param"], error["type"]) == (400, param, "invalid_request_error")
    assert "messages" not in error["message"]


async def test_tokens_are_counted_as_they_will_be_read(house: House) -> None:
    worker, client = await house.pair(Script())
    body = {"input": "Hello", "instructions": "Be brief."}
    counted = await client.post("/v1/responses/input_tokens", json=body)
    await client.post("/v1/responses", json={**body, "max_output_tokens": 1})
    tokens = len(worker.submits[0].prompt_token_ids)
    assert counted.json() == {"object": "response.input_tokens", "input_tokens": tokens}
    refused = await client.post("/v1/responses/input_tokens", json={"input": []})
    assert refused.json()["error"]["param"] == "input"
