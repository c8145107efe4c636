"""`tandem profile`: which points there is room for, and what is said where nothing can be measured."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest

from tandem.common.errors import ConfigError
from tandem.proto import worker_pb2
from tandem.runtime import cli
from tandem.runtime.profile import STEPS, Grid, ProfileConfig
from tests.worker.test_worker_sessions import Worker, worker

__all__ = ["worker"]

INFO = worker_pb2.WorkerInfo(max_num_seqs=8, num_blocks=100, block_size=16, max_model_len=1000, chunk_tokens=256)


async def profile(*arguments: str) -> int:
    return await asyncio.to_thread(cli.main, ["profile", *arguments])


def test_the_grid_is_what_the_worker_has_room_for() -> None:
    """1,600 tokens of KV: eight requests of 64 tokens and their answers, not eight of 256."""
    grid = Grid.of(INFO, ProfileConfig(target="x"))
    assert grid.prefill == ((64, 0), (256, 0), (64, 256))
    assert grid.decode == ((1, 64), (1, 256), (2, 64), (2, 256), (4, 64), (4, 256), (8, 64))
    own = Grid.of(INFO, ProfileConfig(target="x", batch=["3", "1", "3", "9"], context=["900"]))
    assert own.decode == ((1, 900),), "nine are more than it takes, three have no room"
    longest = 1000 - 1 - STEPS - 2 - 4
    assert Grid.of(INFO, ProfileConfig(target="x", batch=["1"], context=[str(longest)])).decode == ((1, longest),)
    with pytest.raises(ConfigError, match="batch, context: the worker has no room for any of them: it takes 8"):
        Grid.of(INFO, ProfileConfig(target="x", context=["2000"]))


@pytest.mark.parametrize(
    ("flags", "names"),
    [
        (("--batch", "0"), "batch 0: must be a whole number between 1 and"),
        (("--batch", "1,many"), "batch many: must be a whole number"),
        (("--context", "9999999999999"), "context 9999999999999: must be"),
        (("--out", "/nowhere/at/all.csv"), "out /nowhere/at/all.csv: must be a file in a folder that exists"),
        (("--repeats", "0"), "repeats 0: must be between 1 and 100"),
        (("--timeout-s", "0"), "--timeout-s 0: must be between"),
    ],
)
async def test_a_mistake_names_the_field(
    flags: tuple[str, ...], names: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert await profile("x:1", *flags) == 2
    assert names in capsys.readouterr().err


async def test_nobody_there_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert await profile(f"unix:{tmp_path}/nobody.sock") == 1
    said = capsys.readouterr().err
    assert f"tandem profile: the worker unix:{tmp_path}/nobody.sock does not answer: " in said
    assert len(said.splitlines()) == 1


async def test_a_worker_that_takes_nothing_is_left_alone(
    worker: Worker, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert await profile(f"unix:{tmp_path}/w.sock") == 2
    assert "the worker has no room for any of them" in capsys.readouterr().err
    assert worker.engine.requests == {}
