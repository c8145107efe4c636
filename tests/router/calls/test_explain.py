"""Why did this request go there? In the answer, in the stream, and afterwards by id."""

from __future__ import annotations

import hashlib
import json

import httpx
import pytest

from tandem.proto import worker_pb2
from tandem.router.calls.explain import MAX_RECORDS, Explain
from tests.router.conftest import House, events, router_metrics
from tests.router.fake_worker import Script

BODY = {"prompt": "The river ran past the old mill", "max_tokens": 4}
ASKS = {"x-tandem-explain": "1", "x-request-id": "why"}


async def test_an_answer_carries_its_account_when_asked(house: House) -> None:
    decode = await house.decode()
    prefill = await house.prefill(to=(decode,))
    client = await house.client(await house.router(decode, prefill))
    plain = (await client.post("/v1/completions", json=BODY)).json()
    assert "explain" not in plain
    account = (await client.post("/v1/completions", json=BODY, headers=ASKS)).json()["explain"]
    assert (account["id"], account["outcome"], account["tenant"]) == ("why", "ok", "default")
    (attempt,) = account["attempts"]
    assert (attempt["decode"], attempt["prefill"], attempt["reason"]) == ("decode-0", "prefill-0", "handover")
    assert 0 <= account["queued_s"] <= attempt["started_s"] <= attempt["first_token_s"] <= account["finished_s"]
    best = attempt["candidates"][0]
    assert best["total_s"] == min(candidate["total_s"] for candidate in attempt["candidates"])
    assert {candidate["prefill"] for candidate in attempt["candidates"]} == {None, "prefill-0"}
    later = (await client.get("/v1/requests/why")).json()
    assert later["attempts"] == account["attempts"]


async def test_kv_that_is_not_exact_is_told(house: House) -> None:
    worker, client = await house.pair(Script(cached_tokens=3, near_tokens=2))
    answer = (await client.post("/v1/completions", json=BODY | {"n": 2}, headers=ASKS)).json()
    assert answer["usage"]["prompt_tokens_details"]["cached_tokens_near"] == 2, "a prompt counts once"
    assert [(a["near_tokens"], a["inexact_from"]) for a in answer["explain"]["attempts"]] == [(2, 1), (2, 1)]
    worker.script = Script(cached_tokens=3)
    answer = (await client.post("/v1/completions", json=BODY, headers=ASKS)).json()
    assert "cached_tokens_near" not in answer["usage"]["prompt_tokens_details"]
    assert [(a["near_tokens"], a["inexact_from"]) for a in answer["explain"]["attempts"]] == [(0, None)]


async def test_a_stream_ends_with_its_account(house: House) -> None:
    _, client = await house.pair()
    response = await client.post("/v1/completions", json=BODY | {"stream": True}, headers=ASKS)
    found = events(response.text)
    assert found[-1] == "[DONE]"
    assert found[-2]["object"] == "tandem.explain"
    assert found[-2]["explain"]["attempts"][0]["ended"] == "length"


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/v1/responses", {"input": "Hello", "max_output_tokens": 4}),
        ("/v1/messages", {"messages": [{"role": "user", "content": "Hello"}], "max_tokens": 4}),
    ],
)
async def test_in_a_stream_of_typed_events_the_account_has_a_type(
    house: House, path: str, body: dict[str, object]
) -> None:
    _, client = await house.pair()
    response = await client.post(path, json=body | {"stream": True}, headers=ASKS)
    (event,) = (part for part in response.text.split("\n\n") if "tandem.explain" in part)
    kind, data = event.splitlines()
    assert kind == "event: tandem.explain"
    account = json.loads(data.removeprefix("data: "))
    assert account["type"] == "tandem.explain"
    assert account["explain"]["outcome"] == "ok"


async def test_a_lost_worker_shows_as_two_attempts(house: House) -> None:
    workers = [await house.decode(f"decode-{i}", Script(hold_after=2)) for i in range(2)]
    client = await house.client(await house.router(*workers))
    async with client.stream("POST", "/v1/completions", json=BODY | {"stream": True}, headers=ASKS) as response:
        lines = response.aiter_lines()
        while not (await anext(lines)).startswith("data:"):
            continue
        first, second = sorted(workers, key=lambda worker: -len(worker.submits))
        second.script.hold_after = None
        await first.kill()
        async for _ in lines:
            continue
    account = (await client.get("/v1/requests/why")).json()
    assert [attempt["decode"] for attempt in account["attempts"]] == [first.worker_id, second.worker_id]
    assert account["attempts"][1]["resumed_tokens"] > 0
    assert account["attempts"][0]["ended"] not in ("", "length")
    assert account["outcome"] == "ok"


async def test_preemptions_are_told_and_counted_and_leave_no_trace_in_the_answer(house: House) -> None:
    when = {0: worker_pb2.PREEMPTION_MEMORY, 2: worker_pb2.PREEMPTION_PRIORITY}
    _, client = await house.pair(Script(preempted_before=when))
    plain = (await client.post("/v1/completions", json=BODY)).json()
    answer = (await client.post("/v1/completions", json=BODY, headers=ASKS)).json()
    (attempt,) = answer.pop("explain")["attempts"]
    assert (attempt["num_preemptions"], [note["reason"] for note in attempt["preemptions"]]) == (
        2,
        ["memory", "priority"],
    )
    assert attempt["preemptions"][0]["at_s"] <= attempt["first_token_s"] <= attempt["preemptions"][1]["at_s"]
    assert answer["choices"] == plain["choices"]
    text = await router_metrics(client)
    for reason in ("memory", "priority"):
        assert f'tandem_router_preemptions_total{{reason="{reason}"}} 2.0' in text


async def test_refusals_are_on_record_too(house: House) -> None:
    _, client = await house.pair(Script(error=("context_length_exceeded", "too long")))
    assert (await client.post("/v1/completions", json=BODY, headers=ASKS)).status_code == 400
    assert (await client.get("/v1/requests/why")).json()["outcome"] == "context_length_exceeded"


async def test_nobody_sees_the_requests_of_another_tenant(house: House) -> None:
    lines = [f"{name}:{hashlib.sha256(name.encode()).hexdigest()}" for name in ("acme", "zeta")]
    keys = house.folder / "keys"
    keys.write_text("\n".join(lines))
    _, client = await house.pair(api_keys_file=keys)

    async def ask(method: str, path: str, tenant: str) -> httpx.Response:
        headers = {"authorization": f"Bearer {tenant}", "x-request-id": "why"}
        return await client.request(method, path, headers=headers, **({"json": BODY} if method == "POST" else {}))

    assert (await ask("POST", "/v1/completions", "acme")).status_code == 200
    assert (await ask("GET", "/v1/requests/why", "acme")).json()["tenant"] == "acme"
    assert (await ask("GET", "/v1/requests/why", "zeta")).status_code == 404


def test_the_latest_records_are_kept_and_of_one_tenant_half() -> None:
    explain = Explain()
    explain.begin("mine", "c", 0.0, 1, 1)
    for number in range(MAX_RECORDS // 2 + 10):
        explain.begin(str(number), "a", 0.0, 1, 1)
    assert len(explain) == MAX_RECORDS // 2 + 1
    assert explain.find("mine", "c") is not None
    assert explain.find("9", "a") is None
    assert explain.find("10", "a") is not None
    assert explain.find("10", None) is explain.find("10", "a")
    assert explain.find("10", "b") is None
