from __future__ import annotations

import json
from typing import Any

import litellm
from features import MESSAGES, WEATHER, check_weather, error_of, run

TOOL = {"type": "function", "function": {"name": "get_weather", "description": "Forecast", "parameters": WEATHER}}


def ask(url: str, model: str, provider: str = "hosted_vllm", **fields: Any) -> Any:
    asked = {"messages": MESSAGES, "max_tokens": 80, **fields}
    return litellm.completion(model=f"{provider}/{model}", api_base=url, api_key="none", num_retries=0, **asked)


def chat(url: str, model: str) -> None:
    for provider in ("openai", "hosted_vllm"):
        assert ask(url, model, provider).choices[0].message.content, provider


def stream(url: str, model: str) -> None:
    chunks = list(ask(url, model, stream=True, stream_options={"include_usage": True}))
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices)


def tools(url: str, model: str) -> None:
    message = ask(url, model, tools=[TOOL], tool_choice="required").choices[0].message
    (call, *_) = message.tool_calls
    check_weather(json.loads(call.function.arguments))
    history = [*MESSAGES, message.model_dump(), {"role": "tool", "tool_call_id": call.id, "content": "sun"}]
    assert ask(url, model, messages=history, tools=[TOOL]).choices


def structured(url: str, model: str) -> None:
    form = {"type": "json_schema", "json_schema": {"name": "weather", "schema": WEATHER, "strict": True}}
    check_weather(json.loads(ask(url, model, response_format=form).choices[0].message.content))


def anthropic(url: str, model: str) -> None:
    answer = litellm.completion(
        model=f"anthropic/{model}",
        api_base=url.removesuffix("/v1"),
        api_key="none",
        messages=MESSAGES,
        max_tokens=20,
        num_retries=0,
    )
    assert answer.choices[0].message.content


def embeddings(url: str, model: str) -> None:
    answer = litellm.embedding(model=f"hosted_vllm/{model}", api_base=url, api_key="none", input=["one", "two"])
    assert len(answer.data) == 2


def errors(url: str, model: str) -> None:
    assert "temperature" in str(error_of(litellm.BadRequestError, lambda: ask(url, model, temperature=9)))


run(
    "litellm",
    {
        "chat": chat,
        "stream": stream,
        "tools": tools,
        "structured output": structured,
        "anthropic's API": anthropic,
        "embeddings": embeddings,
        "errors": errors,
    },
)
