"""Talk to Tandem with the official OpenAI client: list models, a completion, a streaming chat.

Start the server first (`make serve`), then:
    .venv/bin/pip install openai
    .venv/bin/python examples/01-openai-client.py
"""

from __future__ import annotations

import argparse

from openai import OpenAI


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--base-url", default="http://127.0.0.1:8000/v1")
    parser.add_argument("--api-key", default="none", help="needed only where the server was started with keys")
    options = parser.parse_args()
    client = OpenAI(base_url=options.base_url, api_key=options.api_key)

    models = [model.id for model in client.models.list()]
    print("models:", ", ".join(models))

    completion = client.completions.create(
        model=models[0], prompt="It was a dark evening, and", max_tokens=60, temperature=0.7, seed=1
    )
    print("\ncompletion: It was a dark evening, and" + completion.choices[0].text)

    print("\nchat:", end=" ")
    stream = client.chat.completions.create(
        model=models[0],
        messages=[{"role": "user", "content": "Who are you?"}],
        max_tokens=80,
        temperature=0.7,
        seed=1,
        stream=True,
        stream_options={"include_usage": True},
    )
    for chunk in stream:
        if chunk.choices:
            print(chunk.choices[0].delta.content or "", end="", flush=True)
        if chunk.usage:
            print(f"\n\n{chunk.usage.prompt_tokens} prompt tokens, {chunk.usage.completion_tokens} generated")


if __name__ == "__main__":
    main()
