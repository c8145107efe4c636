"""Fields of requests that reach into the engine, through a running platform."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.e2e.serving import Serve
from tests.models import VOCAB_SIZE

MakePrompt = Callable[[int], list[int]]
CONTEXT = 1024


@pytest.fixture(params=["always", "never"])
def serve(serves: Callable[..., Serve], tiny: Path, request: pytest.FixtureRequest) -> Serve:
    return serves(tiny, "--disaggregate", request.param, "--dtype", "float32")


def completion(serve: Serve, prompt: list[int], **fields: Any) -> dict[str, Any]:
    choice: dict[str, Any] = serve.complete(prompt, **fields)["choices"][0]
    return choice


def scored_by_transformers(model: Path, tokens: list[int]) -> list[float]:
    """Log-probabilities of all tokens but the first."""
    import torch
    from transformers import AutoModelForCausalLM

    loaded = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    with torch.inference_mode():
        scores = loaded(torch.tensor([tokens])).logits[0, :-1].log_softmax(-1)
    return [float(row[token]) for row, token in zip(scores, tokens[1:], strict=True)]


def test_prompt_logprobs_are_those_of_transformers(serve: Serve, tiny: Path, prompt: MakePrompt) -> None:
    tokens = prompt(60)
    expected = scored_by_transformers(tiny, tokens)
    for fields in ({"max_tokens": 0}, {"max_tokens": 3}):
        scored = completion(serve, tokens, prompt_logprobs=2, **fields)["prompt_logprobs"]
        assert scored[0] is None
        found = [entry[str(token)]["logprob"] for token, entry in zip(tokens[1:], scored[1:], strict=True)]
        assert found == pytest.approx(expected, abs=1e-3)
        assert all(2 <= len(entry) <= 3 for entry in scored[1:])


def test_a_full_context_is_read_where_nothing_is_generated(serve: Serve, tiny: Path, prompt: MakePrompt) -> None:
    tokens = prompt(CONTEXT)
    choice = completion(serve, tokens, max_tokens=0, echo=True, logprobs=0)
    assert (choice["token_ids"], choice["finish_reason"]) == ([], "length")
    assert choice["logprobs"]["token_logprobs"][1:] == pytest.approx(scored_by_transformers(tiny, tokens), abs=1e-3)
    assert serve.http.post("/v1/embeddings", json={"input": tokens}).status_code == 200


def test_bad_words_are_not_written(serve: Serve) -> None:
    tokens = list(range(20, 60))
    plain = completion(serve, tokens, max_tokens=40)["token_ids"]
    words = {token: word for token in plain if (word := word_of(serve, token))}
    assert words, "some of what it writes are words of one token"
    written = completion(serve, tokens, max_tokens=40, bad_words=list(words.values()))["token_ids"]
    assert not set(written) & set(words)
    assert len(written) == 40


def word_of(serve: Serve, token: int) -> str:
    """Text that the tokenizer reads as this one token; empty where there is none."""
    text: str = serve.http.post("/detokenize", json={"tokens": [token]}).json()["prompt"]
    body = {"prompt": text.strip(), "add_special_tokens": False}
    found: list[int] = serve.http.post("/tokenize", json=body).json()["tokens"] if text.strip() else []
    return text.strip() if found == [token] else ""


def test_a_cut_prompt_gives_what_its_end_gives(serve: Serve, prompt: MakePrompt) -> None:
    tokens = prompt(200)
    cut = completion(serve, tokens, max_tokens=8, truncate_prompt_tokens=50)
    assert cut["prompt_token_ids"] == tokens[-50:]
    assert cut["token_ids"] == completion(serve, tokens[-50:], max_tokens=8)["token_ids"]
    assert max(cut["token_ids"]) < VOCAB_SIZE
