"""Everything that is refused before generation, in OpenAI's shape."""

from __future__ import annotations

import asyncio
import hashlib
from collections.abc import AsyncIterator
from pathlib import Path

import httpx
import pytest

from tandem.common.errors import ConfigError
from tandem.proto import worker_pb2
from tandem.router.http import info as http_info
from tandem.router.service import Service
from tandem.router.tenants.tenants import Tenants
from tandem.router.web.exchange import Exchange
from tests.router.conftest import House
from tests.router.fake_worker import FakeWorker

CHAT = "/v1/chat/completions"


def check_shape(response: httpx.Response, status: int, code: str) -> None:
    assert response.status_code == status, response.text
    error = response.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert error["code"] == code
    assert response.headers["content-type"] == "application/json"
    assert response.headers["x-request-id"]


async def test_unknown_routes_and_methods(bare_client: httpx.AsyncClient) -> None:
    check_shape(await bare_client.get("/v1/nothing"), 404, "not_found")
    response = await bare_client.get(CHAT)
    check_shape(response, 405, "method_not_allowed")
    assert response.headers["allow"] == "POST, OPTIONS"
    check_shape(await bare_client.post("/v1/models"), 405, "method_not_allowed")
    assert (await bare_client.head("/healthz")).status_code == 200


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"{",
        b"[]",
        b"null",
        b'"x"',
        b'{"messages": "\xff"}',
        b"\xff\xfe",
        b'{"a":' + b"[" * 50000 + b"]" * 50000 + b"}",
    ],
)
async def test_bodies_that_are_no_json_object(bare_client: httpx.AsyncClient, body: bytes) -> None:
    check_shape(await bare_client.post(CHAT, content=body), 400, "invalid_request")


async def test_a_compressed_body_is_refused_by_name(bare_client: httpx.AsyncClient) -> None:
    response = await bare_client.post(CHAT, content=b"\x1f\x8b", headers={"content-encoding": "gzip"})
    check_shape(response, 400, "invalid_request")
    assert "content-encoding" in response.json()["error"]["message"]


@pytest.mark.parametrize(
    ("path", "near"),
    [
        ("/chat/completions", "/v1/chat/completions"),
        ("/v1/completions/", "/v1/completions"),
        ("/v1/metrics", "/metrics"),
    ],
)
async def test_a_path_that_is_almost_right_names_the_right_one(
    bare_client: httpx.AsyncClient, path: str, near: str
) -> None:
    response = await bare_client.post(path, json={})
    check_shape(response, 404, "not_found")
    assert response.json()["error"]["message"].endswith(f"; did you mean {near}?")


@pytest.mark.parametrize(
    ("body", "param", "message"),
    [
        ({}, "messages", "messages is required"),
        ({"messages": [{"content": "x"}]}, "messages[0].role", "messages[0].role is required"),
        (
            {"messages": [{"role": "x", "content": "x"}]},
            "messages[0].role",
            "messages[0].role must be one of assistant, developer, system, tool, user",
        ),
        (
            {"messages": [{"role": "user", "content": "x"}], "response_format": {"type": "xml"}},
            "response_format.type",
            "response_format.type must be one of json_object, json_schema, text",
        ),
        (
            {"messages": [{"role": "user", "content": "x"}], "priority": 2**40},
            "priority",
            "priority must be between -2147483648 and 2147483647, got 1099511627776",
        ),
    ],
)
async def test_an_error_names_the_field_and_what_it_takes(
    bare_client: httpx.AsyncClient, body: dict[str, object], param: str, message: str
) -> None:
    response = await bare_client.post(CHAT, json=body)
    check_shape(response, 400, "invalid_request")
    assert (response.json()["error"]["param"], response.json()["error"]["message"]) == (param, message)


async def test_unknown_model(bare_client: httpx.AsyncClient) -> None:
    body = {"model": "gpt-" + "x" * 500, "messages": [{"role": "user", "content": "hi"}]}
    response = await bare_client.post(CHAT, json=body)
    check_shape(response, 404, "model_not_found")
    assert response.json()["error"]["param"] == "model"
    assert len(response.text) < 400
    check_shape(await bare_client.get("/v1/models/other/model"), 404, "model_not_found")


async def test_no_worker_is_503(house: House) -> None:
    absent = FakeWorker(worker_pb2.ROLE_DECODE, house.folder / "absent.sock")
    client = await house.client(await house.router(absent, wait=False, worker_wait_s=0.1))
    response = await client.post("/v1/completions", json={"prompt": "a"})
    check_shape(response, 503, "unavailable")
    assert int(response.headers["retry-after"]) >= 1


async def test_body_too_large(house: House) -> None:
    _, client = await house.pair(max_body_bytes=1000)
    check_shape(await client.post(CHAT, content=b"x" * 1001), 413, "request_too_large")

    async def endless() -> AsyncIterator[bytes]:
        for _ in range(50):
            yield b"x" * 1000

    check_shape(await client.post(CHAT, content=endless()), 413, "request_too_large")
    assert (await client.post("/v1/completions", json={"prompt": "a" * 500})).status_code == 200


async def test_api_keys(house: House, tmp_path: Path) -> None:
    keys = tmp_path / "keys"
    keys.write_text(f"# people\nann:{hashlib.sha256(b'sk-ann').hexdigest()}\n")
    _, client = await house.pair(api_keys_file=keys)
    body = {"prompt": "a"}
    for headers in (
        {},
        {"authorization": "Bearer wrong"},
        {"authorization": "sk-ann"},
        {"authorization": "Basic sk-ann"},
    ):
        response = await client.post("/v1/completions", json=body, headers=headers)
        check_shape(response, 401, "invalid_api_key")
        assert response.headers["www-authenticate"] == "Bearer"
    good = {"authorization": "Bearer sk-ann"}
    assert (await client.post("/v1/completions", json=body, headers=good)).status_code == 200
    assert (await client.get("/v1/models")).status_code == 401
    for path in ("/healthz", "/readyz", "/health"):
        assert (await client.get(path)).status_code == 200


async def test_tenants_do_not_meet_each_others_cache_unless_they_share_a_group(house: House, tmp_path: Path) -> None:
    keys = tmp_path / "keys"
    digests = {name: hashlib.sha256(name.encode()).hexdigest() for name in ("ann", "bob", "cy", "di", "team")}
    groups = {"cy": ":team", "di": ":team"}
    keys.write_text("".join(f"{name}:{digest}{groups.get(name, '')}\n" for name, digest in digests.items()))
    worker, client = await house.pair(api_keys_file=keys)

    async def salt(name: str, **fields: str) -> bytes:
        headers = {"authorization": f"Bearer {name}"}
        answer = await client.post("/v1/completions", json={"prompt": "a", **fields}, headers=headers)
        assert answer.status_code == 200
        return worker.submits[-1].cache_salt

    salts = [await salt(name) for name in ("ann", "bob", "team", "cy")] + [await salt("cy", cache_salt="x")]
    assert len(set(salts)) == len(salts)
    assert await salt("di") == await salt("cy")
    assert await salt("ann") == salts[0]


@pytest.mark.parametrize("content", ["", "sk-ann", "ann:123", "# only a comment", "ann:" + "0" * 64 + ":"])
def test_key_files_that_cannot_be_used(tmp_path: Path, content: str) -> None:
    path = tmp_path / "keys"
    path.write_text(content)
    with pytest.raises(ConfigError, match="--api-keys-file"):
        Tenants.open(None, path)


async def test_request_id_is_honoured_if_sane(house: House) -> None:
    worker, client = await house.pair()
    body = {"prompt": "a", "max_tokens": 1}
    response = await client.post("/v1/completions", json=body, headers={"x-request-id": "my-id.1"})
    assert response.headers["x-request-id"] == "my-id.1"
    assert response.json()["id"] == "cmpl-my-id.1"
    again = await client.post("/v1/completions", json=body, headers={"x-request-id": "my-id.1"})
    assert again.status_code == 200
    first, second = (submit.key.request_id for submit in worker.submits)
    assert first.startswith("my-id.1.")
    assert first != second
    for bad in ("a b", "x" * 200, "é"):
        response = await client.post("/v1/completions", json=body, headers={"x-request-id": bad.encode()})
        assert response.headers["x-request-id"] != bad


async def test_traceparent_is_passed_on_if_well_formed(house: House) -> None:
    worker, client = await house.pair()
    body = {"prompt": "a", "max_tokens": 1}
    good = "00-" + "a" * 32 + "-" + "b" * 16 + "-01"
    for value in (good, "nonsense"):
        await client.post("/v1/completions", json=body, headers={"traceparent": value})
    assert [submit.traceparent for submit in worker.submits] == [good, ""]


async def test_half_a_request_and_then_nothing(house: House) -> None:
    worker, client = await house.pair()
    _, writer = await asyncio.open_connection("127.0.0.1", client.base_url.port)
    writer.write(b"POST /v1/completions HTTP/1.1\r\nhost: x\r\ncontent-length: 100\r\n\r\n{")
    await writer.drain()
    writer.close()
    assert (await client.post("/v1/completions", json={"prompt": "a"})).status_code == 200
    assert len(worker.submits) == 1


async def test_the_log_repeats_no_secrets_and_starts_no_lines(
    bare_client: httpx.AsyncClient, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    async def broken(exchange: Exchange, service: Service) -> None:
        raise RuntimeError("a bug")

    monkeypatch.setattr(http_info, "model", broken)
    headers = {"authorization": "Bearer sk-secret", "x-request-id": "1\x1b[31m"}
    response = await bare_client.get("/v1/models/a%0A2026-01-01%20INFO%20forged?api_key=sk-secret", headers=headers)
    check_shape(response, 500, "internal")
    assert "sk-secret" not in caplog.text
    assert not [line for line in caplog.text.splitlines() if line.startswith("2026-01-01") or "\x1b" in line]
