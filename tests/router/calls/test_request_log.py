"""A line per request that says all that matters and nothing that is a secret; a stopped terminal stops nobody."""

from __future__ import annotations

import hashlib
import re
import shlex
import threading
from pathlib import Path

import httpx
import pytest

from tandem.router import throughput
from tandem.router.app import Router
from tandem.router.calls import request_log
from tandem.router.calls.request_log import RequestLog, line_of, pairs_of
from tests.router.conftest import House, until
from tests.router.fake_worker import Script

BODY = {"prompt": "The river ran past the old mill", "max_tokens": 4}
PATH = "/v1/completions"


class Lines:
    """What a router has written, as fields."""

    def __init__(self, router: Router) -> None:
        self.text: list[str] = []
        router.service.log = RequestLog(write=self.text.append)

    async def wait(self, count: int) -> list[dict[str, str]]:
        def lines() -> list[str]:
            return "".join(self.text).splitlines()

        await until(lambda: len(lines()) >= count)
        found = lines()
        assert len(found) == count, found
        return [fields(line) for line in found]


def fields(line: str) -> dict[str, str]:
    head, _, pairs = line.partition(": request ")
    assert re.fullmatch(
        r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}Z INFO router tandem\.router\.calls\.request_log", head
    ), line
    return dict(pair.split("=", 1) for pair in shlex.split(pairs))


async def opened(house: House, script: Script | None = None, **settings: object) -> tuple[Lines, httpx.AsyncClient]:
    decode = await house.decode(script=script)
    prefill = await house.prefill(to=(decode,))
    router = await house.router(decode, prefill, **settings)
    return Lines(router), await house.client(router)


async def test_a_request_leaves_one_line_with_what_matters(house: House) -> None:
    lines, client = await opened(house, Script(cached_tokens=3))
    answer = await client.post(PATH, json=BODY, headers={"x-request-id": "mine"})
    usage = answer.json()["usage"]
    (line,) = await lines.wait(1)
    for name in ("queue_ms", "ttft_ms", "total_ms"):
        assert 0 <= float(line.pop(name)) < 60_000
    assert line == {
        "id": "mine",
        "tenant": "default",
        "call": f"POST {PATH}",
        "status": "200",
        "model": "tiny",
        "outcome": "ok",
        "finish": "length",
        "prompt_tokens": str(usage["prompt_tokens"]),
        "cached_tokens": "3",
        "output_tokens": "4",
        "worker": "decode-0",
        "prefill": "prefill-0",
    }


async def test_refusals_and_other_calls_have_their_line_and_probes_none(house: House) -> None:
    lines, client = await opened(house)
    for path in ("/healthz", "/readyz", "/metrics"):
        await client.get(path)
    await client.post(PATH, content=b"{")
    await client.get("/v1/models")
    await client.get("/nowhere")
    seen = [(line["call"], line["status"]) for line in await lines.wait(3)]
    assert seen == [(f"POST {PATH}", "400"), ("GET /v1/models", "200"), ("GET /nowhere", "404")]


async def test_neither_prompts_nor_keys_nor_forged_lines(house: House, tmp_path: Path) -> None:
    file = tmp_path / "keys"
    file.write_text(f"ann:{hashlib.sha256(b'the-key').hexdigest()}\n")
    lines, client = await opened(house, api_keys_file=file)
    body = BODY | {"prompt": "the-prompt", "user": "the-user"}
    await client.post(PATH, json=body, headers={"authorization": "Bearer the-key", "x-request-id": "a\tb"})
    await client.post(PATH, json=body, headers={"authorization": "Bearer wrong-key"})
    for forged in (
        "/%0a2026-01-01T00:00:00.000Z INFO router x: request status=200",
        "/\u2028%22 status=200",
        "/" + "a" * 500,
    ):
        await client.get(forged)
    found = await lines.wait(5)
    assert [(line["tenant"], line["status"]) for line in found[:2]] == [("ann", "200"), ("", "401")]
    assert [line["status"] for line in found[2:]] == ["404"] * 3
    text = "".join(lines.text)
    assert not re.search("the-|wrong|river|Bearer", text)
    assert max(map(len, text.splitlines())) < 600
    assert text.isascii()


async def test_a_client_that_leaves_and_a_failure_say_so(house: House) -> None:
    lines, client = await opened(house, Script(hold_after=2))
    async with client.stream("POST", PATH, json=BODY | {"stream": True}) as answer:
        async for _ in answer.aiter_lines():
            break
    (line,) = await lines.wait(1)
    assert (line["status"], line["outcome"], line["finish"]) == ("200", "cancelled", "cut") or line["status"] == "499"


@pytest.mark.parametrize("settings", [{"log_requests": False}, {"log_level": "warning"}])
async def test_one_setting_turns_it_off(house: House, settings: dict[str, object]) -> None:
    router = await house.router(await house.decode(), **settings)
    assert router.service.log is None
    client = await house.client(router)
    assert (await client.post(PATH, json=BODY)).status_code == 200


async def test_a_log_that_nobody_reads_costs_lines_and_no_request(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(request_log, "MAX_LINES", 50)
    monkeypatch.setattr(request_log, "FLUSH_S", 0.01)
    unblocked, written = threading.Event(), []

    def write(text: str) -> None:
        unblocked.wait(30)
        written.append(text)

    log = RequestLog(write=write)
    for index in range(200):
        log.note("request", f"n={index}")
    await until(lambda: log._unwritten == 50)
    log.note("request", "n=200")
    unblocked.set()
    await until(lambda: log._unwritten == 0)
    log.note("request", "n=201")
    log.close(10)
    lines = "".join(written).splitlines()
    assert [line.rpartition("n=")[2] for line in lines[:50]] == [str(index) for index in range(50)]
    assert lines[50].endswith("request n=201")
    assert lines[51].endswith("lines that could not be written in time left_out=151")


def test_values_are_plain_or_quoted() -> None:
    values = {"a": 'x" y\n', "b": None, "c": 1.5, "d": "", "e": "/v1/a-b:c", "f": "é"}
    line = line_of("router", 0.0015, "request", pairs_of(values))
    assert line == (
        "1970-01-01T00:00:00.001Z INFO router tandem.router.calls.request_log: request "
        'a="x\\" y\\n" c=1.5 d="" e=/v1/a-b:c f="\\u00e9"\n'
    )


async def test_throughput_is_told_while_there_is_work(house: House, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(throughput, "EVERY_S", 0.05)
    monkeypatch.setattr(request_log, "FLUSH_S", 0.01)
    written: list[str] = []
    monkeypatch.setattr(request_log, "_to_stderr", written.append)
    worker = await house.decode(script=Script(cached_tokens=4))
    worker.status.total_blocks, worker.status.free_blocks, worker.status.running = 100, 75, 2
    router = await house.router(worker)
    client = await house.client(router)
    await until(lambda: router.fleet.decode[0].status.running == 2)
    before = throughput.counts(router.service)
    await client.post(PATH, json=BODY)
    await until(lambda: "throughput" in "".join(written))
    told = throughput.throughput(before, throughput.counts(router.service), 2.0, router.service)
    prompt_tokens = (await client.post("/tokenize", json={"prompt": BODY["prompt"]})).json()["count"]
    assert told == {
        "prompt_tokens_per_s": prompt_tokens / 2,
        "output_tokens_per_s": 2.0,
        "running": 2,
        "waiting": 0,
        "kv_used_percent": 25.0,
        "prefix_hit_percent": round(400 / prompt_tokens, 1),
    }
    now = throughput.counts(router.service)
    assert throughput.throughput(now, now, 2.0, router.service) is None, "no work, no line"
