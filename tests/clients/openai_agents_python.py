from __future__ import annotations

from typing import Any, Literal

from agents import (
    Agent,
    ModelSettings,
    OpenAIChatCompletionsModel,
    OpenAIResponsesModel,
    Runner,
    StopAtTools,
    function_tool,
    set_tracing_disabled,
)
from features import run
from openai import AsyncOpenAI
from pydantic import BaseModel

set_tracing_disabled(True)
called: list[str] = []


class Forecast(BaseModel):
    rain: bool
    city: Literal["Paris", "Rome"]


@function_tool
def get_weather(city: Literal["Paris", "Rome"]) -> str:
    """Forecast for a city."""
    called.append(city)
    return f"sun in {city}"


def agent(url: str, model: str, kind: Any = OpenAIChatCompletionsModel, **more: Any) -> Agent:
    client = AsyncOpenAI(base_url=url, api_key="none", max_retries=0)
    settings = more.pop("model_settings", ModelSettings(max_tokens=80))
    return Agent("helper", instructions="Be brief.", model=kind(model, client), model_settings=settings, **more)


async def chat(url: str, model: str) -> None:
    for kind in (OpenAIChatCompletionsModel, OpenAIResponsesModel):
        assert (await Runner.run(agent(url, model, kind), "Who are you?")).final_output, kind


async def stream(url: str, model: str) -> None:
    for kind in (OpenAIChatCompletionsModel, OpenAIResponsesModel):
        answer = Runner.run_streamed(agent(url, model, kind), "Who are you?")
        async for _ in answer.stream_events():
            pass
        assert answer.final_output, kind


async def tools(url: str, model: str) -> None:
    for kind in (OpenAIChatCompletionsModel, OpenAIResponsesModel):
        called.clear()
        settings = ModelSettings(max_tokens=80, tool_choice="required")
        helper = agent(
            url,
            model,
            kind,
            tools=[get_weather],
            model_settings=settings,
            tool_use_behavior=StopAtTools(stop_at_tool_names=["get_weather"]),
        )
        answer = await Runner.run(helper, "Weather in Rome?", max_turns=2)
        assert called, kind
        assert answer.final_output == f"sun in {called[0]}", kind


async def structured(url: str, model: str) -> None:
    for kind in (OpenAIChatCompletionsModel, OpenAIResponsesModel):
        answer = await Runner.run(agent(url, model, kind, output_type=Forecast), "Will it rain?")
        assert isinstance(answer.final_output, Forecast), kind


run("openai-agents", {"chat": chat, "stream": stream, "tools": tools, "structured output": structured})
