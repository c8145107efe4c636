from __future__ import annotations

from typing import Literal

from features import check_weather, run
from langchain_core.messages import HumanMessage, ToolMessage
from langchain_core.tools import tool
from langchain_openai import ChatOpenAI, OpenAIEmbeddings
from pydantic import BaseModel


@tool
def get_weather(city: Literal["Paris", "Rome"], days: Literal[1, 2]) -> str:
    """Forecast for a city."""
    return f"sun in {city} for {days} days"


class Forecast(BaseModel):
    """A forecast."""

    rain: bool
    wind: Literal[1, 2]


def llm(url: str, model: str) -> ChatOpenAI:
    return ChatOpenAI(base_url=url, api_key="none", model=model, max_tokens=80, temperature=0, max_retries=0)


def chat(url: str, model: str) -> None:
    assert llm(url, model).invoke("Who are you?").content


def stream(url: str, model: str) -> None:
    assert "".join(str(chunk.content) for chunk in llm(url, model).stream("Who are you?"))


def tools(url: str, model: str) -> None:
    bound = llm(url, model).bind_tools([get_weather], tool_choice="any")
    question = HumanMessage("What is the weather in Rome?")
    answer = bound.invoke([question])
    (call, *_) = answer.tool_calls
    assert call["name"] == "get_weather"
    check_weather(call["args"])
    result = ToolMessage("sun", tool_call_id=call["id"])
    assert llm(url, model).bind_tools([get_weather]).invoke([question, answer, result]) is not None


def structured(url: str, model: str) -> None:
    for method in ("json_schema", "function_calling"):
        asked = llm(url, model).with_structured_output(Forecast, method=method)
        assert isinstance(asked.invoke("Will it rain?"), Forecast), method


def embeddings(url: str, model: str) -> None:
    embed = OpenAIEmbeddings(base_url=url, api_key="none", model=model, check_embedding_ctx_length=False)
    assert len(embed.embed_documents(["one", "two"])) == 2


run(
    "langchain-openai",
    {"chat": chat, "stream": stream, "tools": tools, "structured output": structured, "embeddings": embeddings},
)
