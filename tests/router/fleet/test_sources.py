"""Where workers are listed: what is read, what is refused and why, and that a mistake changes nothing."""

from __future__ import annotations

import asyncio
import os
import socket
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path

import pytest

from tandem.common.errors import ConfigError
from tandem.proto import worker_pb2
from tandem.router.fleet import sources
from tandem.router.fleet.sources import (
    MAX_FILE_BYTES,
    MAX_WORKERS,
    FileSource,
    NameSource,
    StaticSource,
    Target,
    WorkerSource,
    open_sources,
    resolve,
)
from tests.router.conftest import until

DECODE, PREFILL = worker_pb2.ROLE_DECODE, worker_pb2.ROLE_PREFILL


@asynccontextmanager
async def watched(source: WorkerSource) -> AsyncIterator[list[None]]:
    """A note for each change that the source tells of."""
    told: list[None] = []
    task = asyncio.create_task(source.watch(lambda: told.append(None)))
    try:
        yield told
        assert not task.done()
    finally:
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sources, "FILE_POLL_S", 0.01)
    monkeypatch.setattr(sources, "NAME_PAUSE_S", 0.01)


def write(path: Path, text: str | bytes) -> Path:
    """In one step, as the documentation asks for."""
    content = text.encode() if isinstance(text, str) else text
    new = path.with_suffix(".new")
    new.write_bytes(content)
    os.replace(new, path)
    return path


def test_flags_name_addresses_and_names() -> None:
    static, named, six = open_sources(
        ["unix:/run/d.sock", "10.0.0.4:9200", "[::1]:9200", "dns:decode.svc:9200"], ["dns:///prefill.svc:9100"], None
    )
    assert isinstance(static, StaticSource)
    assert static.wanted == {Target(DECODE, each) for each in ("unix:/run/d.sock", "10.0.0.4:9200", "[::1]:9200")}
    assert isinstance(named, NameSource)
    assert isinstance(six, NameSource)
    assert (named.name, six.name) == ("name decode.svc:9200", "name prefill.svc:9100")


@pytest.mark.parametrize(
    "wrong", ["", "host", "host:", ":9200", "host:0", "host:65536", "host:http", "unix:", "dns:9200", "dns::9200"]
)
def test_a_wrong_address_is_named(wrong: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"prefill_workers .*HOST:PORT"):
        open_sources([], [wrong], None)
    path = write(tmp_path / "w.yaml", f"decode: ['10.0.0.1:1', '{wrong}']")
    with pytest.raises(ConfigError, match=rf"--workers-file {path}, line 1: decode\[1\] must be HOST:PORT"):
        open_sources([], [], path)


def test_a_file_lists_workers_by_role(tmp_path: Path) -> None:
    path = write(tmp_path / "w.yaml", "decode:\n- 10.0.0.1:9200\n- unix:/run/d.sock\nprefill: ['[::1]:9100']\n")
    (source,) = open_sources([], [], path)
    assert source.wanted == {
        Target(DECODE, "10.0.0.1:9200"),
        Target(DECODE, "unix:/run/d.sock"),
        Target(PREFILL, "[::1]:9100"),
    }
    assert FileSource(write(tmp_path / "none.yaml", "decode: []")).wanted == frozenset()


RUBBISH: dict[str, str | bytes] = {
    "empty": "",
    "no list": "decode: 10.0.0.1:9200",
    "no role": "prefill: []",
    "a role twice": "decode: [a:1]\ndecode: []",
    "a name": "decode: ['dns:decode.svc:9200']",
    "unknown role": "decode: []\nrouters: []",
    "a number": "decode: [9200]",
    "not YAML": "decode: [",
    "not text": b"\x00\x01\xff",
    "deep": "decode: " + "[" * 5000,
    "an object": "decode: !!python/object/apply:os.getcwd []",
    "too many": "decode: [" + ", ".join(f"h{number}:1" for number in range(MAX_WORKERS + 1)) + "]",
    "too large": "decode: []" + "\n#" * MAX_FILE_BYTES,
}


@pytest.mark.parametrize("rubbish", RUBBISH.values(), ids=RUBBISH)
def test_a_file_that_cannot_be_used_is_refused_at_the_start(rubbish: str | bytes, tmp_path: Path) -> None:
    path = write(tmp_path / "w.yaml", rubbish)
    with pytest.raises(ConfigError, match=f"--workers-file {path}"):
        FileSource(path)
    with pytest.raises(ConfigError, match="No such file"):
        FileSource(tmp_path / "missing.yaml")


@pytest.mark.usefixtures("quick")
async def test_a_changed_file_is_followed_and_a_mistake_keeps_the_last_list(tmp_path: Path) -> None:
    path = write(tmp_path / "w.yaml", "decode: [a:1]")
    source = FileSource(path)
    async with watched(source) as told:
        for rubbish in RUBBISH.values():
            write(path, rubbish)
            await until(lambda: source.problem)
            assert source.wanted == {Target(DECODE, "a:1")}
            assert str(path) in source.problem
            write(path, "decode: [a:1]")
            await until(lambda: not source.problem)
        path.unlink()
        await until(lambda: "No such file" in source.problem)
        write(path, "decode: [b:2, c:3]")
        await until(lambda: source.wanted == {Target(DECODE, "b:2"), Target(DECODE, "c:3")})
        assert source.problem == ""
        assert len(told) == 2 * len(RUBBISH) + 2


class Names:
    """A DNS that a test writes."""

    def __init__(self, *addresses: str) -> None:
        self.addresses = addresses
        self.error: Exception | None = None
        self.asked = 0

    async def __call__(self, host: str, port: int) -> list[str]:
        self.asked += 1
        if self.error is not None:
            raise self.error
        return [f"{address}:{port}" for address in self.addresses]


def targets(*addresses: str) -> set[Target]:
    return {Target(DECODE, address) for address in addresses}


@pytest.mark.usefixtures("quick")
async def test_a_name_is_looked_up_again_and_when_it_fails_what_is_known_stays() -> None:
    names = Names("10.0.0.1", "[fd00::1]")
    source = NameSource(DECODE, "decode.svc", 9200, names, every_s=0.02)
    async with watched(source):
        await until(lambda: source.wanted == targets("10.0.0.1:9200", "[fd00::1]:9200"))
        names.addresses = ("10.0.0.2", "10.0.0.1")
        await until(lambda: source.wanted == targets("10.0.0.1:9200", "10.0.0.2:9200"))
        for error in (socket.gaierror(-2, "Name or service not known"), UnicodeError("label too long")):
            names.error = error
            await until(lambda: source.problem)
            assert source.wanted == targets("10.0.0.1:9200", "10.0.0.2:9200")
            names.error = None
            await until(lambda: not source.problem)
        names.addresses = ()
        await until(lambda: "0 addresses" in source.problem)
        assert source.wanted == targets("10.0.0.1:9200", "10.0.0.2:9200")


@pytest.mark.usefixtures("quick")
async def test_a_lost_worker_makes_a_name_be_looked_up_at_once() -> None:
    names = Names("10.0.0.1")
    source = NameSource(DECODE, "decode.svc", 9200, names, every_s=3600.0)
    async with watched(source):
        await until(lambda: source.wanted)
        names.addresses = ("10.0.0.2",)
        source.look_again()
        await until(lambda: source.wanted == targets("10.0.0.2:9200"))


async def test_a_look_up_that_hangs_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sources, "NAME_TIMEOUT_S", 0.01)

    async def hangs(host: str, port: int) -> list[str]:
        await asyncio.Event().wait()
        return []

    source = NameSource(DECODE, "decode.svc", 9200, hangs)
    async with watched(source) as told:
        await until(lambda: told)
        assert source.problem == "no answer within 0.01 s"


async def test_all_addresses_of_both_families_are_found(monkeypatch: pytest.MonkeyPatch) -> None:
    family = Callable[..., object]

    async def found(*_: object, **__: object) -> list[tuple[int, family | None, int, str, tuple[object, ...]]]:
        return [
            (socket.AF_INET, None, 0, "", ("10.0.0.1", 9200)),
            (socket.AF_INET6, None, 0, "", ("fd00::1", 9200, 0, 0)),
        ]

    monkeypatch.setattr(asyncio.get_running_loop(), "getaddrinfo", found, raising=False)
    assert await resolve("decode.svc", 9200) == ["10.0.0.1:9200", "[fd00::1]:9200"]


async def test_a_real_name_is_resolved() -> None:
    assert "127.0.0.1:9200" in await resolve("localhost", 9200)
    with pytest.raises(OSError, match=r".+"):
        await resolve("no-such-name.invalid", 9200)
