from __future__ import annotations

import json
from typing import Literal

from features import MESSAGES, WEATHER, check_weather, error_of, run
from openai import BadRequestError, NotFoundError, OpenAI
from pydantic import BaseModel

TOOL = {"type": "function", "function": {"name": "get_weather", "description": "Forecast", "parameters": WEATHER}}


def client(url: str) -> OpenAI:
    return OpenAI(base_url=url, api_key="none", max_retries=0)


def models(url: str, model: str) -> None:
    assert [each.id for each in client(url).models.list()] == [model]


def chat(url: str, model: str) -> None:
    answer = client(url).chat.completions.create(model=model, messages=MESSAGES, max_tokens=20, seed=1, user="me")
    assert answer.choices[0].message.content
    assert answer.usage is not None
    assert answer.usage.completion_tokens <= 20


def stream(url: str, model: str) -> None:
    events = client(url).chat.completions.create(
        model=model, messages=MESSAGES, max_tokens=20, stream=True, stream_options={"include_usage": True}
    )
    chunks = list(events)
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices)
    assert chunks[-1].usage is not None


def stream_helper(url: str, model: str) -> None:
    with client(url).chat.completions.stream(model=model, messages=MESSAGES, max_tokens=900) as events:
        kinds = {event.type for event in events}
        assert events.get_final_completion().choices[0].message.content
    assert "content.done" in kinds


def completion(url: str, model: str) -> None:
    answer = client(url).completions.create(model=model, prompt="It was", max_tokens=10, logprobs=2, echo=True)
    assert answer.choices[0].text.startswith("It was")
    assert answer.choices[0].logprobs is not None


def logprobs(url: str, model: str) -> None:
    answer = client(url).chat.completions.create(
        model=model, messages=MESSAGES, max_tokens=5, logprobs=True, top_logprobs=3
    )
    assert answer.choices[0].logprobs is not None
    assert all(len(token.top_logprobs) == 3 for token in answer.choices[0].logprobs.content or [])


def tools(url: str, model: str) -> None:
    answer = client(url).chat.completions.create(
        model=model, messages=MESSAGES, tools=[TOOL], tool_choice="required", parallel_tool_calls=False, max_tokens=80
    )
    message = answer.choices[0].message
    assert answer.choices[0].finish_reason == "tool_calls"
    (call, *_) = message.tool_calls or []
    check_weather(json.loads(call.function.arguments))
    history = [*MESSAGES, message, {"role": "tool", "tool_call_id": call.id, "content": "sun"}]
    again = client(url).chat.completions.create(model=model, messages=history, tools=[TOOL], max_tokens=10)
    assert again.choices


def tools_stream(url: str, model: str) -> None:
    choice = {"type": "function", "function": {"name": "get_weather"}}
    with client(url).chat.completions.stream(
        model=model, messages=MESSAGES, tools=[TOOL], tool_choice=choice, max_tokens=80
    ) as events:
        for _ in events:
            pass
        (call, *_) = events.get_final_completion().choices[0].message.tool_calls or []
    check_weather(json.loads(call.function.arguments))


class Forecast(BaseModel):
    rain: bool
    wind: Literal[1, 2]


def parsed(url: str, model: str) -> None:
    answer = client(url).chat.completions.parse(
        model=model, messages=MESSAGES, response_format=Forecast, max_tokens=60, temperature=0
    )
    assert isinstance(answer.choices[0].message.parsed, Forecast)


def responses(url: str, model: str) -> None:
    answer = client(url).responses.create(model=model, input="Who are you?", max_output_tokens=20)
    assert answer.output_text
    with client(url).responses.stream(model=model, input="Who are you?", max_output_tokens=900) as events:
        for _ in events:
            pass
        assert events.get_final_response().output_text


def embeddings(url: str, model: str) -> None:
    answer = client(url).embeddings.create(model=model, input=["one", "two"])
    assert len(answer.data) == 2
    assert len(answer.data[0].embedding) > 100


def errors(url: str, model: str) -> None:
    for wrong, kind in (({"model": "nobody"}, NotFoundError), ({"temperature": 9}, BadRequestError)):
        asked = {"model": model, "messages": MESSAGES, **wrong}
        error = error_of(kind, lambda asked=asked: client(url).chat.completions.create(**asked))
        assert error.param in wrong, error.param


def leaves(url: str, model: str) -> None:
    events = client(url).chat.completions.create(model=model, messages=MESSAGES, max_tokens=900, stream=True)
    next(iter(events))
    events.close()
    chat(url, model)


run(
    "openai",
    {
        "models": models,
        "chat": chat,
        "stream": stream,
        "stream helper": stream_helper,
        "completion": completion,
        "logprobs": logprobs,
        "tools": tools,
        "tools, streamed": tools_stream,
        "structured output": parsed,
        "responses": responses,
        "embeddings": embeddings,
        "errors": errors,
        "client leaves": leaves,
    },
)
