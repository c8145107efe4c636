from __future__ import annotations

from typing import Any, Literal

from features import run
from pydantic import BaseModel
from pydantic_ai import Agent, NativeOutput, ToolOutput
from pydantic_ai.models.openai import OpenAIChatModel
from pydantic_ai.providers.openai import OpenAIProvider


class Forecast(BaseModel):
    """A forecast."""

    rain: bool
    city: Literal["Paris", "Rome"]


def agent(url: str, model: str, **more: Any) -> Agent[None, Any]:
    chat = OpenAIChatModel(model, provider=OpenAIProvider(base_url=url, api_key="none"))
    return Agent(chat, model_settings={"max_tokens": 80, "temperature": 0.0}, **more)


async def chat(url: str, model: str) -> None:
    assert (await agent(url, model).run("Who are you?")).output


async def stream(url: str, model: str) -> None:
    async with agent(url, model, system_prompt="Be brief.").run_stream("Who are you?") as answer:
        assert await answer.get_output()


async def tool_output(url: str, model: str) -> None:
    answer = await agent(url, model, output_type=ToolOutput(Forecast)).run("Will it rain?")
    assert isinstance(answer.output, Forecast)


async def native_output(url: str, model: str) -> None:
    answer = await agent(url, model, output_type=NativeOutput(Forecast)).run("Will it rain?")
    assert isinstance(answer.output, Forecast)


run("pydantic-ai-slim", {"chat": chat, "stream": stream, "output by tool": tool_output, "native output": native_output})
