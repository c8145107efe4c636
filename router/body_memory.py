"""Memory for the bodies of large requests, which all requests of the process share, by whichever door they come."""

from __future__ import annotations

from tandem.common.errors import TandemError

LARGE_BODY_BYTES = 256 * 1024
MAX_HELD_BYTES = 128 << 20
"""Of bodies larger than that, from arrival to the end of the answer; what is made of them can be 20 times as large."""

_held_bytes = 0


def held_bytes() -> int:
    """Bytes of all bodies together."""
    return _held_bytes


class BodyMemory:
    """What one request holds. `release` it whatever happens."""

    __slots__ = ("_held",)

    def __init__(self) -> None:
        self._held = 0

    def hold(self, size: int) -> None:
        """The body has so many bytes now. Raises TandemError `overloaded` where too much is held."""
        if size > LARGE_BODY_BYTES:
            self._take(size)

    def release(self) -> None:
        """The request is over, and what was made of its body is gone."""
        self._take(0)

    def _take(self, size: int) -> None:
        global _held_bytes
        more = size - self._held
        if more > 0 and _held_bytes + more > MAX_HELD_BYTES:
            problem = "large requests fill the memory that this router has for them; try again shortly"
            raise TandemError("overloaded", problem, retry_after_s=1.0)
        self._held = size
        _held_bytes += more
