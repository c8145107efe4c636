"""What a client gets is the model's own greedy output, whichever way the request takes through the platform."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from tests.e2e.serving import Serve, eventually

MakePrompt = Callable[[int], list[int]]
SPLIT = ("--disaggregate", "always", "--dtype")


@pytest.fixture
def split(serves: Callable[..., Serve], tiny: Path) -> Serve:
    return serves(tiny, *SPLIT, "float32")


def reference(model: Path, prompt: list[int], max_tokens: int) -> list[int]:
    """Greedy tokens of `transformers` in float32, the end-of-sequence token allowed like any other."""
    import torch
    from transformers import AutoModelForCausalLM

    loaded = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    tokens = list(prompt)
    with torch.inference_mode():
        for _ in range(max_tokens):
            tokens.append(int(loaded(torch.tensor([tokens])).logits[0, -1].argmax()))
    return tokens[len(prompt) :]


@pytest.mark.parametrize("length", [1, 17, 300, 900])
def test_a_handed_over_request_gives_the_tokens_of_transformers(
    split: Serve, tiny: Path, prompt: MakePrompt, length: int
) -> None:
    tokens = prompt(length)
    before = split.handovers(), split.recomputes()
    assert split.tokens(tokens, 24) == reference(tiny, tokens, 24)
    assert (split.handovers(), split.recomputes()) == (before[0] + 1, before[1])


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_unified_and_disaggregated_agree(
    serves: Callable[..., Serve], tiny: Path, prompt: MakePrompt, dtype: str
) -> None:
    split, unified = serves(tiny, *SPLIT, dtype), serves(tiny, "--prefill", "0", "--dtype", dtype)
    before = split.handovers(), split.recomputes()
    for length in (5, 64, 700):
        tokens = prompt(length)
        assert split.tokens(tokens, 32) == unified.tokens(tokens, 32)
    assert (split.handovers(), split.recomputes()) == (before[0] + 3, before[1])


def test_streaming_gives_the_same_tokens_as_they_come(split: Serve, prompt: MakePrompt) -> None:
    tokens = prompt(40)
    events = list(split.stream(tokens, 400))
    streamed = [token for event in events for choice in event["choices"] for token in choice.get("token_ids") or []]
    assert streamed == split.tokens(tokens, 400)
    assert len(events) > 3  # tokens that a tiny model makes faster than they can be sent share an event


def test_requests_do_not_disturb_each_other(split: Serve, prompt: MakePrompt) -> None:
    prompts = [prompt(length) for length in (3, 30, 120, 250, 500, 700, 90, 16)]
    alone = [split.tokens(tokens, 24) for tokens in prompts]
    with ThreadPoolExecutor(len(prompts)) as pool:
        together = list(pool.map(lambda tokens: split.tokens([*tokens], 24), prompts))
    assert together == alone


def test_a_second_turn_reuses_the_prefix(split: Serve, prompt: MakePrompt) -> None:
    first = prompt(200)
    answer = split.tokens(first, 16)
    body = split.complete([*first, *answer, *prompt(10)], 8)
    assert body["usage"]["prompt_tokens_details"]["cached_tokens"] >= 192


def test_one_token_and_a_stop_token_end_at_once(split: Serve, prompt: MakePrompt) -> None:
    tokens = prompt(50)
    (first, second) = split.tokens(tokens, 2)
    assert split.tokens(tokens, 1) == [first]
    body = split.complete(tokens, 9, stop_token_ids=[second], min_tokens=0)
    assert body["choices"][0]["finish_reason"] == "stop"


def test_nothing_is_left_behind(split: Serve, prompt: MakePrompt) -> None:
    split.tokens(prompt(100), 4)
    eventually(split.idle, what="workers idle")
    eventually(split.all_blocks_free, what="blocks free")
