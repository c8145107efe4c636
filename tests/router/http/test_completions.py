"""/v1/completions, whole answers."""

from __future__ import annotations

import httpx
import pytest

from tandem.common.secret import derive
from tandem.kvstore.identity import SALT_PURPOSE, keyed_salt
from tandem.router.tenants.caller import ANYBODY
from tandem.router.text.tokenizer import ModelText
from tests.router.conftest import House, events, joined
from tests.router.fake_worker import Script


@pytest.fixture
def text(house: House) -> ModelText:
    return ModelText(house.model)


async def test_all_four_prompt_forms(house: House, text: ModelText) -> None:
    worker, client = await house.pair()
    river, hello = [await text.encode(given, add_special_tokens=True) for given in ("The river", "Hello")]
    for prompt, expected in (
        ("The river", [river]),
        (["The river", "Hello"], [river, hello]),
        (river, [river]),
        ([river, hello], [river, hello]),
    ):
        worker.submits.clear()
        answer = (await client.post("/v1/completions", json={"prompt": prompt, "max_tokens": 4})).json()
        assert [list(submit.prompt_token_ids) for submit in worker.submits] == expected
        assert [choice["index"] for choice in answer["choices"]] == list(range(len(expected)))
        for choice, ids in zip(answer["choices"], expected, strict=True):
            assert choice["text"] == text.decode([ids[i % len(ids)] for i in range(4)])
        assert answer["usage"]["prompt_tokens"] == sum(map(len, expected))
        assert answer["usage"]["completion_tokens"] == 4 * len(expected)


async def test_answer_has_openais_shape(house: House) -> None:
    _, client = await house.pair(Script(cached_tokens=2))
    response = await client.post("/v1/completions", json={"model": "tiny", "prompt": "Hello world", "max_tokens": 1})
    answer = response.json()
    assert answer["id"] == f"cmpl-{response.headers['x-request-id']}"
    assert (answer["object"], answer["model"]) == ("text_completion", "tiny")
    assert answer["choices"][0]["finish_reason"] == "length"
    assert answer["usage"]["prompt_tokens_details"] == {
        "cached_tokens": 2,
        "cached_tokens_by_tier": {"device": 2},
    }
    assert answer["usage"]["total_tokens"] == answer["usage"]["prompt_tokens"] + 1


async def test_defaults_come_from_openai_and_generation_config(house: House) -> None:
    worker, client = await house.pair()
    await client.post("/v1/completions", json={"prompt": "Hello"})
    sampling = worker.submits[0].sampling
    assert (sampling.max_tokens, sampling.temperature, sampling.top_p) == (16, 0.7, 0.9)
    assert sampling.HasField("seed"), "drawn by the router, so that another worker could go on"
    assert not sampling.HasField("logprobs")


async def test_every_sampling_field_reaches_the_worker(house: House) -> None:
    worker, client = await house.pair()
    fields = {
        "max_tokens": 3, "min_tokens": 2, "temperature": 0, "top_p": 0.5, "top_k": 7, "min_p": 0.1,
        "repetition_penalty": 1.1, "presence_penalty": -1, "frequency_penalty": 0.5, "seed": -1,
        "stop_token_ids": [5, 6], "ignore_eos": True, "allowed_token_ids": [1, 2, 3],
    }  # fmt: skip
    body = {"prompt": "Hello", "logit_bias": {"7": -100}, "priority": -3, "cache_salt": "us", "logprobs": 4, **fields}
    assert (await client.post("/v1/completions", json=body)).status_code == 200
    submit = worker.submits[0]
    for name, value in fields.items():
        got = getattr(submit.sampling, name)
        assert (list(got) if isinstance(value, list) else got) == (2**64 - 1 if name == "seed" else value), name
    assert dict(submit.sampling.logit_bias) == {7: -100.0}
    salt = keyed_salt(derive(b"", SALT_PURPOSE), ANYBODY.cache_salt("us"))
    assert (submit.sampling.logprobs, submit.priority, submit.cache_salt) == (4, -3, salt)
    assert 0 < submit.timeout_s <= 600


async def test_n_choices_have_seeds_of_their_own(house: House) -> None:
    worker, client = await house.pair()
    answer = (await client.post("/v1/completions", json={"prompt": "Hello", "n": 3, "seed": 7})).json()
    assert sorted(submit.sampling.seed for submit in worker.submits) == [7, 8, 9]
    assert len({submit.key.request_id for submit in worker.submits}) == 3
    assert [choice["index"] for choice in answer["choices"]] == [0, 1, 2]
    assert answer["usage"]["prompt_tokens"] == len(worker.submits[0].prompt_token_ids)


async def test_stop_token_is_counted_but_not_shown(house: House, text: ModelText) -> None:
    a, b, c = (await text.encode("a b c", add_special_tokens=False))[:3]
    _, client = await house.pair(Script(tokens=lambda _: [a, b, c, a], stop_token_id=c))
    body = {"prompt": "Hello", "return_token_ids": True, "stop_token_ids": [c]}
    answer = (await client.post("/v1/completions", json=body)).json()
    choice = answer["choices"][0]
    assert choice["text"] == text.decode([a, b])
    assert (choice["finish_reason"], choice["stop_reason"]) == ("stop", c)
    assert choice["token_ids"] == [a, b, c]
    assert choice["prompt_token_ids"] == await text.encode("Hello", add_special_tokens=True)
    assert answer["usage"]["completion_tokens"] == 3


async def test_stop_string_ends_the_workers_request(house: House, text: ModelText) -> None:
    ids = await text.encode("one STOP two three", add_special_tokens=False)
    _, client = await house.pair(Script(tokens=lambda _: ids, per_output=3))
    body = {"prompt": "Hello", "stop": ["STOP", "never"], "max_tokens": 100, "return_token_ids": True}
    answer = (await client.post("/v1/completions", json=body)).json()
    choice = answer["choices"][0]
    assert choice["text"] == "one "
    assert (choice["finish_reason"], choice["stop_reason"]) == ("stop", "STOP")
    assert answer["usage"]["completion_tokens"] == len(choice["token_ids"])
    assert text.decode(choice["token_ids"]).startswith("one STOP")
    assert "STOP" not in text.decode(choice["token_ids"][:-1])


async def test_stop_string_can_stay_in_the_text(house: House, text: ModelText) -> None:
    ids = await text.encode("one STOP two", add_special_tokens=False)
    _, client = await house.pair(Script(tokens=lambda _: ids))
    body = {"prompt": "Hello", "stop": "STOP", "include_stop_str_in_output": True}
    assert (await client.post("/v1/completions", json=body)).json()["choices"][0]["text"] == "one STOP"


async def test_echo_with_logprobs_covers_prompt_and_output(house: House, text: ModelText) -> None:
    worker, client = await house.pair()
    body = {"prompt": "The river ran", "echo": True, "logprobs": 2, "max_tokens": 2}
    choice = (await client.post("/v1/completions", json=body)).json()["choices"][0]
    ids = await text.encode("The river ran", add_special_tokens=True)
    tokens = [text.token_text(i) for i in [*ids, *ids[:2]]]
    logprobs = choice["logprobs"]
    assert choice["text"] == "The river ran" + text.decode(ids[:2])
    assert logprobs["tokens"] == tokens
    assert logprobs["token_logprobs"] == [None] + [-0.5] * (len(tokens) - 1)
    assert logprobs["top_logprobs"][0] is None
    assert logprobs["top_logprobs"][1][tokens[1]] == -0.5
    assert logprobs["text_offset"] == [sum(map(len, tokens[:i])) for i in range(len(tokens))]
    assert worker.submits[0].sampling.prompt_logprobs == 2


async def test_echo_without_output_scores_the_prompt(house: House) -> None:
    _, client = await house.pair()
    body = {"prompt": "The river ran", "echo": True, "logprobs": 1, "max_tokens": 0}
    answer = (await client.post("/v1/completions", json=body)).json()
    assert answer["choices"][0]["text"] == "The river ran"
    assert len(answer["choices"][0]["logprobs"]["tokens"]) == answer["usage"]["prompt_tokens"]
    assert answer["usage"]["completion_tokens"] == 0


async def test_streamed_logprobs_and_token_ids_add_up_to_the_whole(house: House) -> None:
    _, client = await house.pair(Script(per_output=2))
    body = {"prompt": "The river ran", "logprobs": 1, "return_token_ids": True, "max_tokens": 7, "echo": True}
    whole = (await client.post("/v1/completions", json=body)).json()["choices"][0]
    response = await client.post("/v1/completions", json={**body, "stream": True})
    chunks = [event["choices"][0] for event in events(response.text) if event != "[DONE]"]
    assert "".join(chunk["text"] for chunk in chunks) == whole["text"]
    assert joined(chunk["token_ids"] for chunk in chunks) == whole["token_ids"]
    assert chunks[0]["prompt_token_ids"] == whole["prompt_token_ids"]
    for name in ("tokens", "token_logprobs", "text_offset", "top_logprobs"):
        assert joined((chunk["logprobs"] or {}).get(name, []) for chunk in chunks) == whole["logprobs"][name]


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({}, "prompt"),
        ({"prompt": []}, "prompt"),
        ({"prompt": ""}, "prompt"),
        ({"prompt": [1, "a"]}, "prompt"),
        ({"prompt": [5, 512]}, "prompt"),
        ({"prompt": [[1], []]}, "prompt[1]"),
        ({"prompt": [True]}, "prompt[0]"),
        ({"prompt": "a", "n": 0}, "n"),
        ({"prompt": "a", "n": 10**400}, "n"),
        ({"prompt": ["a"] * 10, "n": 16}, "prompt"),
        ({"prompt": "a", "temperature": 2.1}, "temperature"),
        ({"prompt": "a", "temperature": "hot"}, "temperature"),
        ({"prompt": "a", "top_p": 0}, "top_p"),
        ({"prompt": "a", "top_k": -2}, "top_k"),
        ({"prompt": "a", "logprobs": 21}, "logprobs"),
        ({"prompt": "a", "max_tokens": 0}, "max_tokens"),
        ({"prompt": "a", "min_tokens": 17}, "min_tokens"),
        ({"prompt": "a", "stop": [""]}, "stop"),
        ({"prompt": "a", "stop": ["x"] * 17}, "stop"),
        ({"prompt": "a", "logit_bias": {"x": 1}}, "logit_bias"),
        ({"prompt": "a", "logit_bias": {"1": 101}}, "logit_bias"),
        ({"prompt": "a", "allowed_token_ids": []}, "allowed_token_ids"),
        ({"prompt": "a", "stop_token_ids": [9999]}, "stop_token_ids"),
        ({"prompt": "a", "suffix": "b"}, "suffix"),
        ({"prompt": "a", "best_of": 2}, "best_of"),
        ({"prompt": "a", "stream_options": {"include_usage": True}}, "stream_options"),
        ({"prompt": "a", "seed": 2**64}, "seed"),
        ({"prompt": "a", "response_format": {"type": "yaml"}}, "response_format.type"),
        ({"prompt": "a", "guided_regex": "(" * 1000}, "guided_regex"),
    ],
)
async def test_bad_fields_are_named(bare_client: httpx.AsyncClient, body: dict[str, object], param: str) -> None:
    response = await bare_client.post("/v1/completions", json=body)
    error = response.json()["error"]
    assert (response.status_code, error["param"], error["code"]) == (400, param, "invalid_request")
    assert error["type"] == "invalid_request_error"
    assert len(error["message"]) < 300


async def test_over_long_prompt_says_the_numbers(house: House) -> None:
    _, client = await house.pair()
    response = await client.post("/v1/completions", json={"prompt": [5] * 512})
    error = response.json()["error"]
    assert (response.status_code, error["code"], error["param"]) == (400, "context_length_exceeded", "prompt")
    assert "512" in error["message"]
    response = await client.post("/v1/completions", json={"prompt": [5] * 500, "max_tokens": 13})
    assert response.json()["error"]["code"] == "context_length_exceeded"
    response = await client.post("/v1/completions", json={"prompt": [5] * 500})
    assert response.json()["usage"]["completion_tokens"] == 12, "the default is cut to what fits"
