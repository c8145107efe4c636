"""Whatever one request does, only that request fails: attacks beside bystanders whose answers must not change."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tandem.engine.request import FinishReason
from tests.engine_harness import EngineUnderTest, tiny_llama
from tests.models import VOCAB_SIZE

PROMPT = [(i * 13) % 500 + 3 for i in range(60)]
BYSTANDERS: list[dict[str, Any]] = [
    {},
    {"temperature": 1.0, "seed": 5, "top_p": 0.9},
    {"logprobs": 2, "frequency_penalty": 0.5, "repetition_penalty": 1.2},
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_llama(tmp_path_factory.mktemp("models") / "llama")


@pytest.fixture
def engine(folder: Path) -> Iterator[EngineUnderTest]:
    with EngineUnderTest(folder) as running:
        yield running


class Beside:
    """Bystanders that answer while something is done to the engine that they are in."""

    def __init__(self, engine: EngineUnderTest) -> None:
        self._engine = engine
        self._alone = [
            engine.generate(f"alone {i}", PROMPT[i:], max_tokens=60, **options) for i, options in enumerate(BYSTANDERS)
        ]

    def __enter__(self) -> None:
        self._keys = [
            self._engine.submit(f"bystander {i}", PROMPT[i:], max_tokens=60, **options)
            for i, options in enumerate(BYSTANDERS)
        ]

    def __exit__(self, kind: Any, error: Any, traceback: Any) -> None:
        if kind is None:
            assert [self._engine.tokens(key) for key in self._keys] == self._alone


ATTACKS: dict[str, dict[str, Any]] = {
    "a penalty that overflows": {"repetition_penalty": 1e-40},
    "a temperature that is no number": {"temperature": float("nan")},
    "a bias that is no number": {"logit_bias": {5: float("nan")}},
    "an infinite penalty": {"presence_penalty": float("inf")},
    "stop tokens that cover the vocabulary": {"stop_token_ids": tuple(range(VOCAB_SIZE)), "min_tokens": 3},
    "bad words that cover the vocabulary": {"bad_words": tuple((token,) for token in range(VOCAB_SIZE))},
    "bad pairs that cover the vocabulary": {
        "bad_words": tuple((9, token) for token in range(VOCAB_SIZE)),
        "logit_bias": {9: 100.0},
    },
    "bias against the whole vocabulary, and none allowed": {
        "logit_bias": dict.fromkeys(range(VOCAB_SIZE), -100.0),
        "allowed_token_ids": (4, 5),
        "bad_words": ((4,), (5,)),
    },
    "more alternatives than there are": {"logprobs": 4_000_000_000},
}


@pytest.mark.parametrize("drawn", [{"temperature": 0.0}, {"temperature": 1.0}], ids=["greedy", "drawn"])
@pytest.mark.parametrize("attack", ATTACKS)
def test_a_hostile_request_fails_alone_with_an_error_of_its_own(
    engine: EngineUnderTest, attack: str, drawn: dict[str, Any]
) -> None:
    with Beside(engine):
        lasts = [engine.last(engine.submit(f"attack {i}", PROMPT, **(drawn | ATTACKS[attack]))) for i in range(3)]
    for last in lasts:
        assert (last.finish_reason, last.error_code) == (FinishReason.ERROR, "invalid_request"), last.error_message


EXTREMES: list[dict[str, Any]] = [
    {"repetition_penalty": 0.01, "temperature": 1e-300, "presence_penalty": -2.0, "frequency_penalty": -2.0},
    {"repetition_penalty": 10.0, "temperature": 5e-324, "top_p": 5e-324, "min_p": 1.0, "top_k": 2**31 - 1},
    {"logit_bias": dict.fromkeys(range(VOCAB_SIZE), -100.0), "temperature": 1e-40, "repetition_penalty": 0.01},
    {"logit_bias": dict.fromkeys(range(VOCAB_SIZE), 100.0), "temperature": 2.0, "logprobs": 20, "prompt_logprobs": 20},
    {"stop_token_ids": tuple(range(1, VOCAB_SIZE)), "min_tokens": 8, "max_tokens": 8},
    {"bad_words": tuple((token,) for token in range(1, VOCAB_SIZE)), "logprobs": 20, "top_k": 1},
]


@pytest.mark.parametrize("options", EXTREMES, ids=lambda options: " ".join(options))
def test_extreme_but_valid_settings_get_an_answer(engine: EngineUnderTest, options: dict[str, Any]) -> None:
    with Beside(engine):
        for i in range(3):
            assert engine.generate(f"extreme {i}", PROMPT, **({"temperature": 1.0, "seed": i} | options))
