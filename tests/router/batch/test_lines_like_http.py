"""The same request over HTTP and as a line of a batch: the answers are the same bytes, errors too."""

from __future__ import annotations

import json
import re
from typing import Any

import msgspec
import pytest

from tandem.router.batch.exchange import BATCH_ENDPOINTS
from tests.router.batch.conftest import Desk, OpenDesk
from tests.router.conftest import House
from tests.router.fake_worker import Script
from tests.router.tool_models import WEATHER, calls_text, saying, write_tool_model

HELLO = [{"role": "user", "content": "Hello"}]
SCHEMA = {"type": "object", "properties": {"id": {"type": "integer"}}}

GOOD: dict[str, list[dict[str, Any]]] = {
    "/v1/completions": [
        {"prompt": "The river", "max_tokens": 4},
        {"prompt": ["The river", "Hello"], "n": 2, "seed": 5, "max_tokens": 3, "logprobs": 3, "echo": True},
        {"prompt": [7, 8, 9], "max_tokens": 0, "prompt_logprobs": 2},
        {"prompt": "Hello", "return_token_ids": True, "stop": ["o"], "request_id": "mine", "user": "u"},
        {"prompt": "Hello", "max_tokens": 40, "logprobs": 20, "n": 16, "best_of": 16},
    ],
    "/v1/chat/completions": [
        {"messages": HELLO, "max_completion_tokens": 3},
        {"messages": HELLO, "max_tokens": 3, "n": 2, "logprobs": True, "top_logprobs": 4, "return_token_ids": True},
        {"messages": [*HELLO, {"role": "assistant", "content": "I am"}], "continue_final_message": True, "echo": True},
        {"messages": HELLO, "return_prompt_text": True, "max_tokens": 2, "priority": -7},
    ],
    "/v1/responses": [
        {"input": "Hello", "max_output_tokens": 4, "instructions": "Be short.", "metadata": {"a": "b"}},
        {"input": HELLO, "top_logprobs": 2, "include": ["message.output_text.logprobs"], "max_output_tokens": 3},
        {"input": [{"type": "reasoning"}, *HELLO], "max_output_tokens": 2, "request_id": "mine"},
    ],
    "/v1/embeddings": [
        {"input": "Hello"},
        {"input": ["Hello", "world"] * 40, "encoding_format": "base64", "pooling": "mean"},
        {"input": [[1, 2], [3]], "dimensions": 2, "stream": True},
    ],
}
REFUSED: dict[str, list[dict[str, Any]]] = {
    "/v1/completions": [
        {"max_tokens": 4},
        {"prompt": "Hello", "max_tokens": "4"},
        {"prompt": "Hello", "max_tokens": 5000},
        {"prompt": "Hello", "temperature": 9},
        {"prompt": "Hello", "temprature": 1},
        {"prompt": "Hello", "suffix": "x"},
        {"prompt": "Hello", "model": "gpt-4"},
        {"prompt": [[1], "a"]},
        {"prompt": [7] * 20_000},
        {"prompt": "a", "request_id": "no such id"},
        {"prompt": "a", "priority": 2**40},
        {"prompt": "a", "stream": "yes"},
        {"prompt": "a", "stream_options": {"include_usage": True}},
        {"prompt": "a", "structured_outputs": {"regex": "("}},
        {"prompt": "a", "context": "mine"},
    ],
    "/v1/chat/completions": [
        {"messages": []},
        {"messages": [{"role": "user", "content": 7}]},
        {"messages": HELLO, "top_logprobs": 3},
        {"messages": HELLO, "tools": [{"type": "function", "function": {"name": "a b"}}]},
        {"messages": HELLO, "tool_choice": "required"},
        {"messages": HELLO, "response_format": {"type": "json_schema"}},
    ],
    "/v1/responses": [
        {"input": [{"type": "message", "content": "a"}]},
        {"input": [{"type": "image"}]},
        {"input": "Hello", "max_output_tokens": 5000},
        {"input": "Hello", "text": {"format": {"type": "json_schema", "schema": {"type": "nothing"}}}},
        {"input": "Hello", "tools": [{"type": "function", "name": "a b"}]},
    ],
    "/v1/embeddings": [
        {"input": []},
        {"input": "Hello", "dimensions": 7},
        {"input": "Hello", "encoding_format": "hex"},
    ],
}


def settled(body: bytes, request_id: str) -> bytes:
    """An answer without its ids and times."""
    body = body.replace(request_id.encode(), b"ID")
    body = re.sub(rb'"created(_at)?":\d+', b'"created":0', body)
    return re.sub(rb'"call_[0-9a-zA-Z]+"', b'"call"', body)


async def by_http(office: Desk, path: str, body: dict[str, Any]) -> tuple[int, bytes]:
    answer = await office.http.post(path, content=json.dumps(body).encode(), headers={"x-request-id": "by-http"})
    return answer.status_code, settled(answer.content, "by-http")


async def by_batch(office: Desk, path: str, bodies: list[dict[str, Any]]) -> list[tuple[int, bytes]]:
    """Answers of the lines of one batch."""
    lines = [
        {"custom_id": str(index), "method": "POST", "url": path, "body": body} for index, body in enumerate(bodies)
    ]
    batch = await office.ended(await office.create(lines, path))
    assert batch["status"] == "completed"
    found: dict[str, tuple[int, bytes]] = {}
    for file_id in (batch["output_file_id"], batch["error_file_id"]):
        content = (await office.http.get(f"/v1/files/{file_id}/content")).content if file_id else b""
        for row in content.splitlines():
            line = msgspec.json.decode(row, type=dict[str, msgspec.Raw])
            response = msgspec.json.decode(line["response"], type=dict[str, msgspec.Raw])
            body = settled(bytes(response["body"]), msgspec.json.decode(response["request_id"]))
            status = msgspec.json.decode(response["status_code"])
            assert (status == 200) == (file_id == batch["output_file_id"])
            found[msgspec.json.decode(line["custom_id"])] = status, body
    return [found[str(index)] for index in range(len(bodies))]


@pytest.mark.parametrize("path", BATCH_ENDPOINTS)
async def test_answers_and_refusals(desk: OpenDesk, house: House, path: str) -> None:
    office = await desk(await house.decode(script=Script(cached_tokens=1)))
    bodies = [{"seed": 3, **body} if path != "/v1/embeddings" else body for body in GOOD[path] + REFUSED[path]]
    wanted = [await by_http(office, path, body) for body in bodies]
    assert [status for status, _ in wanted] == [200] * len(GOOD[path]) + [
        404 if "model" in body or "context" in body else 400 for body in REFUSED[path]
    ]
    for body, got, want in zip(bodies, await by_batch(office, path, bodies), wanted, strict=True):
        assert got == want, body


@pytest.mark.parametrize("path", ["/v1/chat/completions", "/v1/responses"])
async def test_calls_of_tools(
    desk: OpenDesk, house: House, tmp_path_factory: pytest.TempPathFactory, path: str
) -> None:
    house.model = write_tool_model(tmp_path_factory.mktemp("model") / "tiny", "hermes")
    text = "Let me see.\n" + calls_text("hermes", ("get_weather", '{"city":"Paris"}'))
    office = await desk(await house.decode(script=Script(tokens=saying(house.model, text), stop_token_id=2)))
    body: dict[str, Any] = {"messages": HELLO, "tools": [WEATHER]}
    if path == "/v1/responses":
        body = {"input": "Hello", "tools": [{"type": "function", **WEATHER["function"]}]}  # type: ignore[dict-item]
    (got,) = await by_batch(office, path, [body])
    assert got == await by_http(office, path, body)
    assert b'"call"' in got[1]


@pytest.mark.parametrize("path", BATCH_ENDPOINTS)
async def test_failures_of_workers(desk: OpenDesk, house: House, path: str) -> None:
    office = await desk(await house.decode(script=Script(error=("internal", "out of luck"))))
    body = GOOD[path][0]
    (got,) = await by_batch(office, path, [body])
    assert got == await by_http(office, path, body)
    assert got[0] == 500
