"""The model calls a function, we run it, the model gets the result.

Needs a model whose chat template knows tools: the bundled one, which makes a call because it has to, or Qwen, Llama 3,
Mistral, which make sense of it:
    make serve
    .venv/bin/pip install openai
    .venv/bin/python examples/03-tools.py
"""

from __future__ import annotations

import argparse
import json
from typing import Any

from openai import OpenAI

WEATHER: Any = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "description": "The weather of the next days.",
        "parameters": {
            "type": "object",
            "properties": {
                "city": {"enum": ["Paris", "Rome"]},
                "days": {"type": "integer", "minimum": 1, "maximum": 9},
            },
            "required": ["city", "days"],
            "additionalProperties": False,
        },
    },
}


def get_weather(city: str, days: int) -> str:
    return f"{city}: sun for {days} days"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--base-url", default="http://127.0.0.1:8000/v1")
    parser.add_argument("--api-key", default="none", help="needed only where the server was started with keys")
    options = parser.parse_args()
    client = OpenAI(base_url=options.base_url, api_key=options.api_key)
    model = client.models.list().data[0].id

    messages: list[Any] = [{"role": "user", "content": "What will the weather be in Rome this week?"}]
    # "required": the tokens are masked so that the answer is a valid call. "auto" leaves it to the model, "none"
    # forbids it, {"type": "function", "function": {"name": "get_weather"}} names the function.
    first = client.chat.completions.create(
        model=model, messages=messages, tools=[WEATHER], tool_choice="required", parallel_tool_calls=False
    )
    message = first.choices[0].message
    messages.append(message.model_dump(exclude_none=True))
    for call in message.tool_calls or []:
        assert call.type == "function"
        arguments = json.loads(call.function.arguments)
        print("call:", call.function.name, arguments)
        result = get_weather(**arguments)
        print("result:", result)
        messages.append({"role": "tool", "tool_call_id": call.id, "content": result})

    last = client.chat.completions.create(
        model=model, messages=messages, tools=[WEATHER], tool_choice="none", max_tokens=60
    )
    print("answer:", last.choices[0].message.content)


if __name__ == "__main__":
    main()
