"""Work on one request that takes long where the request is large: then it leaves the event loop."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

from tandem.common.fair_work import FairWork
from tandem.router.tenants.caller import Caller
from tandem.router.web.request_fields import SMALL_BODY_BYTES

T = TypeVar("T")


async def off_loop(work: FairWork, caller: Caller, size: int, function: Callable[..., T], *args: Any) -> T:
    """The result of `function`: of a request of more than SMALL_BODY_BYTES found in a thread, in the caller's turn.
    Raises TandemError `overloaded`, and what the function raises."""
    if size <= SMALL_BODY_BYTES:
        return function(*args)
    return await work.run(caller.line, caller.weight, function, *args)
