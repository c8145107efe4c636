from typing import Literal

from features import check_weather, run
from llama_index.core.llms import ChatMessage
from llama_index.core.tools import FunctionTool
from llama_index.llms.openai_like import OpenAILike
from pydantic import BaseModel


class Forecast(BaseModel):
    """A forecast."""

    rain: bool
    wind: Literal[1, 2]


def get_weather(city: Literal["Paris", "Rome"], days: Literal[1, 2]) -> str:
    """Forecast for a city."""
    return f"sun in {city} for {days} days"


def llm(url: str, model: str, **more: object) -> OpenAILike:
    return OpenAILike(
        api_base=url, api_key="none", model=model, max_tokens=80, is_chat_model=True, max_retries=0, **more
    )


# No annotations as text here: the library looks the types of a tool up itself.


def chat(url: str, model: str) -> None:
    assert llm(url, model).chat([ChatMessage(role="user", content="Who are you?")]).message.content


def complete(url: str, model: str) -> None:
    assert llm(url, model, is_function_calling_model=False).complete("It was").text


def stream(url: str, model: str) -> None:
    messages = [ChatMessage(role="user", content="Who are you?")]
    assert "".join(chunk.delta or "" for chunk in llm(url, model).stream_chat(messages))


def tools(url: str, model: str) -> None:
    asked = llm(url, model, is_function_calling_model=True)
    tool = FunctionTool.from_defaults(get_weather)
    answer = asked.chat_with_tools([tool], user_msg="Weather in Rome?", tool_required=True)
    (call, *_) = asked.get_tool_calls_from_response(answer)
    check_weather(call.tool_kwargs)


def structured(url: str, model: str) -> None:
    asked = llm(url, model, is_function_calling_model=True, should_use_structured_outputs=True)
    answer = asked.as_structured_llm(Forecast).chat([ChatMessage(role="user", content="Will it rain?")])
    assert isinstance(answer.raw, Forecast)


run(
    "llama-index-llms-openai-like",
    {"chat": chat, "completion": complete, "stream": stream, "tools": tools, "structured output": structured},
)
