"""What a router spends on requests that are large, and on those that are too large."""

from __future__ import annotations

import asyncio

import httpx
import pytest
from tokenizers import Tokenizer

from tandem.router.text import tokenizer
from tandem.router.web import body_memory
from tests.router.conftest import House, until
from tests.router.fake_worker import Script

CONTEXT = 1024
"""Of the test model."""


@pytest.mark.parametrize(
    ("path", "field", "param"),
    [
        ("/v1/completions", {"prompt": "a b " * 250_000}, "prompt"),
        ("/v1/completions", {"prompt": ["a", "a b " * 250_000]}, "prompt[1]"),
        ("/v1/chat/completions", {"messages": [{"role": "user", "content": "a b " * 250_000}]}, "messages"),
        ("/v1/embeddings", {"input": "a b " * 250_000}, "input"),
        ("/v1/responses", {"input": "a b " * 250_000}, "input"),
    ],
)
async def test_a_text_far_too_long_is_not_tokenized_as_a_whole(
    bare_client: httpx.AsyncClient, monkeypatch: pytest.MonkeyPatch, path: str, field: dict[str, object], param: str
) -> None:
    lengths: list[int] = []
    encode = tokenizer._encode

    def counting(by: Tokenizer, texts: list[str], add_special_tokens: bool) -> list[list[int]]:
        lengths.extend(map(len, texts))
        return encode(by, texts, add_special_tokens)

    monkeypatch.setattr(tokenizer, "_encode", counting)
    response = await bare_client.post(path, json=field)
    error = response.json()["error"]
    assert (response.status_code, error["code"], error["param"]) == (400, "context_length_exceeded", param)
    assert sum(lengths) < 20 * CONTEXT


async def test_a_long_text_of_long_tokens_is_taken(house: House) -> None:
    """More characters than usual, and still within the context."""
    worker = await house.decode(max_model_len=CONTEXT)
    client = await house.client(await house.router(worker))
    text = "<|endoftext|>" * 800
    assert len(text) > 8 * CONTEXT
    answer = await client.post("/v1/completions", json={"prompt": text, "max_tokens": 1})
    assert answer.status_code == 200, answer.text
    assert len(worker.submits[0].prompt_token_ids) == 800


async def test_large_bodies_share_a_bound(house: House, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(body_memory, "MAX_HELD_BYTES", 10_000)
    worker, client = await house.pair(Script(hold_after=1))
    large = {"prompt": "a", "max_tokens": 2, "user": "x" * 2000}
    held = [asyncio.create_task(client.post("/v1/completions", json=large)) for _ in range(2)]
    await until(lambda: len(worker.submits) == 2)
    refused = await client.post("/v1/completions", json=large)
    assert (refused.status_code, refused.json()["error"]["code"]) == (503, "overloaded")
    assert refused.headers["retry-after"] == "1"
    small = asyncio.create_task(client.post("/v1/completions", json={"prompt": "a", "max_tokens": 1}))
    await until(lambda: len(worker.submits) == 3)
    worker.resume.set()
    assert [(await task).status_code for task in (*held, small)] == [200] * 3
    assert body_memory.held_bytes() == 0
    assert (await client.post("/v1/completions", json=large)).status_code == 200
