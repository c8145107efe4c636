"""Why a request went where it went, and where its time was spent.

Start the server first (`make serve`), then:
    .venv/bin/pip install openai
    .venv/bin/python examples/07-explain.py
"""

from __future__ import annotations

import argparse
from typing import Any, cast

from openai import OpenAI


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--base-url", default="http://127.0.0.1:8000/v1")
    parser.add_argument("--api-key", default="none", help="needed only where the server was started with keys")
    options = parser.parse_args()
    client = OpenAI(base_url=options.base_url, api_key=options.api_key)
    model = client.models.list().data[0].id

    answer = client.completions.create(
        model=model,
        prompt="It was a dark evening, and the wind blew from the sea. " * 20,
        max_tokens=8,
        extra_headers={"x-tandem-explain": "1"},
    )
    show(cast("dict[str, Any]", (answer.model_extra or {})["explain"]))

    # The same later, for the latest requests of a tenant, by the x-request-id of the answer.
    account = cast("dict[str, Any]", client.get(f"/requests/{answer._request_id}", cast_to=object))
    print(f"looked up: request {account['id']} was {account['outcome']}")


def show(explain: dict[str, Any]) -> None:
    print(f"{explain['prompt_tokens']} prompt tokens, done after {explain['finished_s'] * 1000:.0f} ms")
    for attempt in explain["attempts"]:
        print(f"ran on: decode {attempt['decode']}, prefill {attempt['prefill']} ({attempt['reason']})")
        for stage, seconds in attempt["stages"].items():
            print(f"  {stage.removesuffix('_s')}: {seconds * 1000:.1f} ms")
        for candidate in attempt["candidates"]:
            terms = {name: value for name, value in candidate.items() if name.endswith("_s") and value}
            costs = ", ".join(f"{name.removesuffix('_s')} {value * 1000:.1f}" for name, value in terms.items())
            print(f"  candidate {candidate['decode']} with {candidate['prefill']}, expected ms: {costs}")


if __name__ == "__main__":
    main()
