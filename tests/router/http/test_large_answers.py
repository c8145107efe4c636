"""Answers that take long to write: the same as short ones, in a thread, and bounded by memory."""

from __future__ import annotations

import asyncio
import json
import threading
from typing import Any

import httpx
import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tandem.router.answers import large_answers
from tandem.router.web import body_memory, large_json
from tandem.router.web import exchange as http_exchange
from tandem.router.web.exchange import _in_pieces
from tandem.router.web.large_json import encoded, encoded_ids, encoded_list, encoded_parts
from tests.router.conftest import House, until
from tests.router.fake_worker import Script

LONG: dict[str, dict[str, Any]] = {
    "/v1/completions": {"prompt": [[300] * 60] * 3, "max_tokens": 2, "echo": True, "logprobs": 5},
    "/v1/chat/completions": {
        "messages": [{"role": "user", "content": "Hello world, user!"}],
        "n": 3,
        "seed": 7,
        "max_tokens": 40,
        "logprobs": True,
        "top_logprobs": 5,
        "prompt_logprobs": 3,
        "return_token_ids": True,
    },
    "/v1/responses": {
        "input": "Hello",
        "max_output_tokens": 30,
        "top_logprobs": 4,
        "include": ["message.output_text.logprobs"],
    },
}


@given(st.lists(st.integers() | st.text(max_size=3)), st.integers(1, 4))
def test_lists_in_parts_are_the_same_json(values: list[Any], at_once: int) -> None:
    assert encoded({"a": encoded_list(iter(values), at_once)}) == msgspec.json.encode({"a": values})


@given(st.dictionaries(st.text(max_size=3), st.none() | st.integers(0, 9) | st.lists(st.text(max_size=4), max_size=4)))
def test_objects_in_parts_are_the_same_json(content: dict[str, Any]) -> None:
    assert b"".join(encoded_parts(content)) == msgspec.json.encode(content)


@given(st.lists(st.binary(max_size=30)), st.integers(1, 12))
def test_pieces_are_short_and_join_to_the_whole(parts: list[bytes], most: int) -> None:
    before = http_exchange.PIECE_BYTES
    try:
        http_exchange.PIECE_BYTES = most
        pieces = list(_in_pieces(parts))
    finally:
        http_exchange.PIECE_BYTES = before
    assert b"".join(pieces) == b"".join(parts)
    assert all(len(piece) <= most for piece in pieces)


def test_many_ids_are_the_same_json() -> None:
    ids = list(range(10_000))
    assert json.loads(encoded(encoded_ids(ids))) == ids


@given(st.lists(st.lists(st.integers() | st.text(max_size=3)), max_size=4), st.text())
def test_long_lists_stand_where_they_belong(lists: list[list[Any]], text: str) -> None:
    content = {"text": text + "\0", "lists": lists, "inner": {"\0": [{"b": each} for each in lists]}}
    long = [encoded_list(each, 2) for each in lists]
    written = {"text": text + "\0", "lists": long, "inner": {"\0": [{"b": each} for each in long]}}
    assert b"".join(encoded_parts(written)) == encoded(written) == msgspec.json.encode(content)


def test_no_part_of_an_answer_is_much_longer_than_a_part_of_its_lists() -> None:
    entries = [{"token": "abc"} for _ in range(50_000)]
    parts = encoded_parts({"choices": [{"text": "a", "logprobs": {"content": encoded_list(entries)}}]})
    assert json.loads(b"".join(parts)) == {"choices": [{"text": "a", "logprobs": {"content": entries}}]}
    assert max(map(len, parts)) < 256 * 20


async def answered(client: httpx.AsyncClient, path: str) -> Any:
    """Without what differs from one answer to the next."""
    answer = await client.post(path, json=LONG[path], headers={"x-request-id": "same"})
    assert answer.status_code == 200, answer.text
    return {name: part for name, part in answer.json().items() if name not in ("created", "created_at")}


@pytest.mark.parametrize("path", LONG)
async def test_what_is_written_in_a_thread_is_what_would_be_written_at_once(
    house: House, monkeypatch: pytest.MonkeyPatch, path: str
) -> None:
    _, client = await house.pair()
    at_once = await answered(client, path)
    threads: list[str] = []
    write = large_json.encoded_parts

    def noting(content: dict[str, Any]) -> list[bytes]:
        threads.append(threading.current_thread().name)
        return write(content)

    monkeypatch.setattr("tandem.router.endpoints.plan.encoded_parts", noting)
    monkeypatch.setattr(large_answers, "MAX_INLINE_ENTRIES", 10)
    monkeypatch.setattr(http_exchange, "PIECE_BYTES", 100)
    monkeypatch.setattr(large_json, "ENTRIES_AT_ONCE", 2)
    assert await answered(client, path) == at_once
    assert threads
    assert all(name.startswith("answers") for name in threads)


async def test_a_long_answer_of_one_tenant_holds_up_nobody_elses(house: House) -> None:
    worker = await house.decode()
    router = await house.router(worker)
    client = await house.client(router)
    entered, opened = threading.Event(), threading.Event()

    def block() -> None:
        entered.set()
        opened.wait(60)

    router.service.answers.submit("default", 1.0, block)
    await asyncio.to_thread(entered.wait, 60)
    try:
        long = {"prompt": [[300] * 60] * 20, "max_tokens": 1, "logprobs": 20, "echo": True}
        waiting = asyncio.create_task(client.post("/v1/completions", json=long))
        await until(lambda: router.service.answers.waiting("default"))
        assert (await client.post("/v1/completions", json={"prompt": "a", "max_tokens": 1})).status_code == 200
        assert not waiting.done()
    finally:
        opened.set()
    assert (await waiting).status_code == 200


async def test_answers_count_among_the_memory_of_their_tenant(house: House, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(body_memory, "MAX_HELD_BYTES", 700_000)
    _, client = await house.pair(Script(per_output=100))
    long = {"prompt": [[300] * 100] * 20, "max_tokens": 1, "logprobs": 20, "echo": True}
    answer = await client.post("/v1/completions", json=long)
    assert (answer.status_code, answer.json()["error"]["code"]) == (503, "overloaded")
    long["prompt"] = [[300] * 100] * 2
    assert (await client.post("/v1/completions", json=long)).status_code == 200
    assert body_memory.held_bytes() == 0
