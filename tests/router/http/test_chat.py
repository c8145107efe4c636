"""/v1/chat/completions."""

from __future__ import annotations

import json

import httpx
import pytest

from tandem.router.text.tokenizer import ModelText
from tests.router.conftest import House, events, joined, write_model
from tests.router.fake_worker import Script

HELLO = [{"role": "user", "content": "Hello"}]


async def test_stream_is_what_openai_sends(house: House) -> None:
    text = ModelText(house.model)
    ids = await text.encode("Hi you", add_special_tokens=False)
    worker, client = await house.pair(Script(tokens=lambda _: [*ids, 2], stop_token_id=2, delay_s=0.01))
    body = {"messages": HELLO, "stream": True, "stream_options": {"include_usage": True}}
    response = await client.post("/v1/chat/completions", json=body)
    assert response.headers["content-type"] == "text/event-stream; charset=utf-8"
    *chunks, done = events(response.text)
    assert done == "[DONE]"
    head = {
        "id": f"chatcmpl-{response.headers['x-request-id']}",
        "object": "chat.completion.chunk",
        "created": chunks[0]["created"],
        "model": "tiny",
        "system_fingerprint": None,
    }

    def chunk(delta: dict[str, str], finish_reason: str | None = None) -> dict[str, object]:
        choice = {"index": 0, "delta": delta, "logprobs": None, "finish_reason": finish_reason}
        return {**head, "choices": [choice], "usage": None}

    assert chunks[0] == chunk({"role": "assistant", "content": ""})
    assert chunks[1:-2] == [chunk({"content": text.decode([token])}) for token in ids]
    last = chunk({}, "stop")
    last["choices"][0]["stop_reason"] = None  # type: ignore[index]
    assert chunks[-2] == last
    prompt_tokens = len(worker.submits[0].prompt_token_ids)
    assert chunks[-1] == {
        **head,
        "choices": [],
        "usage": {
            "prompt_tokens": prompt_tokens,
            "completion_tokens": len(ids) + 1,
            "total_tokens": prompt_tokens + len(ids) + 1,
            "prompt_tokens_details": {"cached_tokens": 0},
        },
    }


async def test_stream_without_usage_has_no_usage_field(house: House) -> None:
    _, client = await house.pair()
    response = await client.post("/v1/chat/completions", json={"messages": HELLO, "stream": True, "max_tokens": 2})
    assert "usage" not in response.text


async def test_each_choice_of_a_stream_opens_with_its_role_and_ends_once(house: House) -> None:
    _, client = await house.pair(Script(delay_s=0.002))
    body = {"messages": HELLO, "stream": True, "max_tokens": 5, "n": 3}
    response = await client.post("/v1/chat/completions", json=body)
    choices = [event["choices"][0] for event in events(response.text)[:-1]]
    for index in range(3):
        mine = [choice for choice in choices if choice["index"] == index]
        assert mine[0]["delta"]["role"] == "assistant"
        assert [choice["finish_reason"] for choice in mine] == [None] * (len(mine) - 1) + ["length"]


async def test_template_and_special_tokens_make_the_prompt(house: House) -> None:
    worker, client = await house.pair()
    messages = [
        {"role": "developer", "content": "Be brief."},
        {"role": "user", "content": [{"type": "text", "text": "Hel"}, {"type": "text", "text": "lo"}]},
    ]
    answer = (await client.post("/v1/chat/completions", json={"messages": messages, "max_tokens": 3})).json()
    prompt = ModelText(house.model).decode(list(worker.submits[0].prompt_token_ids), skip_special_tokens=False)
    assert prompt == (
        "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nHel\nlo<|im_end|>\n<|im_start|>assistant\n"
    )
    assert worker.submits[0].prompt_token_ids[0] == 1
    assert answer["object"] == "chat.completion"
    assert answer["choices"][0]["message"]["role"] == "assistant"


async def test_output_may_fill_the_context_by_default(house: House) -> None:
    _, client = await house.pair(Script(per_output=50))
    answer = (await client.post("/v1/chat/completions", json={"messages": HELLO})).json()
    assert answer["usage"]["total_tokens"] == 512


async def test_max_completion_tokens_wins(house: House) -> None:
    _, client = await house.pair()
    body = {"messages": HELLO, "max_tokens": 9, "max_completion_tokens": 3}
    assert (await client.post("/v1/chat/completions", json=body)).json()["usage"]["completion_tokens"] == 3


async def test_logprobs_list_alternatives_and_bytes(house: House) -> None:
    _, client = await house.pair()
    body = {"messages": HELLO, "logprobs": True, "top_logprobs": 2, "max_tokens": 2}
    whole = (await client.post("/v1/chat/completions", json=body)).json()["choices"][0]
    first = whole["logprobs"]["content"][0]
    assert bytes(first["bytes"]).decode() == first["token"]
    assert [entry["logprob"] for entry in first["top_logprobs"]] == [-0.5, -1.5]
    response = await client.post("/v1/chat/completions", json={**body, "stream": True})
    parts = [event["choices"][0]["logprobs"] for event in events(response.text)[:-1]]
    assert joined(part["content"] for part in parts if part) == whole["logprobs"]["content"]


async def test_token_ids_are_returned_on_request(house: House) -> None:
    worker, client = await house.pair()
    body = {"messages": HELLO, "return_token_ids": True, "max_tokens": 4}
    answer = (await client.post("/v1/chat/completions", json=body)).json()
    prompt = list(worker.submits[0].prompt_token_ids)
    assert answer["prompt_token_ids"] == prompt
    assert answer["choices"][0]["token_ids"] == prompt[:4]
    response = await client.post("/v1/chat/completions", json={**body, "stream": True})
    chunks = events(response.text)[:-1]
    assert chunks[0]["prompt_token_ids"] == prompt
    assert joined(chunk["choices"][0].get("token_ids", []) for chunk in chunks) == prompt[:4]


@pytest.mark.parametrize(
    ("change", "param"),
    [
        ({"messages": []}, "messages"),
        ({"messages": "hi"}, "messages"),
        ({"messages": [{"role": "user"}]}, "messages[0].content"),
        ({"messages": [{"content": "a"}]}, "messages[0].role"),
        ({"messages": [{"role": "x" * 5000, "content": "a"}]}, "messages[0].role"),
        ({"messages": [{"role": "user", "content": 5}]}, "messages[0].content"),
        (
            {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {}}]}]},
            "messages[0].content[0].type",
        ),
        (
            {"messages": [{"role": "assistant", "content": "a", "tool_calls": [{}]}]},
            "messages[0].tool_calls[0].function",
        ),
        ({"tools": [{"type": "function"}]}, "tools[0].function"),
        ({"top_logprobs": 2}, "top_logprobs"),
        ({"logprobs": True, "top_logprobs": 21}, "top_logprobs"),
        ({"logprobs": 3}, "logprobs"),
        ({"chat_template_kwargs": {"messages": []}}, "chat_template_kwargs"),
        ({"chat_template_kwargs": {"self": 1}}, "chat_template_kwargs"),
        ({"max_completion_tokens": 0}, "max_completion_tokens"),
        ({"max_completion_tokens": 1024}, "max_completion_tokens"),
        ({"modalities": ["audio"]}, "modalities"),
    ],
)
async def test_bad_fields_are_named(bare_client: httpx.AsyncClient, change: dict[str, object], param: str) -> None:
    response = await bare_client.post("/v1/chat/completions", json={"messages": HELLO, **change})
    error = response.json()["error"]
    assert (response.status_code, error["param"]) == (400, param)
    assert len(error["message"]) < 300


async def test_a_model_without_template_says_so(house: House, tmp_path_factory: pytest.TempPathFactory) -> None:
    house.model = write_model(tmp_path_factory.mktemp("bare") / "bare")
    (house.model / "tokenizer_config.json").write_text(json.dumps({}))
    _, client = await house.pair()
    response = await client.post("/v1/chat/completions", json={"messages": HELLO})
    assert response.status_code == 400
    assert "no chat template" in response.json()["error"]["message"]
