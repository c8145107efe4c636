"""What no request may ask of the sampler: refused by the router and, again, by the worker."""

from __future__ import annotations

import math
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tandem.common.errors import TandemError
from tandem.common.sampling import MAX_LISTED_TOKENS, SamplingParams
from tandem.proto import worker_pb2
from tandem.worker.wire import request_from_proto

VOCAB = 5000
NUMBERS = ("temperature", "top_p", "min_p", "repetition_penalty", "presence_penalty", "frequency_penalty")
OUT_OF_RANGE: list[dict[str, Any]] = [
    *({name: value} for name in NUMBERS for value in (math.nan, math.inf, -math.inf, 1e300, -1e300)),
    {"repetition_penalty": 1e-40},
    {"repetition_penalty": 0.0},
    {"repetition_penalty": 0.0099},
    {"repetition_penalty": 10.1},
    {"temperature": -1e-40},
    {"temperature": 2.1},
    {"top_p": 0.0},
    {"top_p": 1.0001},
    {"min_p": 1.0001},
    {"presence_penalty": -2.1},
    {"frequency_penalty": 2.1},
    {"top_k": 2**31},
    {"logprobs": 21},
    {"prompt_logprobs": 4_000_000_000},
    {"min_tokens": 17},
    {"logit_bias": {1: math.nan}},
    {"logit_bias": {1: 0.0, 2: -math.inf}},
    {"logit_bias": {1: 100.5}},
    {"logit_bias": dict.fromkeys(range(MAX_LISTED_TOKENS + 1), 1.0)},
    {"stop_token_ids": (1,) * (MAX_LISTED_TOKENS + 1)},
    {"bad_words": ((1,) * 64,) * 65},
    {"bad_words": ((1,), ())},
]
NO_SUCH_TOKEN: list[dict[str, Any]] = [
    {"logit_bias": {VOCAB: 1.0}},
    {"allowed_token_ids": (VOCAB,)},
    {"stop_token_ids": (1, VOCAB)},
    {"bad_words": ((1, VOCAB),)},
]


def submit_with(params: SamplingParams) -> worker_pb2.Submit:
    key = worker_pb2.RequestKey(request_id="r", epoch=1)
    return worker_pb2.Submit(key=key, prompt_token_ids=[1], sampling=params.to_proto())


@pytest.mark.parametrize("fields", OUT_OF_RANGE, ids=lambda fields: repr(fields)[:40])
def test_a_worker_refuses_what_is_out_of_range_and_names_it(fields: dict[str, Any]) -> None:
    params = SamplingParams(**fields)
    with pytest.raises(TandemError) as refusal:
        params.check(VOCAB)
    assert (refusal.value.code, refusal.value.param) == ("invalid_request", next(iter(fields)))
    with pytest.raises(TandemError, match=next(iter(fields))):
        request_from_proto(submit_with(params))


@pytest.mark.parametrize("fields", NO_SUCH_TOKEN, ids=repr)
def test_tokens_are_in_the_vocabulary(fields: dict[str, Any]) -> None:
    with pytest.raises(TandemError, match=f"ids are 0 to {VOCAB - 1}") as refusal:
        SamplingParams(**fields).check(VOCAB)
    assert refusal.value.param == next(iter(fields))


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"stop_token_ids": (0, 1, 2, 3), "min_tokens": 1}, "stop_token_ids"),
        ({"stop_token_ids": (0, 1, 2), "bad_words": ((3,),), "min_tokens": 1}, "stop_token_ids"),
        ({"bad_words": ((0,), (1,), (2,), (3,))}, "bad_words"),
        ({"allowed_token_ids": (1, 2), "bad_words": ((1,), (2,))}, "bad_words"),
        (
            {"allowed_token_ids": (1, 2), "stop_token_ids": (1,), "bad_words": ((2,),), "min_tokens": 1},
            "stop_token_ids",
        ),
    ],
)
def test_settings_that_leave_no_token_are_refused(fields: dict[str, Any], param: str) -> None:
    params = SamplingParams(**fields)
    params.check(4)
    with pytest.raises(TandemError) as refusal:
        params.check_leaves_a_token(params.stop_token_ids, 4)
    assert (refusal.value.code, refusal.value.param) == ("invalid_request", param)


@pytest.mark.parametrize(
    "fields",
    [
        {"stop_token_ids": (0, 1, 2, 3)},
        {"stop_token_ids": (0, 1, 2), "min_tokens": 1},
        {"allowed_token_ids": (1,), "stop_token_ids": (1,), "min_tokens": 1},
        {"bad_words": ((0,), (1,), (2,), (3, 3))},
        {"allowed_token_ids": (1, 2), "bad_words": ((1,), (3,))},
        {"allowed_token_ids": (3,), "bad_words": ((0,), (1,), (2,))},
    ],
)
def test_settings_that_leave_one_token_pass(fields: dict[str, Any]) -> None:
    params = SamplingParams(**fields)
    params.check_leaves_a_token(params.stop_token_ids, 4)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("timeout_s", 1e300),
        ("timeout_s", math.nan),
        ("weight", 1e-300),
        ("weight", 1e300),
        ("tenant", "x" * 1000),
        ("cache_salt", b"x" * 100_000),
    ],
)
def test_a_worker_believes_nothing_else_of_a_request_either(field: str, value: Any) -> None:
    submit = submit_with(SamplingParams())
    setattr(submit, field, value)
    with pytest.raises(TandemError, match=field):
        request_from_proto(submit)


@given(st.dictionaries(st.sampled_from(NUMBERS), st.floats(width=64), max_size=6))
def test_numbers_that_pass_are_finite_in_single_precision_with_all_that_is_computed_of_them(
    fields: dict[str, float],
) -> None:
    params = SamplingParams(**fields)
    try:
        params.check(VOCAB)
    except TandemError:
        return
    logit = 1e4 / min(params.repetition_penalty, 1 / params.repetition_penalty) + 100
    logit += 2048 * abs(params.frequency_penalty) + abs(params.presence_penalty)
    assert logit / max(params.temperature, 1e-5) < 1e38
