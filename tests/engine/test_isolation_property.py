"""Any request that can be asked for, however extreme, is answered or refused by itself: bystanders' answers are those
that they get alone."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from tandem.common.sampling import Constraint
from tandem.engine.request import FinishReason
from tests.engine_harness import EngineUnderTest, tiny_llama
from tests.models import VOCAB_SIZE

BYSTANDERS: list[dict[str, Any]] = [
    {},
    {"temperature": 1.0, "seed": 5, "top_p": 0.9, "top_k": 50},
    {"logprobs": 3, "frequency_penalty": 0.5, "repetition_penalty": 1.2, "prompt_logprobs": 1},
    {"constraint": Constraint("regex", "[a-z ]{8,30}"), "temperature": 0.7, "seed": 2, "ignore_eos": False},
]
PROMPTS = [[(n * 31 + i * 17) % 500 + 3 for i in range(20 + 9 * n)] for n in range(len(BYSTANDERS))]
EVERY = range(VOCAB_SIZE)


def extremes(low: float, high: float, *special: float) -> st.SearchStrategy[float]:
    inside = st.floats(low, high, exclude_min=low == 0.0 and 0.0 not in special)
    return inside | st.sampled_from([high, *special])


tokens = st.integers(0, VOCAB_SIZE - 1)
many = st.lists(tokens, max_size=8) | st.sampled_from([list(EVERY), list(EVERY)[1:], list(EVERY)[::2]])
constraints = st.sampled_from(
    [
        Constraint("regex", "(yes|no)"),
        Constraint("regex", "[^\\x00]*"),
        Constraint("json_schema", '{"type": "object", "additionalProperties": {"type": "integer"}}'),
        Constraint("lark", 'start: "a" start "b" | "c"'),
        Constraint("regex", "x{2000}"),
    ]
)
requests = st.fixed_dictionaries(
    {"max_tokens": st.integers(1, 12)},
    optional={
        "min_tokens": st.integers(0, 12),
        "temperature": extremes(0.0, 2.0, 0.0, 5e-324, 1e-40, 1e-5),
        "top_p": extremes(0.0, 1.0, 5e-324, 1e-9),
        "top_k": st.sampled_from([0, 1, 2, VOCAB_SIZE - 1, VOCAB_SIZE, 2**31 - 1]),
        "min_p": extremes(0.0, 1.0, 0.0, 5e-324),
        "repetition_penalty": extremes(0.01, 10.0, 0.01),
        "presence_penalty": extremes(-2.0, 2.0, -2.0),
        "frequency_penalty": extremes(-2.0, 2.0, -2.0),
        "logit_bias": st.dictionaries(tokens, extremes(-100.0, 100.0, -100.0), max_size=8)
        | st.sampled_from([dict.fromkeys(EVERY, -100.0), dict.fromkeys(EVERY, 100.0)]),
        "allowed_token_ids": many.map(tuple),
        "stop_token_ids": many.map(tuple),
        "bad_words": st.lists(st.lists(tokens, min_size=1, max_size=3).map(tuple), max_size=6).map(tuple)
        | st.sampled_from([tuple((token,) for token in EVERY), tuple((9, token) for token in EVERY)]),
        "seed": st.sampled_from([0, 1, 2**64 - 1]),
        "logprobs": st.sampled_from([0, 1, 20]),
        "prompt_logprobs": st.sampled_from([0, 20]),
        "ignore_eos": st.booleans(),
        "constraint": constraints,
    },
)


@pytest.fixture(scope="module")
def engine(tmp_path_factory: pytest.TempPathFactory) -> Iterator[EngineUnderTest]:
    folder = tiny_llama(tmp_path_factory.mktemp("models") / "llama")
    with EngineUnderTest(folder, enable_prefix_caching=False) as running:
        yield running


@pytest.fixture(scope="module")
def alone(engine: EngineUnderTest) -> list[list[int]]:
    return [
        engine.generate(f"alone {i}", PROMPTS[i], **({"max_tokens": 24} | options))
        for i, options in enumerate(BYSTANDERS)
    ]


_numbers = iter(range(10**9))


@settings(max_examples=60, deadline=None)
@given(st.lists(requests, min_size=1, max_size=4))
@example([{"max_tokens": 8, "min_tokens": 8, "stop_token_ids": tuple(EVERY)}])
@example([{"max_tokens": 8, "bad_words": tuple((9, token) for token in EVERY), "logit_bias": {9: 100.0}}])
@example(
    [{"max_tokens": 8, "repetition_penalty": 0.01, "temperature": 1e-40, "logprobs": 20, "frequency_penalty": -2.0}]
)
def test_bystanders_get_the_answers_that_they_get_alone(
    engine: EngineUnderTest, alone: list[list[int]], attacks: list[dict[str, Any]]
) -> None:
    number = next(_numbers)
    keys = [
        engine.submit(f"bystander {number} {i}", PROMPTS[i], **({"max_tokens": 24} | options))
        for i, options in enumerate(BYSTANDERS)
    ]
    engine.wait_tokens(keys[0], 2)
    others = [
        engine.submit(f"attack {number} {i}", [(i * 7 + j) % 500 + 3 for j in range(10)], **attack)
        for i, attack in enumerate(attacks)
    ]
    assert [engine.tokens(key) for key in keys] == alone
    for key in others:
        last = engine.last(key)
        assert last.error_code in ("", "invalid_request"), last.error_message
        assert last.finish_reason in (FinishReason.STOP, FinishReason.LENGTH) or last.error_message
        assert all(0 <= token < VOCAB_SIZE for token in engine.tokens_so_far(key))
        scores = [entry.logprob for output in engine.outputs[key] for entry in output.logprobs]
        assert all(math.isfinite(score) for score in scores)
