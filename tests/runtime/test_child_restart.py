"""A child that dies comes back, later each time; one that cannot start is given up with its own last words."""

from __future__ import annotations

import asyncio
import os
import signal
import sys
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any

import pytest

from tandem.runtime.child import BackOff, Child, ChildFailed

pytestmark = pytest.mark.processes

WAIT = "import time; [time.sleep(0.05) for _ in range(1200)]"
"""In short naps: Python handles a signal that arrives just before a long sleep only after it."""
READY = "print('ready x y', flush=True);"


@pytest.fixture
async def make() -> AsyncIterator[Callable[[str], tuple[Child, list[str]]]]:
    children: list[Child] = []

    def start(program: str) -> tuple[Child, list[str]]:
        said: list[str] = []
        child = Child(
            "w-0",
            [sys.executable, "-c", program],
            os.environ,
            asyncio.subprocess.DEVNULL,
            said.append,
            back_off=BackOff(first_s=0.01),
        )
        children.append(child)
        return child, said

    yield start
    for child in children:
        child.kill()


Make = Callable[[str], tuple[Child, list[str]]]


async def within(seconds: float, what: Awaitable[Any]) -> Any:
    async with asyncio.timeout(seconds):
        return await what


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
