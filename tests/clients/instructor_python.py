from __future__ import annotations

from typing import Any, Literal

import instructor
from features import MESSAGES, run
from openai import OpenAI
from pydantic import BaseModel


class Forecast(BaseModel):
    """A forecast."""

    rain: bool
    city: Literal["Paris", "Rome"]


def ask(url: str, model: str, mode: instructor.Mode, **fields: Any) -> Any:
    client = instructor.from_openai(OpenAI(base_url=url, api_key="none", max_retries=0), mode=mode)
    return client.chat.completions.create(
        model=model, messages=MESSAGES, max_tokens=80, max_retries=0, response_model=Forecast, **fields
    )


def tools(url: str, model: str) -> None:
    assert isinstance(ask(url, model, instructor.Mode.TOOLS), Forecast)


def json_schema(url: str, model: str) -> None:
    assert isinstance(ask(url, model, instructor.Mode.JSON_SCHEMA), Forecast)


def partial(url: str, model: str) -> None:
    client = instructor.from_openai(OpenAI(base_url=url, api_key="none", max_retries=0), mode=instructor.Mode.TOOLS)
    parts = list(
        client.chat.completions.create_partial(
            model=model, messages=MESSAGES, max_tokens=80, max_retries=0, response_model=Forecast
        )
    )
    assert parts[-1].city in ("Paris", "Rome")


run("instructor", {"tools": tools, "json schema": json_schema, "partial, streamed": partial})
