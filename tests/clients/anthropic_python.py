from __future__ import annotations

from anthropic import Anthropic, BadRequestError
from features import MESSAGES, WEATHER, check_weather, error_of, run

TOOL = {"name": "get_weather", "description": "Forecast", "input_schema": WEATHER}


def client(url: str) -> Anthropic:
    return Anthropic(base_url=url.removesuffix("/v1"), api_key="none", max_retries=0)


def messages(url: str, model: str) -> None:
    answer = client(url).messages.create(model=model, messages=MESSAGES, max_tokens=20, system="Be brief.")
    assert answer.content[0].text
    assert answer.usage.output_tokens <= 20


def stream(url: str, model: str) -> None:
    with client(url).messages.stream(model=model, messages=MESSAGES, max_tokens=20) as events:
        assert "".join(events.text_stream)
        assert events.get_final_message().stop_reason in ("end_turn", "max_tokens")


def tools(url: str, model: str) -> None:
    asked = {"model": model, "tools": [TOOL], "max_tokens": 80}
    answer = client(url).messages.create(messages=MESSAGES, tool_choice={"type": "any"}, **asked)
    call = next(block for block in answer.content if block.type == "tool_use")
    check_weather(call.input)
    result = {"role": "user", "content": [{"type": "tool_result", "tool_use_id": call.id, "content": "sun"}]}
    history = [*MESSAGES, {"role": "assistant", "content": answer.content}, result]
    assert client(url).messages.create(messages=history, **asked).content is not None


def tools_stream(url: str, model: str) -> None:
    with client(url).messages.stream(
        model=model, messages=MESSAGES, tools=[TOOL], tool_choice={"type": "tool", "name": "get_weather"}, max_tokens=80
    ) as events:
        call = next(block for block in events.get_final_message().content if block.type == "tool_use")
    check_weather(call.input)


def count(url: str, model: str) -> None:
    assert client(url).messages.count_tokens(model=model, messages=MESSAGES).input_tokens > 3


def errors(url: str, model: str) -> None:
    asked = {"model": model, "messages": MESSAGES, "max_tokens": -1}
    assert "max_tokens" in str(error_of(BadRequestError, lambda: client(url).messages.create(**asked)))


run(
    "anthropic",
    {
        "chat": messages,
        "stream": stream,
        "tools": tools,
        "tools, streamed": tools_stream,
        "count tokens": count,
        "errors": errors,
    },
)
