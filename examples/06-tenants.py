"""Tenants: what a limited one sees of its limits, the answer when it is over them, and who has used how much.

Start the server with the example's tenants (`make serve ARGS="--tenants-file examples/tenants.yaml"`), then:
    .venv/bin/pip install openai
    .venv/bin/python examples/06-tenants.py
"""

from __future__ import annotations

import argparse
from typing import Any, cast

from openai import OpenAI, RateLimitError


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--base-url", default="http://127.0.0.1:8000/v1")
    options = parser.parse_args()

    # Left to itself the client waits and tries again after a 429, as it should; here we want to see it.
    visitor = OpenAI(base_url=options.base_url, api_key="visitors-key", max_retries=0)
    model = visitor.models.list().data[0].id
    for number in range(1, 5):
        try:
            answer = visitor.completions.with_raw_response.create(model=model, prompt="It was", max_tokens=5)
            headers = answer.headers
            print(
                f"request {number}: {answer.http_response.status_code},",
                f"{headers['x-ratelimit-remaining-requests']} of {headers['x-ratelimit-limit-requests']} requests and",
                f"{headers['x-ratelimit-remaining-tokens']} of {headers['x-ratelimit-limit-tokens']} tokens left",
            )
        except RateLimitError as error:
            print(f"request {number}: {error.status_code}, try again in {error.response.headers['retry-after']} s")
            print("  " + error.message)

    OpenAI(base_url=options.base_url, api_key="acme-key").completions.create(
        model=model, prompt="It was", max_tokens=5
    )  # has no limits, only a weight
    for name, key in (("visitors", "visitors-key"), ("operator", "operator-key")):
        client = OpenAI(base_url=options.base_url, api_key=key)
        usage = cast("dict[str, Any]", client.get("/usage", cast_to=object))
        print(f"usage, as {name} sees it:")
        for row in usage["data"]:
            print(
                f"  {row['tenant']}: {row['requests']} requests, {row['rejected']} rejected,",
                f"{row['prompt_tokens']} prompt tokens, {row['completion_tokens']} generated",
            )


if __name__ == "__main__":
    main()
