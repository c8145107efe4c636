"""A child that dies comes back, later each time; one that cannot start is given up with its own last words."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path
from typing import Any

import psutil
import pytest

from tandem.runtime import child as child_module
from tandem.runtime.child import BackOff, Child, ChildFailed

pytestmark = pytest.mark.processes

WAIT = "import time; [time.sleep(0.05) for _ in range(1200)]"
"""In short naps: Python handles a signal that arrives just before a long sleep only after it."""
READY = "print('ready x y', flush=True);"


Make = Callable[..., tuple[Child, list[str]]]


@pytest.fixture
async def make() -> AsyncIterator[Make]:
    children: list[Child] = []

    def start(program: str, **options: Any) -> tuple[Child, list[str]]:
        said: list[str] = []
        child = Child(
            "w-0",
            [sys.executable, "-c", program],
            os.environ,
            asyncio.subprocess.DEVNULL,
            said.append,
            back_off=BackOff(first_s=0.01, longest_s=0.01),
            **options,
        )
        children.append(child)
        return child, said

    yield start
    for child in children:
        child.kill()


async def within(seconds: float, what: Awaitable[Any]) -> Any:
    async with asyncio.timeout(seconds):
        return await what


async def until(seconds: float, condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(seconds):
        while not condition():  # noqa: ASYNC110  # another process tells no event
            await asyncio.sleep(0.005)


def test_back_off_doubles_up_to_a_bound_and_starts_again_after_a_healthy_life() -> None:
    back_off = BackOff(first_s=1, longest_s=5, healthy_s=20)
    assert [back_off.after(lived) for lived in (0, 3, 0, 0, 0, 21, 0)] == [1, 2, 4, 5, 5, 1, 2]


async def test_a_killed_child_comes_back(make: Make) -> None:
    child, said = make(READY + WAIT)
    run = asyncio.create_task(child.run())
    await within(30, child.ready.wait())
    first = child.pid
    assert first is not None
    os.kill(first, signal.SIGKILL)

    async def replaced() -> None:
        while True:
            if child.pid not in (None, first) and child.ready.is_set():
                return
            await asyncio.sleep(0.005)

    await within(30, replaced())
    assert said == ["w-0 was killed by SIGKILL; starting it again in 0.01 s"]
    child.stop()
    await within(30, run)
    assert child.pid is None


async def test_a_mistake_in_the_configuration_is_not_tried_again(make: Make) -> None:
    child, said = make("import sys; print('no such model', file=sys.stderr); sys.exit(2)")
    with pytest.raises(ChildFailed, match="w-0 ended with status 2 before it was ready: no such model"):
        await within(30, child.run())
    assert said == []


async def test_three_starts_without_becoming_ready_are_enough(make: Make) -> None:
    child, said = make("import sys; sys.exit(7)")
    with pytest.raises(ChildFailed, match="status 7"):
        await within(60, child.run())
    assert len(said) == 2


async def test_a_child_that_does_not_answer_is_replaced(
    make: Make, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """However it fails to: with an error, a no, or silence. One that misses fewer probes is let be."""
    monkeypatch.setattr(child_module, "PROBE_EVERY_S", 0.01)
    monkeypatch.setattr(child_module, "PROBE_S", 0.1)
    asked = 0

    async def probe() -> bool:
        nonlocal asked
        asked += 1
        match asked if asked < 8 else asked - 8:
            case 3 | 7:
                return True
            case 0 | 4:
                raise ConnectionRefusedError
            case 1 | 5:
                await asyncio.sleep(60)
        return False

    says_where = "import faulthandler, signal; faulthandler.register(signal.SIGUSR2);"
    child, said = make(says_where + READY + WAIT, probe=probe)
    run = asyncio.create_task(child.run())
    await within(30, child.ready.wait())
    first = child.pid
    await until(30, lambda: child.pid not in (None, first))
    assert asked >= 11
    assert said[0].startswith("w-0 does not answer, 4 probes")
    assert said[1].startswith("w-0 was killed by SIGKILL; starting it again")
    assert "[w-0]   File " in capsys.readouterr().err, "where it hung"
    child.stop()
    await within(30, run)


async def test_a_stopped_process_is_killed_as_well(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(child_module, "PROBE_EVERY_S", 0.01)

    async def probe() -> bool:
        return False

    child, said = make(READY + WAIT, probe=probe)
    run = asyncio.create_task(child.run())
    await within(30, child.ready.wait())
    assert child.pid is not None
    os.kill(child.pid, signal.SIGSTOP)
    await until(30, lambda: len(said) >= 2)
    child.stop()
    await within(30, run)


async def test_what_a_child_started_neither_hides_its_death_nor_outlives_it(
    make: Make, capsys: pytest.CaptureFixture[str]
) -> None:
    """It holds the child's output open."""
    program = f"import os, subprocess, sys; p = subprocess.Popen([sys.executable, '-c', {WAIT!r}]);"
    child, _ = make(program + "print('started', p.pid, flush=True); sys.exit(2)")
    with pytest.raises(ChildFailed):
        await within(20, child.run())
    pid = int(capsys.readouterr().err.split()[-1])
    await until(20, lambda: not psutil.pid_exists(pid) or psutil.Process(pid).status() == psutil.STATUS_ZOMBIE)


@pytest.mark.parametrize("has_substitute", [False, True])
async def test_a_child_that_cannot_come_back_is_given_up_unless_another_does_its_work(
    make: Make, tmp_path: Path, has_substitute: bool
) -> None:
    once = tmp_path / "once"
    program = f"import pathlib, sys; p = pathlib.Path({str(once)!r})\n"
    program += "if p.exists(): print('error the folder is gone', flush=True); sys.exit(2)\n"
    child, said = make(program + f"p.touch(); {READY} sys.exit(1)", has_substitute=lambda: has_substitute)
    run = asyncio.create_task(child.run())
    await until(60, lambda: len(said) >= child_module.MAX_FAILED_RESTARTS + 3 or run.done())
    if has_substitute:
        assert not run.done()
        child.stop()
        await within(30, run)
    else:
        with pytest.raises(ChildFailed, match="w-0 ended with status 2 before it was ready: the folder is gone"):
            await run
        assert len(said) == child_module.MAX_FAILED_RESTARTS


def test_a_terminal_that_was_closed_ends_nothing() -> None:
    program = "from tandem.runtime.child import tell; import os; [tell('x' * 1000) for _ in range(1000)]; os._exit(7)"
    done = subprocess.Popen([sys.executable, "-c", program], stderr=subprocess.PIPE)
    assert done.stderr is not None
    done.stderr.close()
    assert done.wait(60) == 7


async def test_stop_asks_politely(make: Make) -> None:
    polite = "import signal, sys; signal.signal(signal.SIGTERM, lambda *_: sys.exit(0));"
    child, said = make(polite + READY + WAIT)
    run = asyncio.create_task(child.run())
    await within(30, child.ready.wait())
    child.stop()
    await within(30, run)
    assert said == []


async def test_output_is_passed_on_with_the_child_s_name(make: Make, capsys: pytest.CaptureFixture[str]) -> None:
    long_line = 3 << 20
    child, _ = make(f"import sys; print('hello'); print('x' * {long_line}, file=sys.stderr); print('bye'); sys.exit(2)")
    with pytest.raises(ChildFailed):
        await within(30, child.run())
    lines = capsys.readouterr().err.splitlines()
    assert "[w-0] hello" in lines
    assert "[w-0] bye" in lines
    assert max(map(len, lines)) < 1 << 20
