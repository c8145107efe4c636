"""Answers that follow a JSON schema, and answers that are one of a few words.

The worker masks every token that would break the form, so even the small bundled model cannot leave it.

Start the server first (`make serve`), then:
    .venv/bin/pip install openai
    .venv/bin/python examples/02-structured-output.py
"""

from __future__ import annotations

import argparse
import json

from openai import OpenAI

SCHEMA = {
    "type": "object",
    "properties": {
        "place": {"enum": ["London", "Paris", "the sea"]},
        "year": {"type": "integer", "minimum": 1800, "maximum": 1899},
        "ghosts": {"type": "boolean"},
    },
    "required": ["place", "year", "ghosts"],
    "additionalProperties": False,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--base-url", default="http://127.0.0.1:8000/v1")
    parser.add_argument("--api-key", default="none", help="needed only where the server was started with keys")
    options = parser.parse_args()
    client = OpenAI(base_url=options.base_url, api_key=options.api_key)
    model = client.models.list().data[0].id

    chat = client.chat.completions.create(
        model=model,
        messages=[{"role": "user", "content": "Where and when does the novel play?"}],
        response_format={"type": "json_schema", "json_schema": {"name": "setting", "schema": SCHEMA}},
        seed=1,
    )
    print("setting:", json.loads(chat.choices[0].message.content or ""))

    # vLLM's fields work too: guided_choice, guided_regex, guided_json, guided_grammar.
    completion = client.completions.create(
        model=model, prompt="Was it a dark evening?", extra_body={"guided_choice": ["yes", "no"]}, seed=1
    )
    print("dark:", completion.choices[0].text)


if __name__ == "__main__":
    main()
