"""Time limits that count only while the event loop runs."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine
from typing import Any, TypeVar

LOOK_S = 0.25
_LOOKS = 10
_T = TypeVar("_T")


async def within(seconds: float, work: Coroutine[Any, Any, _T]) -> _T:
    """What `work` returns. Raises TimeoutError.

    Waits in short pieces: a loop that was held up for long finds at most one of them over, and hears what has come
    meanwhile before it gives up.
    """
    task = asyncio.ensure_future(work)
    try:
        for _ in range(_LOOKS):
            done, _ = await asyncio.wait({task}, timeout=seconds / _LOOKS)
            if done:
                return task.result()
        raise TimeoutError
    finally:
        if not task.done():
            task.cancel()
            await asyncio.wait({task})


class Silence:
    """How long somebody has said nothing. A loop that was held up takes that for `LOOK_S` of silence at most, and hears
    what has come meanwhile before the next look. `start`, then `stop`."""

    def __init__(self, limit_s: float, broken: Callable[[], object]) -> None:
        """`broken` is called once `limit_s` are over, and ends it."""
        self._looks = 0
        """Since the last word."""
        self._limit_s = limit_s
        self._broken = broken
        self._look_s = min(LOOK_S, limit_s / _LOOKS)
        self._next: asyncio.TimerHandle | None = None

    @property
    def seconds(self) -> float:
        return self._looks * self._look_s

    def start(self) -> None:
        self._next = asyncio.get_running_loop().call_later(self._look_s, self._look)

    def stop(self) -> None:
        if self._next is not None:
            self._next.cancel()

    def heard(self) -> None:
        self._looks = 0

    def _look(self) -> None:
        self._looks += 1
        if self.seconds >= self._limit_s:
            self._broken()
        else:
            self.start()
