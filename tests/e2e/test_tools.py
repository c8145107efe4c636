"""Forced calls, structured output and embeddings of real workers: a random model, which would never do it by itself."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import openai
import pytest

from tests.e2e.serving import Serve

PARAMETERS = {
    "type": "object",
    "properties": {"city": {"enum": ["Paris", "Rome"]}, "days": {"type": "integer", "minimum": 1, "maximum": 9}},
    "required": ["city", "days"],
    "additionalProperties": False,
}
WEATHER = {"type": "function", "function": {"name": "get_weather", "parameters": PARAMETERS}}
HELLO: Any = [{"role": "user", "content": "Hello"}]


@pytest.fixture(scope="module", params=["hermes", pytest.param("mistral_named", marks=pytest.mark.slow)])
def client(
    request: pytest.FixtureRequest, serves: Callable[..., Serve], tool_model: Callable[[str], Path]
) -> openai.OpenAI:
    serve = serves(tool_model(request.param), "--disaggregate", "always", "--dtype", "float32")
    return openai.OpenAI(base_url=f"{serve.url}/v1", api_key="none", max_retries=0)


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_a_required_call_is_made_and_valid(client: openai.OpenAI, temperature: float) -> None:
    for seed in range(3):
        asked: Any = {"tools": [WEATHER], "tool_choice": "required", "parallel_tool_calls": False, "seed": seed}
        answer = client.chat.completions.create(model="tiny", messages=HELLO, temperature=temperature, **asked)
        (choice,) = answer.choices
        assert choice.finish_reason == "tool_calls"
        assert choice.message.tool_calls is not None
        (call,) = choice.message.tool_calls
        arguments = json.loads(call.function.arguments)  # type: ignore[union-attr]
        assert arguments["city"] in ("Paris", "Rome")
        assert 1 <= arguments["days"] <= 9
        assert set(arguments) == {"city", "days"}


def test_a_required_call_in_a_stream_of_responses(client: openai.OpenAI) -> None:
    tool: Any = {"type": "function", "name": "get_weather", "parameters": PARAMETERS}
    with client.responses.stream(
        model="tiny", input="Hello", tools=[{**tool, "strict": True}], tool_choice="required", parallel_tool_calls=False
    ) as stream:
        for _ in stream:
            pass
        (item,) = stream.get_final_response().output
    assert json.loads(item.arguments)["city"] in ("Paris", "Rome")  # type: ignore[union-attr]


def test_an_answer_follows_its_schema(client: openai.OpenAI) -> None:
    wanted: Any = {"type": "json_schema", "json_schema": {"name": "x", "schema": PARAMETERS}}
    answer = client.chat.completions.create(
        model="tiny", messages=HELLO, response_format=wanted, temperature=1.0, n=4, seed=5
    )
    for choice in answer.choices:
        assert choice.finish_reason == "stop"
        assert set(json.loads(choice.message.content or "")) == {"city", "days"}


def test_an_answer_is_one_of_the_choices(client: openai.OpenAI) -> None:
    answer = client.completions.create(
        model="tiny", prompt="Hello", temperature=1.0, n=4, extra_body={"guided_choice": ["yes", "no"]}
    )
    assert {choice.text for choice in answer.choices} <= {"yes", "no"}


def test_embeddings_are_unit_vectors_that_depend_on_the_input(client: openai.OpenAI) -> None:
    for pooling in ("mean", "last"):
        answer = client.embeddings.create(
            model="tiny", input=["one", "two", "one"], encoding_format="float", extra_body={"pooling": pooling}
        )
        one, two, again = (np.array(item.embedding) for item in answer.data)
        assert np.linalg.norm(one) == pytest.approx(1.0, rel=1e-5)
        assert np.allclose(one, again, atol=1e-5)
        assert not np.allclose(one, two, atol=1e-2)
