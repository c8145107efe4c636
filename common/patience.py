"""A time limit that counts only while the event loop runs."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine
from typing import Any, TypeVar

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
