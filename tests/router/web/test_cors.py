"""Pages of other origins: who may read what, down to the exact headers."""

from __future__ import annotations

import json
from pathlib import Path

import httpx
import pytest

from tandem.common.errors import ConfigError
from tandem.router.web.cors import Cors
from tests.router.conftest import House

PAGE = "https://app.example.com"
BODY = {"prompt": "a", "max_tokens": 2}


def cors_headers(response: httpx.Response) -> dict[str, str]:
    return {name: value for name, value in response.headers.items() if name.startswith("access-control-")}


async def preflight(client: httpx.AsyncClient, path: str = "/v1/chat/completions", **headers: str) -> httpx.Response:
    asked = {"origin": PAGE, "access-control-request-method": "POST"}
    return await client.options(path, headers=asked | {name.replace("_", "-"): text for name, text in headers.items()})


async def test_is_off_by_default(house: House) -> None:
    _, client = await house.pair()
    for response in (
        await preflight(client),
        await client.get("/v1/models", headers={"origin": PAGE}),
    ):
        assert cors_headers(response) == {}
        assert "vary" not in response.headers
    assert (await preflight(client)).status_code == 204


async def test_a_named_origin_is_told_back_and_others_are_not(house: House) -> None:
    _, client = await house.pair(allowed_origins=["https://other.example", f"{PAGE}:443/"])
    allowed = await client.get("/v1/models", headers={"origin": PAGE, "x-request-id": "r"})
    assert cors_headers(allowed) == {
        "access-control-allow-origin": PAGE,
        "access-control-expose-headers": "x-request-id",
    }
    assert allowed.headers["vary"] == "Origin"
    for origin in ("https://evil.example", "null", PAGE + ".evil.example", "http://app.example.com", "*"):
        response = await client.get("/v1/models", headers={"origin": origin})
        assert (response.status_code, cors_headers(response)) == (200, {}), origin
        assert response.headers["vary"] == "Origin"
        assert "access-control-allow-origin" not in (await preflight(client, origin=origin)).headers
    assert (await client.get("/v1/models")).headers["vary"] == "Origin", "a cache must not keep it for other origins"


@pytest.mark.parametrize("setting", [["*"], [PAGE, "*"]])
async def test_a_star_allows_all_without_credentials(house: House, setting: list[str]) -> None:
    _, client = await house.pair(allowed_origins=setting)
    for origin in (PAGE, "null"):
        response = await client.get("/v1/models", headers={"origin": origin})
        assert response.headers["access-control-allow-origin"] == "*"
        assert "access-control-allow-credentials" not in response.headers
        assert "vary" not in response.headers


async def test_pages_from_files_are_named_null(house: House) -> None:
    _, client = await house.pair(allowed_origins=["null"])
    assert (await client.get("/healthz", headers={"origin": "null"})).headers["access-control-allow-origin"] == "null"
    assert not cors_headers(await client.get("/healthz", headers={"origin": PAGE}))


async def test_a_preflight_needs_no_key_and_grants_what_was_asked(house: House, tmp_path: Path) -> None:
    keys = tmp_path / "keys"
    keys.write_text(f"a:{'0' * 64}\n")
    _, client = await house.pair(allowed_origins=[PAGE], api_keys_file=keys)
    response = await preflight(client, access_control_request_headers="authorization,content-type, x-stainless-os")
    assert (response.status_code, response.content) == (204, b"")
    assert cors_headers(response) == {
        "access-control-allow-origin": PAGE,
        "access-control-allow-methods": "POST, OPTIONS",
        "access-control-allow-headers": "authorization,content-type, x-stainless-os",
        "access-control-max-age": "600",
    }
    assert response.headers["vary"].startswith("Origin, ")
    strange = await preflight(client, access_control_request_headers="x\ty: <script>")
    assert "access-control-allow-headers" not in strange.headers
    assert (await preflight(client, "/v1/models")).headers["access-control-allow-methods"] == "GET, HEAD, OPTIONS"
    assert (await preflight(client, "/nothing/here")).headers["access-control-allow-origin"] == PAGE


async def test_a_page_can_read_errors_and_their_headers(house: House, tmp_path: Path) -> None:
    keys = tmp_path / "tenants.yaml"
    keys.write_text(
        "tenants:\n- name: a\n  keys: ['sha256:2bb80d537b1da3e38bd30361aa855686bde0eacd7162fef6a25fe97bf527a25b']\n"
        "  requests_per_minute: 3\n"
    )  # sha256 of "secret"
    _, client = await house.pair(allowed_origins=[PAGE], tenants_file=keys, max_body_bytes=1000)
    from_page = {"origin": PAGE}
    with_key = from_page | {"authorization": "Bearer secret"}
    answers = [
        await client.post("/v1/completions", json=BODY, headers=from_page),
        await client.get("/nowhere", headers=from_page),
        await client.put("/v1/models", headers=with_key),
        await client.post("/v1/completions", json=BODY, headers=with_key),
        await client.post("/tokenize", content=b"x" * 1001, headers=with_key),
        await client.post("/tokenize", content=b"{", headers=with_key),
        await client.post("/v1/completions", json=BODY, headers=with_key),
    ]
    assert [answer.status_code for answer in answers] == [401, 404, 405, 200, 413, 400, 429]
    for answer in answers:
        assert answer.headers["access-control-allow-origin"] == PAGE
        exposed = answer.headers["access-control-expose-headers"].split(", ")
        assert "x-request-id" in exposed
        if answer.status_code == 429:
            assert {"retry-after", "x-ratelimit-limit-requests", "x-ratelimit-remaining-requests"} <= set(exposed)


async def test_a_page_can_read_an_internal_error(house: House, monkeypatch: pytest.MonkeyPatch) -> None:
    _, client = await house.pair(allowed_origins=[PAGE])

    def broken(*_: object) -> None:
        raise RuntimeError("a bug")

    monkeypatch.setattr("tandem.router.http.info._model", broken)
    response = await client.get("/v1/models", headers={"origin": PAGE})
    assert (response.status_code, response.headers["access-control-allow-origin"]) == (500, PAGE)


async def test_a_page_can_read_a_stream(house: House) -> None:
    _, client = await house.pair(allowed_origins=["*"])
    async with client.stream("POST", "/v1/completions", json=BODY | {"stream": True}, headers={"origin": PAGE}) as got:
        assert got.headers["access-control-allow-origin"] == "*"
        assert "x-request-id" in got.headers["access-control-expose-headers"]
        lines = [line async for line in got.aiter_lines() if line.startswith("data: ")]
    assert lines[-1] == "data: [DONE]"
    assert json.loads(lines[0].removeprefix("data: "))["object"] == "text_completion"


@pytest.mark.parametrize(
    "origin",
    [
        "example.com",
        "https://",
        "https://a/path",
        "https://*.example.com",
        "https://u@a",
        "https://a:port",
        "//a",
        "a b",
    ],
)
def test_what_is_no_origin_is_refused_at_the_start(origin: str) -> None:
    with pytest.raises(ConfigError, match="--allowed-origins"):
        Cors([origin])


def test_origins_are_compared_as_browsers_write_them() -> None:
    cors = Cors(["HTTP://LocalHost:80/", "https://[::1]:8443"])
    for origin in (b"http://localhost", b"https://[::1]:8443"):
        assert (b"access-control-allow-origin", origin) in cors.answer(origin, [])
