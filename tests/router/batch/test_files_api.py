"""/v1/files: uploads, lists, contents, and what is refused."""

from __future__ import annotations

import asyncio
import contextlib
import os
from pathlib import Path
from typing import Any

import httpx
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from openai import AsyncOpenAI

from tandem.common.errors import ConfigError, TandemError
from tandem.router.batch import files, store
from tandem.router.batch.files import Storage
from tandem.router.http import files as http_files
from tandem.router.http.files import _Form
from tests.router.batch.conftest import Desk, OpenDesk
from tests.router.conftest import House, until


@pytest.fixture
async def office(desk: OpenDesk, house: House) -> Desk:
    return await desk(await house.decode())


def error(answer: httpx.Response) -> tuple[int, str | None, str]:
    found = answer.json()["error"]
    return answer.status_code, found["param"], found["message"]


async def test_no_field_of_the_form_is_ignored_in_silence(office: Desk) -> None:
    answer = await office.upload(b"{}", note="mine")
    assert (answer.status_code, answer.headers["x-tandem-ignored"]) == (200, "note")
    assert error(await office.upload(b"{}", porpose="batch")) == (
        400,
        "porpose",
        "porpose is not known; did you mean purpose?",
    )


async def test_a_file_comes_back_as_it_was(office: Desk) -> None:
    content = os.urandom(3 * files.PART_BYTES + 17)
    made = (await office.upload(content)).json()
    assert made["object"] == "file"
    assert made["purpose"] == "batch"
    assert made["bytes"] == len(content)
    assert made["filename"] == "input.jsonl"
    assert made["expires_at"] - made["created_at"] == 30 * 24 * 3600
    assert (await office.http.get(f"/v1/files/{made['id']}")).json() == made
    answer = await office.http.get(f"/v1/files/{made['id']}/content")
    assert answer.content == content
    assert answer.headers["content-length"] == str(len(content))


async def test_the_storage_is_closed_to_other_users_also_one_that_was_open(tmp_path: Path) -> None:
    (tmp_path / "storage" / "files").mkdir(parents=True)
    (tmp_path / "storage" / files.INDEX).touch()
    (tmp_path / "storage" / files.INDEX).chmod(0o644)
    before = os.umask(0)
    try:
        storage = Storage(tmp_path / "storage")
        async with storage.upload("alice") as upload:
            await upload.write(b"{}")
            await upload.finish("input.jsonl", 3600)
        assert not [path for path in (tmp_path / "storage").rglob("*") if path.stat().st_mode & 0o077]
        assert (tmp_path / "storage").stat().st_mode & 0o777 == 0o700
        await storage.close()
    finally:
        os.umask(before)


async def test_the_openai_client_manages_files(office: Desk) -> None:
    client = AsyncOpenAI(
        base_url=f"{office.router.url}/v1", api_key="none", http_client=httpx.AsyncClient(trust_env=False)
    )
    made = await client.files.create(
        file=("lines.jsonl", b"{}\n"), purpose="batch", expires_after={"anchor": "created_at", "seconds": 7200}
    )
    assert made.expires_at == made.created_at + 7200
    assert [file.id async for file in client.files.list()] == [made.id]
    assert (await client.files.content(made.id)).content == b"{}\n"
    assert (await client.files.delete(made.id)).deleted
    assert [file.id async for file in client.files.list()] == []
    await client.close()


async def test_lists_come_in_pages(office: Desk) -> None:
    ids = [(await office.upload(b"x")).json()["id"] for _ in range(5)]

    async def listed(**query: Any) -> tuple[list[str], bool]:
        page = (await office.http.get("/v1/files", params=query)).json()
        return [file["id"] for file in page["data"]], page["has_more"]

    assert await listed() == (ids[::-1], False)
    assert await listed(limit=2) == ([ids[4], ids[3]], True)
    assert await listed(limit=2, after=ids[3]) == ([ids[2], ids[1]], True)
    assert await listed(limit=2, after=ids[1]) == ([ids[0]], False)
    assert await listed(order="asc", limit=3) == (ids[:3], True)
    assert await listed(purpose="batch_output") == ([], False)
    for query, param in (
        ({"limit": 0}, "limit"),
        ({"limit": "x"}, "limit"),
        ({"order": "up"}, "order"),
        ({"after": "y"}, "after"),
    ):
        assert error(await office.http.get("/v1/files", params=query))[:2] == (400, param)


async def test_what_is_wrong_with_an_upload_is_named(office: Desk) -> None:
    async def sent(data: dict[str, str], parts: Any) -> tuple[int, str | None, str]:
        return error(await office.http.post("/v1/files", data=data, files=parts))

    ok = {"file": ("a", b"x")}
    assert (await sent({"purpose": "assistants"}, ok))[:2] == (400, "purpose")
    assert (await sent({}, ok))[:2] == (400, "purpose")
    assert (await sent({"purpose": "batch"}, {"other": ("a", b"x")}))[:2] == (400, "file")
    assert (await sent({"purpose": "batch"}, [("file", ("a", b"x")), ("file", ("b", b"y"))]))[:2] == (400, "file")
    days = {"purpose": "batch", "expires_after[anchor]": "created_at"}
    for seconds in ("5", "x", "99999999", "-1"):
        assert (await sent({**days, "expires_after[seconds]": seconds}, ok))[:2] == (400, "expires_after[seconds]")
    bad_anchor = {"purpose": "batch", "expires_after[anchor]": "now", "expires_after[seconds]": "7200"}
    assert (await sent(bad_anchor, ok))[:2] == (400, "expires_after[anchor]")
    assert error(await office.http.post("/v1/files", json={"purpose": "batch"}))[0] == 400
    cut = b'--b\r\ncontent-disposition: form-data; name="file"; filename="a"\r\n\r\nxyz'
    cut_type = {"content-type": "multipart/form-data; boundary=b"}
    assert "incomplete" in error(await office.http.post("/v1/files", content=cut, headers=cut_type))[2]
    assert list(office.lane.storage.path("").iterdir()) == []


async def test_sizes_are_bounded(office: Desk, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(files, "MAX_FILE_BYTES", 1000)
    monkeypatch.setattr(http_files, "MAX_FORM_BYTES", 3000)
    assert (await office.upload(b"x" * 1000)).status_code == 200
    assert (await office.upload(b"x" * 1001)).status_code == 413
    assert (await office.upload(b"x" * 5000)).status_code == 413
    assert (await office.upload(b"x", **{f"field{i}": "x" for i in range(20)})).status_code == 400
    assert error(await office.upload(b"x", metadata="x" * 2000))[:2] == (400, "metadata")

    async def stream() -> Any:  # without a content-length
        yield b'--b\r\ncontent-disposition: form-data; name="file"; filename="a"\r\n\r\n'
        for _ in range(100):
            yield b"x" * 100

    headers = {"content-type": "multipart/form-data; boundary=b"}
    assert (await office.http.post("/v1/files", content=stream(), headers=headers)).status_code == 413
    monkeypatch.setattr(store, "MAX_TENANT_BYTES", 1500)
    assert error(await office.upload(b"x" * 600))[:2] == (429, "file")
    monkeypatch.setattr(store, "MAX_TENANT_FILES", 1)
    assert (await office.upload(b"")).status_code == 429
    assert len(list(office.lane.storage.path("").iterdir())) == 1


async def test_unknown_files_are_not_found(office: Desk) -> None:
    outside = "../index.sqlite/content", "%2e%2e/index.sqlite/content"
    for method, path in (("DELETE", "x"), *(("GET", path) for path in ("x", "x/content", *outside))):
        assert (await office.http.request(method, f"/v1/files/{path}")).status_code == 404
    assert (await office.http.post("/v1/files/x")).status_code == 405


async def test_names_of_files_are_only_shown(office: Desk) -> None:
    answer = await office.http.post(
        "/v1/files", data={"purpose": "batch"}, files={"file": ("../../etc/pass\x07wd" + "x" * 500, b"x")}
    )
    assert answer.json()["filename"].startswith("pass")
    assert len(answer.json()["filename"]) <= 255


async def test_a_router_without_storage_says_so(house: House) -> None:
    _, client = await house.pair()
    for path in ("/v1/files", "/v1/batches"):
        status, _, message = error(await client.get(path))
        assert status == 404
        assert "storage" in message


async def test_a_client_that_leaves_in_the_middle_leaves_nothing(office: Desk) -> None:
    _, writer = await asyncio.open_connection("127.0.0.1", office.router.port)
    form = b'--b\r\ncontent-disposition: form-data; name="file"; filename="a"\r\n\r\n' + b"x" * 2_000_000
    head = b"POST /v1/files HTTP/1.1\r\nhost: x\r\ncontent-type: multipart/form-data; boundary=b\r\n"
    writer.write(head + b"content-length: 9999999\r\n\r\n" + form)
    await writer.drain()
    folder = office.lane.storage.path("")
    await until(lambda: list(folder.iterdir()))
    writer.close()
    await until(lambda: not list(folder.iterdir()))


async def test_too_many_uploads_at_once_are_refused(office: Desk, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(files, "MAX_UPLOADS", 1)
    async with office.lane.storage.upload("default"):
        answer = await office.upload(b"x")
        assert answer.status_code == 503
        assert answer.headers["retry-after"]
    assert (await office.upload(b"x")).status_code == 200


async def test_a_tenant_that_uploads_all_it_can_leaves_room_for_others(office: Desk) -> None:
    storage = office.lane.storage
    async with contextlib.AsyncExitStack() as stack:
        for _ in range(files.MAX_UPLOADS // 2):
            await stack.enter_async_context(storage.upload("greedy"))
        with pytest.raises(TandemError, match="16 files of `greedy` are being uploaded"):
            await stack.enter_async_context(storage.upload("greedy"))
        assert (await office.upload(b"x")).status_code == 200
    assert not storage._uploads


async def test_expired_files_and_orphans_go(office: Desk, monkeypatch: pytest.MonkeyPatch) -> None:
    storage = office.lane.storage
    kept = (await office.upload(b"x")).json()["id"]
    async with storage.upload("default") as upload:
        await upload.write(b"x")
        gone = (await upload.finish("a", -1)).id
    old, new = storage.path(".file-old"), storage.path("file-new")
    old.write_bytes(b"x")
    new.write_bytes(b"x")
    os.utime(old, (1, 1))
    assert (await office.http.get(f"/v1/files/{gone}")).status_code == 404
    await storage.sweep(kept_s=100.0)
    assert {path.name for path in storage.path("").iterdir()} == {kept, "file-new"}


async def test_a_disk_that_fails_is_answered(office: Desk, monkeypatch: pytest.MonkeyPatch) -> None:
    file_id = (await office.upload(b"x")).json()["id"]

    def full(descriptor: int, data: bytes) -> int:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(files, "write_all", full)
    answer = await office.upload(b"x")
    assert answer.status_code == 503
    assert "No space left" in answer.json()["error"]["message"]
    monkeypatch.undo()
    assert [path.name for path in office.lane.storage.path("").iterdir()] == [file_id]


def test_a_folder_that_cannot_be_used_is_a_clear_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(ConfigError, match="--storage"):
        Storage(tmp_path / "file")
    (tmp_path / "index.sqlite").write_bytes(b"not a database" * 100)
    with pytest.raises(ConfigError, match="--storage"):
        Storage(tmp_path)


@settings(deadline=None, max_examples=50, suppress_health_check=[HealthCheck.too_slow])
@given(st.binary(max_size=2000), st.integers(1, 50))
def test_the_content_of_a_form_does_not_depend_on_how_it_is_cut(content: bytes, step: int) -> None:
    boundary = "0123456789abcdef"
    request = httpx.Request(
        "POST",
        "http://x",
        data={"purpose": "batch"},
        files={"file": ("é.jsonl", content)},
        headers={"content-type": f"multipart/form-data; boundary={boundary}"},
    )
    body = request.read()
    form = _Form(f"multipart/form-data; boundary={boundary}")
    found = b"".join(b"".join(form.feed(body[at : at + step])) for at in range(0, len(body), step))
    assert found == content
    form.check()


PIECES = [
    b"--b",
    b"--b--",
    b"\r\n",
    b"\n",
    b":",
    b";",
    b"content-disposition",
    b' form-data; name="file"',
    b'; filename="x"',
    b"\x00",
    b"x" * 50,
    b'"',
    b"=",
]


@settings(deadline=None, max_examples=80)
@given(st.lists(st.sampled_from(PIECES), max_size=30))
def test_a_malformed_form_is_refused_and_nothing_else(pieces: list[bytes]) -> None:
    status = 400
    try:
        form = _Form("multipart/form-data; boundary=b")
        form.feed(b"--b\r\n" + b"".join(pieces))
        form.check()
    except TandemError as error:
        status = error.kind.http_status
    assert status == 400
