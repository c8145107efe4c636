"""Fields that say what the model reads (cut prompts, special tokens, continued messages), and what is told of it."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import httpx
import pytest
from tokenizers import processors

from tandem.router.text.tokenizer import ModelText
from tests.router.conftest import CHATML, House, events
from tests.router.fake_worker import Script

CONTEXT = 512
"""Tokens that a fake worker holds."""
TALK = [{"role": "user", "content": "The river ran"}, {"role": "assistant", "content": "under the "}]


@pytest.fixture
def text(house: House) -> ModelText:
    return ModelText(house.model)


@pytest.fixture
def own_model(house: House, tmp_path: Path) -> Path:
    """A copy of the house's model that a test may change."""
    house.model = Path(shutil.copytree(house.model, tmp_path / "own"))
    return house.model


def with_template(model: Path, template: str) -> None:
    config = json.loads((model / "tokenizer_config.json").read_text())
    (model / "tokenizer_config.json").write_text(json.dumps(config | {"chat_template": template}))


def with_special_tokens_around(model: Path) -> ModelText:
    text = ModelText(model)
    tokenizer = text._tokenizer
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<|im_start|> $A <|im_end|>", special_tokens=[("<|im_start|>", 1), ("<|im_end|>", 2)]
    )
    tokenizer.save(str(model / "tokenizer.json"))
    return ModelText(model)


async def prompt_of(client: httpx.AsyncClient, worker: Any, path: str, body: dict[str, object]) -> list[int]:
    worker.submits.clear()
    response = await client.post(path, json=body)
    assert response.status_code == 200, response.text
    return list(worker.submits[0].prompt_token_ids)


@pytest.mark.parametrize("side", [None, "left", "right"])
async def test_a_prompt_is_cut_to_the_tokens_asked_for(house: House, text: ModelText, side: str | None) -> None:
    worker, client = await house.pair()
    words = "The river ran past the old mill and under the bridge. " * 200
    ids = await text.encode(words, add_special_tokens=False)
    for keep in (1, 7, 100):
        body = {"prompt": words, "truncate_prompt_tokens": keep, "truncation_side": side, "max_tokens": 1}
        assert await prompt_of(client, worker, "/v1/completions", body) == (
            ids[:keep] if side == "right" else ids[-keep:]
        )
        assert await prompt_of(client, worker, "/v1/completions", {**body, "prompt": ids}) == (
            ids[:keep] if side == "right" else ids[-keep:]
        )
        embedded = {"input": words, "truncate_prompt_tokens": keep, "truncation_side": side}
        assert await prompt_of(client, worker, "/v1/embeddings", embedded) == (
            ids[-keep:] if side == "left" else ids[:keep]
        )


async def test_minus_one_keeps_what_fits_beside_the_output(house: House) -> None:
    worker, client = await house.pair()
    for body, kept in (
        ({"max_tokens": 12}, CONTEXT - 12),
        ({}, CONTEXT - 16),
        ({"max_tokens": 0, "echo": True}, CONTEXT),
    ):
        body |= {"prompt": "mill " * 3000, "truncate_prompt_tokens": -1}
        assert len(await prompt_of(client, worker, "/v1/completions", body)) == kept
    talk = [{"role": "user", "content": "mill " * 3000}]
    body = {"messages": talk, "truncate_prompt_tokens": -1, "max_completion_tokens": 7}
    assert len(await prompt_of(client, worker, "/v1/chat/completions", body)) == CONTEXT - 7
    embedded = {"input": ["mill " * 3000, "mill"], "truncate_prompt_tokens": -1}
    assert len(await prompt_of(client, worker, "/v1/embeddings", embedded)) == CONTEXT


async def test_special_tokens_stay_when_a_text_is_cut(house: House, own_model: Path) -> None:
    text = with_special_tokens_around(own_model)
    worker, client = await house.pair()
    inner = await text.encode("The river ran past the old mill", add_special_tokens=False)
    body = {"prompt": "The river ran past the old mill", "max_tokens": 1}
    assert await prompt_of(client, worker, "/v1/completions", body) == [1, *inner, 2]
    bare = {**body, "add_special_tokens": False}
    assert await prompt_of(client, worker, "/v1/completions", bare) == inner
    cut = {**body, "truncate_prompt_tokens": 6}
    assert await prompt_of(client, worker, "/v1/completions", cut) == [1, *inner[-4:], 2]
    uncut = {**body, "truncate_prompt_tokens": len(inner) + 2}
    assert await prompt_of(client, worker, "/v1/completions", uncut) == [1, *inner, 2]
    refused = await client.post("/v1/completions", json={**body, "truncate_prompt_tokens": 2})
    assert refused.json()["error"]["param"] == "truncate_prompt_tokens"
    talk = {"messages": TALK[:1], "max_tokens": 1}
    plain = await prompt_of(client, worker, "/v1/chat/completions", talk)
    assert await prompt_of(client, worker, "/v1/chat/completions", {**talk, "add_special_tokens": True}) == [
        1,
        *plain,
        2,
    ]


@pytest.mark.parametrize("value", [0, -2, CONTEXT + 1, 10**30])
@pytest.mark.parametrize("path", ["/v1/completions", "/v1/chat/completions", "/v1/embeddings"])
async def test_impossible_cuts_are_refused(house: House, path: str, value: int) -> None:
    _, client = await house.pair()
    body = {"prompt": "a"} if path == "/v1/completions" else {"input": "a"} if "emb" in path else {"messages": TALK}
    response = await client.post(path, json={**body, "truncate_prompt_tokens": value})
    assert (response.status_code, response.json()["error"]["param"]) == (400, "truncate_prompt_tokens")


async def test_a_prompt_may_fill_the_context_where_nothing_is_generated(house: House) -> None:
    worker, client = await house.pair()
    full = [7] * CONTEXT
    scored = {"prompt": full, "max_tokens": 0, "echo": True, "logprobs": 0}
    answer = (await client.post("/v1/completions", json=scored)).json()
    assert len(answer["choices"][0]["logprobs"]["tokens"]) == CONTEXT
    assert (answer["choices"][0]["finish_reason"], answer["usage"]["completion_tokens"]) == ("length", 0)
    scored = {"prompt": full, "max_tokens": 0, "prompt_logprobs": 0}
    answer = (await client.post("/v1/completions", json=scored)).json()
    assert (answer["choices"][0]["text"], len(answer["choices"][0]["prompt_logprobs"])) == ("", CONTEXT)
    assert (await client.post("/v1/embeddings", json={"input": full})).status_code == 200
    assert {submit.sampling.max_tokens for submit in worker.submits} == {0}
    for body in ({"prompt": full}, {"prompt": full, "max_tokens": 1}, {**scored, "prompt": [*full, 7]}):
        error = (await client.post("/v1/completions", json=body)).json()["error"]
        assert error["code"] == "context_length_exceeded"
    error = (await client.post("/v1/embeddings", json={"input": [*full, 7]})).json()["error"]
    assert (error["code"], error["param"]) == ("context_length_exceeded", "input")


async def test_prompt_logprobs_are_told_as_vllm_tells_them(house: House, text: ModelText) -> None:
    _, client = await house.pair()
    body = {"prompt": ["The river ran", "Hello"], "max_tokens": 1, "prompt_logprobs": 2, "n": 2}
    answer = (await client.post("/v1/completions", json=body)).json()
    assert len(answer["choices"]) == 4
    for index, choice in enumerate(answer["choices"]):
        ids = await text.encode(body["prompt"][index // 2], add_special_tokens=True)  # type: ignore[index]
        scored = choice["prompt_logprobs"]
        assert (scored[0], len(scored)) == (None, len(ids))
        for token_id, entry in zip(ids[1:], scored[1:], strict=True):
            first = {"logprob": -0.5, "rank": 1, "decoded_token": text.token_text(token_id)}
            assert (entry[str(token_id)], len(entry)) == (first, 2)
            assert entry[str(token_id + 1)]["rank"] == 2
    body = {"messages": TALK[:1], "max_tokens": 0, "prompt_logprobs": 0, "return_token_ids": True}
    answer = (await client.post("/v1/chat/completions", json=body)).json()
    assert [entry and list(entry) for entry in answer["prompt_logprobs"]] == [
        None,
        *([str(token_id)] for token_id in answer["prompt_token_ids"][1:]),
    ]
    assert answer["choices"][0]["message"]["content"] == ""


@pytest.mark.parametrize("path", ["/v1/completions", "/v1/chat/completions"])
@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"prompt_logprobs": 21}, "prompt_logprobs"),
        ({"prompt_logprobs": -1}, "prompt_logprobs"),
        ({"prompt_logprobs": 1, "stream": True}, "prompt_logprobs"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"truncation_side": "left"}, "truncation_side"),
        ({"truncation_side": "middle", "truncate_prompt_tokens": 3}, "truncation_side"),
        ({"repetition_penalty": 0}, "repetition_penalty"),
        ({"repetition_penalty": 1e-5}, "repetition_penalty"),
        ({"bad_words": "a"}, "bad_words"),
        ({"bad_words": ["a", ""]}, "bad_words"),
        ({"bad_words": ["  "]}, "bad_words"),
        ({"bad_words": ["a" * 300]}, "bad_words"),
        ({"bad_words": ["a"] * 300}, "bad_words"),
        ({"request_id": "a b"}, "request_id"),
        ({"request_id": ""}, "request_id"),
        ({"min_tokens": -1}, "min_tokens"),
        ({"max_tokens": 3, "repetition_penalty": 1e-40}, "repetition_penalty"),
        ({"max_tokens": 3, "temperature": -1e-40}, "temperature"),
        ({"max_tokens": 3, "min_tokens": 2, "stop_token_ids": list(range(512))}, "stop_token_ids"),
        (
            {"max_tokens": 3, "min_tokens": 2, "allowed_token_ids": [4, 5], "stop_token_ids": [4, 5, 600]},
            "stop_token_ids",
        ),
        ({"cache_salt": "x" * 1025}, "cache_salt"),
    ],
)
async def test_what_cannot_be_is_refused_by_name(
    bare_client: httpx.AsyncClient, path: str, fields: dict[str, object], param: str
) -> None:
    body = {"prompt": "a"} if path == "/v1/completions" else {"messages": TALK}
    response = await bare_client.post(path, json=body | fields)
    assert response.status_code == 400
    assert response.json()["error"]["param"] == param


async def test_bad_words_reach_the_worker_as_tokens(house: House, text: ModelText) -> None:
    worker, client = await house.pair()
    for path, body in (("/v1/completions", {"prompt": "a"}), ("/v1/chat/completions", {"messages": TALK[:1]})):
        worker.submits.clear()
        await client.post(path, json={**body, "max_tokens": 1, "bad_words": ["river", " the"]})
        sent = [list(word.ids) for word in worker.submits[0].sampling.bad_words]
        assert sent == [
            await text.encode(word, add_special_tokens=False) for word in ("river", " river", "the", " the")
        ]


async def test_the_clients_request_id_is_the_answers(house: House) -> None:
    _, client = await house.pair()
    for path, body, prefix in (
        ("/v1/completions", {"prompt": "a"}, "cmpl-"),
        ("/v1/chat/completions", {"messages": TALK[:1]}, "chatcmpl-"),
    ):
        response = await client.post(path, json={**body, "max_tokens": 1, "request_id": "mine-1"})
        assert (response.json()["id"], response.headers["x-request-id"]) == (f"{prefix}mine-1", "mine-1")


@pytest.mark.parametrize("trims", [False, True])
async def test_the_final_message_is_continued(house: House, own_model: Path, text: ModelText, trims: bool) -> None:
    if trims:
        with_template(own_model, CHATML.replace("message['content']", "message['content'] | trim"))
    worker, client = await house.pair()
    body = {"messages": TALK, "continue_final_message": True, "max_tokens": 2}
    read = text.decode(await prompt_of(client, worker, "/v1/chat/completions", body), skip_special_tokens=False)
    begun = "<|im_start|>user\nThe river ran<|im_end|>\n<|im_start|>assistant\nunder the"
    assert read == begun + ("" if trims else " ")
    parts = [TALK[0], {"role": "assistant", "content": [{"type": "text", "text": "under the "}]}]
    again = await prompt_of(client, worker, "/v1/chat/completions", {**body, "messages": parts})
    assert text.decode(again, skip_special_tokens=False) == read
    both = await client.post("/v1/chat/completions", json={**body, "add_generation_prompt": True})
    assert both.json()["error"]["param"] == "continue_final_message"


async def test_a_template_that_drops_the_final_message_cannot_continue_it(house: House, own_model: Path) -> None:
    with_template(own_model, "{% for message in messages %}{{ message['role'] }}{% endfor %}")
    _, client = await house.pair()
    response = await client.post("/v1/chat/completions", json={"messages": TALK, "continue_final_message": True})
    assert (response.status_code, response.json()["error"]["param"]) == (400, "continue_final_message")


async def test_echo_puts_the_message_that_goes_on_before_the_answer(house: House) -> None:
    _, client = await house.pair(Script(per_output=2))
    body: dict[str, Any] = {"messages": TALK, "continue_final_message": True, "max_tokens": 5}
    plain = (await client.post("/v1/chat/completions", json=body)).json()["choices"][0]["message"]
    body["echo"] = True
    echoed = (await client.post("/v1/chat/completions", json=body)).json()["choices"][0]["message"]
    assert (echoed["role"], echoed["content"]) == ("assistant", "under the " + plain["content"])
    response = await client.post("/v1/chat/completions", json={**body, "stream": True})
    deltas = [event["choices"][0]["delta"] for event in events(response.text)[:-1]]
    assert "".join(delta.get("content", "") for delta in deltas) == echoed["content"]
    asked = {**body, "messages": TALK[:1], "continue_final_message": False}
    answer = (await client.post("/v1/chat/completions", json=asked)).json()["choices"][0]["message"]
    assert "The river ran" not in answer["content"], "said by somebody else"
    goes_on = {**asked, "continue_final_message": True}
    answer = (await client.post("/v1/chat/completions", json=goes_on)).json()["choices"][0]["message"]
    assert (answer["role"], answer["content"][:13]) == ("user", "The river ran")


async def test_documents_are_for_templates_that_read_them(house: House, own_model: Path, text: ModelText) -> None:
    body = {"messages": TALK[:1], "documents": [{"title": "Mill", "text": "old"}], "max_tokens": 1}
    _, client = await house.pair()
    refused = await client.post("/v1/chat/completions", json=body)
    assert (refused.status_code, refused.json()["error"]["param"]) == (400, "documents")
    with_template(own_model, "{% for d in documents %}{{ d.title }}: {{ d.text }}{% endfor %}" + CHATML)
    other = await house.decode("decode-1")
    client = await house.client(await house.router(other))
    read = await prompt_of(client, other, "/v1/chat/completions", body)
    assert text.decode(read, skip_special_tokens=False).startswith("Mill: old<|im_start|>")


async def test_reasoning_effort_is_told_to_the_template_or_told_to_be_without_effect(
    house: House, own_model: Path, text: ModelText
) -> None:
    body = {"messages": TALK[:1], "reasoning_effort": "low", "max_tokens": 1, "return_prompt_text": True}
    _, client = await house.pair()
    response = await client.post("/v1/chat/completions", json=body)
    assert response.headers["x-tandem-ignored"] == "reasoning_effort"
    with_template(own_model, "{{ reasoning_effort }}" + CHATML)
    other = await house.decode("decode-1")
    client = await house.client(await house.router(other))
    response = await client.post("/v1/chat/completions", json=body)
    assert "x-tandem-ignored" not in response.headers
    assert response.json()["prompt_text"].startswith("low<|im_start|>user\nThe river ran")


@pytest.mark.parametrize("asked", [None, 5, 30])
async def test_max_new_tokens_of_the_model_is_the_default(house: House, own_model: Path, asked: int | None) -> None:
    (own_model / "generation_config.json").write_text(json.dumps({"max_new_tokens": 9}))
    worker, client = await house.pair()
    for path, body in (("/v1/completions", {"prompt": "a"}), ("/v1/chat/completions", {"messages": TALK[:1]})):
        worker.submits.clear()
        await client.post(path, json={**body, "max_tokens": asked})
        assert worker.submits[0].sampling.max_tokens == (9 if asked is None else asked)


@pytest.mark.parametrize("path", ["/v1/completions", "/v1/chat/completions"])
async def test_continuous_usage_is_in_every_event(house: House, path: str) -> None:
    _, client = await house.pair(Script(per_output=2))
    body = {"prompt": "The river"} if path == "/v1/completions" else {"messages": TALK[:1]}
    options = {"include_usage": True, "continuous_usage_stats": True}
    for more in ({}, {"logprobs": 1} if "prompt" in body else {"logprobs": True}):
        fields = {**body, **more, "stream": True, "max_tokens": 6, "stream_options": options}
        told = events((await client.post(path, json=fields)).text)[:-1]
        used = [event["usage"]["completion_tokens"] for event in told]
        assert used == sorted(used)
        assert (used[-1], told[-1]["choices"]) == (6, [])
        assert all(event["usage"]["prompt_tokens"] == told[-1]["usage"]["prompt_tokens"] for event in told)


@pytest.mark.parametrize("stream", [False, True])
async def test_tokens_can_be_named_by_their_ids(house: House, stream: bool) -> None:
    _, client = await house.pair()
    wanted = {"max_tokens": 3, "return_tokens_as_token_ids": True, "return_token_ids": True, "stream": stream}
    response = await client.post("/v1/completions", json={"prompt": "The river", "logprobs": 1, **wanted})
    told = [event["choices"][0] for event in events(response.text)[:-1]] if stream else response.json()["choices"]
    for choice in told:
        names = [f"token_id:{token_id}" for token_id in choice["token_ids"]]
        assert (choice["logprobs"] or {"tokens": []})["tokens"] == names
        assert [list(entry) for entry in (choice["logprobs"] or {"top_logprobs": []})["top_logprobs"]] == [
            [name] for name in names
        ]
    body = {"messages": TALK[:1], "logprobs": True, "top_logprobs": 1, **wanted, "stream": False}
    choice = (await client.post("/v1/chat/completions", json=body)).json()["choices"][0]
    assert [entry["token"] for entry in choice["logprobs"]["content"]] == [f"token_id:{i}" for i in choice["token_ids"]]
    assert choice["logprobs"]["content"][0]["top_logprobs"][0]["token"].startswith("token_id:")
