"""`tandem drain`: a worker that is emptied from the command line, and what is said where that cannot be."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest

from tandem.engine.request import FinishReason, RequestOutput
from tandem.runtime import cli, running
from tandem.runtime.running import announce
from tests.worker.test_worker_sessions import Worker, until, worker

__all__ = ["worker"]


def address_of(tmp_path: Path) -> str:
    return f"unix:{tmp_path}/w.sock"


async def drain(*arguments: str) -> int:
    return await asyncio.to_thread(cli.main, ["drain", *arguments])


async def test_it_waits_until_the_worker_is_empty_and_shows_how_far_it_is(
    worker: Worker, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    session = await worker.session()
    one = await session.submit("one")
    await until(lambda: one in worker.engine.requests)
    draining = asyncio.create_task(drain(address_of(tmp_path)))
    await until(lambda: worker.service.status().draining)
    await session.submit("two")
    assert (await session.error()).message == "the worker is draining"
    said = ""

    def shown() -> str:
        nonlocal said
        said += capsys.readouterr().out
        return said

    await until(lambda: "w0: 1 running, 0 waiting" in shown())
    assert not draining.done()
    del worker.engine.requests[one]
    worker.engine.emit(RequestOutput(one, finish_reason=FinishReason.LENGTH))
    assert await draining == 0
    assert shown().splitlines()[-1] == "w0 is empty: 1 requests finished. It can be stopped."


async def test_what_takes_longer_than_the_grace_goes_on_elsewhere(
    worker: Worker, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    session = await worker.session()
    one = await session.submit("one")
    await until(lambda: one in worker.engine.requests)
    assert await drain(address_of(tmp_path), "--grace-s", "0") == 0
    assert (await session.error()).code == "unavailable", "with which routers go on elsewhere"
    assert "0 requests finished, 1 were ended, for other workers to go on with" in capsys.readouterr().out
    assert await drain(address_of(tmp_path)) == 0, "asked again, it is as empty as before"


async def test_a_worker_that_runs_here_is_found_by_its_name(
    worker: Worker, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(running, "scratch_roots", lambda: [tmp_path])
    assert await drain("decode-7") == 2
    assert "no `tandem serve` runs here" in capsys.readouterr().err
    folder = tmp_path / "tandem-1"
    folder.mkdir()
    announce(folder, "http://127.0.0.1:1", "tiny", "", "")
    (folder / "decode-0.sock").symlink_to(tmp_path / "w.sock")
    assert await drain("decode-7") == 2
    assert "there are decode-0" in capsys.readouterr().err
    assert await drain("decode-0") == 0
    assert worker.service.status().draining
    second = tmp_path / "tandem-2"
    second.mkdir()
    announce(second, "http://127.0.0.1:2", "tiny", "", "")
    (second / "decode-0.sock").symlink_to(tmp_path / "w.sock")
    assert await drain("decode-0") == 2
    assert "several servers here have a worker decode-0" in capsys.readouterr().err


async def test_nobody_there_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert await drain(f"unix:{tmp_path}/nobody.sock") == 1
    said = capsys.readouterr().err
    assert f"tandem drain: the worker unix:{tmp_path}/nobody.sock does not answer: " in said
    assert len(said.splitlines()) == 1
    assert await drain() == 2
    assert "--target is required" in capsys.readouterr().err
