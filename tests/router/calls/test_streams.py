"""Server-sent events under unusual circumstances."""

from __future__ import annotations

import asyncio
import gc
import json
import socket
from collections.abc import Iterator

import pytest

from tandem.router.calls import generate
from tandem.router.calls.generate import Call
from tandem.router.text.tokenizer import ModelText
from tests.router.conftest import House, events, until
from tests.router.fake_worker import Script

PROMPT = {"prompt": "Hello", "stream": True}


def texts(body: str) -> list[str]:
    return [event["choices"][0]["text"] for event in events(body)[:-1] if event["choices"]]


async def test_characters_split_across_tokens_arrive_whole(house: House) -> None:
    text = ModelText(house.model)
    sentence = "a é 世界 👩‍👩‍👧 z"
    ids = await text.encode(sentence, add_special_tokens=False)
    assert len(ids) > len(sentence), "the test needs characters of several tokens"
    _, client = await house.pair(Script(tokens=lambda _: ids, delay_s=0.001))
    response = await client.post("/v1/completions", json={**PROMPT, "max_tokens": 100})
    assert "".join(texts(response.text)) == sentence
    assert "\ufffd" not in response.text


async def test_stop_strings_never_leak_across_chunks(house: House) -> None:
    text = ModelText(house.model)
    ids = await text.encode("good ###user goes ###END more", add_special_tokens=False)
    worker, client = await house.pair(Script(tokens=lambda _: ids, delay_s=0.001))
    body = {**PROMPT, "max_tokens": 100, "stop": ["###END"], "logprobs": 0, "return_token_ids": True}
    response = await client.post("/v1/completions", json=body)
    shown = ""
    for piece in texts(response.text):
        shown += piece
        assert "good ###user goes ".startswith(shown)
    assert shown == "good ###user goes "
    await until(lambda: worker.cancels)


async def test_tokens_are_reported_no_earlier_than_their_text(house: House) -> None:
    text = ModelText(house.model)
    ids = await text.encode("x###y###STOP", add_special_tokens=False)
    _, client = await house.pair(Script(tokens=lambda _: ids, delay_s=0.001))
    body = {**PROMPT, "max_tokens": 100, "stop": ["###STOP"], "return_token_ids": True}
    choices = [event["choices"][0] for event in events((await client.post("/v1/completions", json=body)).text)[:-1]]
    shown, told = "", []
    for choice in choices[:-1]:
        shown += choice["text"]
        told += choice["token_ids"]
        assert shown.startswith(text.decode(told))
    assert told + choices[-1]["token_ids"] == ids
    assert shown == "x###y"


async def test_silence_is_filled_with_comments(house: House, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tandem.router.service.KEEPALIVE_S", 0.05)
    worker, client = await house.pair(Script(hold_after=2))
    async with client.stream("POST", "/v1/completions", json=PROMPT) as response:
        seen = ""
        async for part in response.aiter_text():
            seen += part
            if seen.count(": keep-alive\n\n") >= 2:
                worker.resume.set()
        assert seen.endswith("data: [DONE]\n\n")
    assert len(events(seen)) > 3


async def test_comments_come_before_the_first_token_too(house: House, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tandem.router.service.KEEPALIVE_S", 0.05)
    worker, client = await house.pair(Script(hold_after=0))
    async with client.stream("POST", "/v1/completions", json=PROMPT) as response:
        parts = response.aiter_text()
        assert (await anext(parts)).startswith(": keep-alive")
        worker.resume.set()
        assert "[DONE]" in "".join([part async for part in parts])


async def test_error_in_mid_stream_is_an_event_and_the_end(house: House) -> None:
    worker, client = await house.pair(Script(hold_after=2), worker_wait_s=0.2)
    async with client.stream("POST", "/v1/completions", json=PROMPT) as response:
        parts = response.aiter_text()
        seen = await anext(parts)
        await worker.kill()
        seen += "".join([part async for part in parts])
    *chunks, error = events(seen)
    assert response.status_code == 200
    assert error["error"]["code"] == "worker_lost"
    assert "sent again" in error["error"]["message"]
    assert "[DONE]" not in seen
    assert all(chunk["choices"][0]["finish_reason"] is None for chunk in chunks)


async def test_client_that_goes_away_cancels_on_both_workers(house: House) -> None:
    decode = await house.decode(script=Script(delay_s=0.01, wait_for_kv=False))
    prefill = await house.prefill(script=Script(handover="never"), to=(decode,))
    router = await house.router(decode, prefill)
    client = await house.client(router)
    async with client.stream("POST", "/v1/completions", json={**PROMPT, "max_tokens": 400}) as response:
        await anext(response.aiter_bytes())
    await until(lambda: decode.cancels and prefill.cancels)
    assert decode.cancelled_ids == prefill.cancelled_ids == {decode.submits[0].key.request_id}
    await until(lambda: router.fleet.decode[0].requests == 0)
    await until(lambda: b"client_disconnects_total 1.0" in router.metrics.text())


@pytest.fixture
def only_new_objects() -> Iterator[None]:
    """The garbage collector sees what the test makes: all objects of a long run would take it seconds each time."""
    gc.collect()
    gc.freeze()
    yield
    gc.unfreeze()


@pytest.mark.usefixtures("only_new_objects")
async def test_nothing_is_kept_of_clients_that_went_away(house: House) -> None:
    def calls() -> int:
        gc.collect()
        return sum(isinstance(thing, Call) for thing in gc.get_objects())

    router = await house.router(await house.decode(script=Script(delay_s=0.01)))
    client = await house.client(router)
    for gone in range(3):
        async with client.stream("POST", "/v1/completions", json={**PROMPT, "max_tokens": 400}) as response:
            await anext(response.aiter_bytes())
        await until(lambda gone=gone: f"client_disconnects_total {gone + 1}.0".encode() in router.metrics.text())
    await until(lambda: calls() == 0)


@pytest.mark.usefixtures("only_new_objects")
async def test_a_finished_request_leaves_nothing_to_the_garbage_collector(house: House) -> None:
    _, client = await house.pair()
    gc.disable()
    try:
        for stream in (True, False):
            response = await client.post("/v1/completions", json={**PROMPT, "stream": stream, "n": 2})
            assert response.status_code == 200
            await until(lambda: not any(isinstance(thing, Call) for thing in gc.get_objects()))
    finally:
        gc.enable()


async def test_client_that_goes_away_before_a_whole_answer_cancels_too(house: House) -> None:
    worker, client = await house.pair(Script(mute=True))
    request = asyncio.create_task(client.post("/v1/completions", json={"prompt": "Hello"}))
    await until(lambda: worker.submits)
    request.cancel()
    await until(lambda: worker.cancels)


async def test_a_client_that_reads_nothing_is_cut_off(house: House, monkeypatch: pytest.MonkeyPatch) -> None:
    """It stays connected and holds neither a place nor memory."""
    monkeypatch.setattr(generate, "STALLED_S", 0.3)
    monkeypatch.setattr(generate, "MAX_BUFFERED_BYTES", 1 << 19)
    router = await house.router(await house.decode(max_model_len=1024, script=Script(delay_s=0.001)))
    client = await house.client(router)
    body = json.dumps({**PROMPT, "max_tokens": 900, "n": 16, "logprobs": 5, "seed": 1}).encode()
    head = f"POST /v1/completions HTTP/1.1\r\nhost: x\r\ncontent-length: {len(body)}\r\n\r\n".encode()
    with socket.socket() as deaf:
        deaf.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        deaf.setblocking(False)
        loop = asyncio.get_running_loop()
        await loop.sock_connect(deaf, ("127.0.0.1", router.port))
        await loop.sock_sendall(deaf, head + body)
        await until(lambda: b"sequences_in_flight 16.0" in router.metrics.text())
        await until(lambda: b"sequences_in_flight 0.0" in router.metrics.text())
        assert b"client_disconnects_total 1.0" in router.metrics.text()
        await until(lambda: router.fleet.decode[0].requests == 0)
        assert (await client.post("/v1/completions", json={"prompt": "Hello"})).status_code == 200
