"""A batch: a file of requests that nobody waits for, run on what other clients leave over.

Start the server with a folder for files (`make serve ARGS="--storage /tmp/tandem-files"`), then:
    .venv/bin/pip install openai
    .venv/bin/python examples/05-batches.py
"""

from __future__ import annotations

import argparse
import json
import time

from openai import OpenAI

NAMES = ["Alice", "Bob", "Carol", "Dan"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--base-url", default="http://127.0.0.1:8000/v1")
    parser.add_argument("--api-key", default="none", help="needed only where the server was started with keys")
    options = parser.parse_args()
    client = OpenAI(base_url=options.base_url, api_key=options.api_key)

    lines = [
        {
            "custom_id": name,
            "method": "POST",
            "url": "/v1/chat/completions",
            "body": {"messages": [{"role": "user", "content": f"Tell me of {name}."}], "max_tokens": 20, "seed": 1},
        }
        for name in NAMES
    ]
    content = "".join(json.dumps(line) + "\n" for line in lines)
    file = client.files.create(purpose="batch", file=("requests.jsonl", content.encode()))
    batch = client.batches.create(input_file_id=file.id, endpoint="/v1/chat/completions", completion_window="24h")
    while batch.status in ("validating", "in_progress", "finalizing"):
        time.sleep(0.2)
        batch = client.batches.retrieve(batch.id)
    counts = batch.request_counts
    assert counts is not None
    print(f"{batch.status}: {counts.completed} of {counts.total} requests done, {counts.failed} failed")

    if batch.output_file_id:  # results come in any order; custom_id says whose they are
        for line in client.files.content(batch.output_file_id).text.splitlines():
            result = json.loads(line)
            print(f"{result['custom_id']}: {result['response']['body']['choices'][0]['message']['content']}")
    for file_id in (file.id, batch.output_file_id, batch.error_file_id):
        if file_id:
            client.files.delete(file_id)


if __name__ == "__main__":
    main()
