"""Vectors of texts, and which text is nearest to a question.

Start the server first (`make serve`), then:
    .venv/bin/pip install openai
    .venv/bin/python examples/04-embeddings.py
"""

from __future__ import annotations

import argparse

from openai import OpenAI

TEXTS = ["The ship left the harbour in a storm.", "She opened the letter and wept.", "He ate bread and cheese."]
QUESTION = "The boat sailed out of the port in bad weather."


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--base-url", default="http://127.0.0.1:8000/v1")
    parser.add_argument("--api-key", default="none", help="needed only where the server was started with keys")
    options = parser.parse_args()
    client = OpenAI(base_url=options.base_url, api_key=options.api_key)
    model = client.models.list().data[0].id

    # `pooling`: mean of all tokens' states, or (the default) that of the last token. Vectors have length 1.
    answer = client.embeddings.create(model=model, input=[QUESTION, *TEXTS], extra_body={"pooling": "mean"})
    question, *texts = (item.embedding for item in answer.data)
    print(f"{len(question)} numbers each, {answer.usage.prompt_tokens} tokens read")
    print(QUESTION)
    for text, vector in zip(TEXTS, texts, strict=True):
        print(f"  {sum(a * b for a, b in zip(question, vector, strict=True)):.3f}  {text}")


if __name__ == "__main__":
    main()
