"""The pages for people: what they say is true, works, and cannot be turned against who looks at them."""

from __future__ import annotations

import base64
import hashlib
import html
import json
import re
import shlex
from dataclasses import replace
from pathlib import Path

import httpx
import pytest

from tandem.router.app import Router
from tests.router.conftest import House

PAGES = ("/", "/docs")
NAME = 'it\'s <b>$bold</b> & "more"'


def command(page: str) -> list[str]:
    """The words of the curl line, as a shell reads them."""
    found = re.search("<pre>(curl .*?)</pre>", page, re.DOTALL)
    assert found is not None
    return shlex.split(html.unescape(found.group(1)))


async def run(words: list[str], **headers: str) -> httpx.Response:
    """What curl would do."""
    given = {words[i + 1].split(": ")[0]: words[i + 1].split(": ")[1] for i, word in enumerate(words) if word == "-H"}
    body = words[words.index("-d") + 1]
    async with httpx.AsyncClient(trust_env=False, timeout=60) as client:
        return await client.post(words[1], content=body.encode(), headers=given | headers)


async def test_the_first_page_says_what_this_is_and_its_command_works(house: House) -> None:
    router = await house.router(await house.decode())
    client = await house.client(router)
    page = await client.get("/")
    assert page.headers["content-type"] == "text/html; charset=utf-8"
    assert "Tandem serves <code>tiny</code>" in page.text
    answer = await run(command(page.text))
    assert answer.status_code == 200
    assert answer.json()["object"] == "chat.completion"
    for link in re.findall(r'<a href="([^"]+)"', page.text):
        assert (await client.get(f"/{link}")).status_code == 200, link


async def test_with_keys_the_pages_are_open_hold_no_secret_and_say_where_the_key_goes(
    house: House, tmp_path: Path
) -> None:
    keys = tmp_path / "keys"
    digest = hashlib.sha256(b"the-key").hexdigest()
    keys.write_text(f"tenant-seven:{digest}\n")
    router = await house.router(await house.decode(), api_keys_file=keys)
    client = await house.client(router)
    for path in (*PAGES, "/openapi.json"):
        page = await client.get(path)
        assert page.status_code == 200
        assert not re.search(f"the-key|{digest}|tenant-seven|{keys}|{house.model}|sock", page.text)
    words = command((await client.get("/")).text)
    assert "Authorization: Bearer $TANDEM_API_KEY" in words
    answer = await run([word.replace("$TANDEM_API_KEY", "the-key") for word in words])
    assert answer.status_code == 200


async def test_a_model_without_a_template_is_asked_to_write_on(house: House, monkeypatch: pytest.MonkeyPatch) -> None:
    router = await house.router(await house.decode())
    monkeypatch.setattr(router.service, "model", replace(router.model, template=None))
    client = await house.client(router)
    assert (await run(command((await client.get("/")).text))).json()["object"] == "text_completion"


@pytest.mark.parametrize(
    ("headers", "base"),
    [
        ({"host": "llm.example.com"}, "http://llm.example.com"),
        ({"host": "[::1]:8000"}, "http://[::1]:8000"),
        ({"host": "llm.example.com", "x-forwarded-proto": "https"}, "https://llm.example.com"),
        ({"host": "a'; rm -rf ~;'"}, "http://127.0.0.1:8000"),
        ({"host": "<script>alert(1)</script>"}, "http://127.0.0.1:8000"),
        ({"host": "a$(reboot)"}, "http://127.0.0.1:8000"),
        ({"host": "a", "x-forwarded-proto": "javascript"}, "http://a"),
    ],
)
async def test_what_a_client_calls_this_server_is_shown_only_where_it_is_harmless(
    bare_client: httpx.AsyncClient, headers: dict[str, str], base: str
) -> None:
    page = (await bare_client.get("/", headers=headers)).text
    assert command(page)[1].startswith(f"{base}/v1/")
    assert "<script" not in page


async def test_odd_names_of_models_do_no_harm(bare_client: httpx.AsyncClient, monkeypatch: pytest.MonkeyPatch) -> None:
    app = bare_client._transport.app  # type: ignore[attr-defined]
    monkeypatch.setattr(app._service, "model", replace(app._service.model, name=NAME))
    page = (await bare_client.get("/")).text
    assert "<b>" not in page
    words = command(page)
    assert json.loads(words[words.index("-d") + 1])["model"] == NAME


@pytest.mark.parametrize("path", PAGES)
async def test_pages_run_their_own_script_only(bare_client: httpx.AsyncClient, path: str) -> None:
    page = await bare_client.get(path)
    policy = dict(part.strip().split(" ", 1) for part in page.headers["content-security-policy"].split(";"))
    assert policy["default-src"] == policy["frame-ancestors"] == policy["base-uri"] == "'none'"
    for tag in ("script", "style"):
        for inside in re.findall(f"<{tag}>(.*?)</{tag}>", page.text, re.DOTALL):
            digest = base64.b64encode(hashlib.sha256(inside.encode()).digest()).decode()
            assert f"'sha256-{digest}'" in policy[f"{tag}-src"]
    assert page.headers["x-content-type-options"] == "nosniff"
    assert page.headers["x-frame-options"] == "DENY"
    assert page.headers["referrer-policy"] == "no-referrer"
    assert not re.search(r"""(src|href)=["'](https?:)?//""", page.text), "nothing is fetched from elsewhere"
    assert not re.search(r"\son\w+=", page.text.partition("<script>")[0]), "no script in attributes"


async def test_head_and_options_of_pages(house: House) -> None:
    router: Router = await house.router(await house.decode())
    client = await house.client(router)
    for path in (*PAGES, "/openapi.json"):
        whole, head = await client.get(path), await client.head(path)
        assert (head.status_code, head.content) == (200, b"")
        assert head.headers["content-length"] == str(len(whole.content))
        assert (await client.options(path)).headers["allow"] == "GET, HEAD, OPTIONS"
        assert (await client.post(path)).status_code == 405
