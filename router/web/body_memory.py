"""Memory for the bodies of requests, which all requests of the process share, by whichever door they come."""

from __future__ import annotations

from tandem.common.errors import TandemError

MAX_HELD_BYTES = 256 << 20
"""Bytes of all bodies, from arrival to the end of the answer; what is made of them can be 20 times as large. A tenant
may hold as much as is left free then: one alone half, two that fill it a third each, and a newcomer finds room."""

_held: dict[str, int] = {}
"""Bytes by tenant."""
_held_bytes = 0


def held_bytes() -> int:
    """Bytes of all bodies together."""
    return _held_bytes


class BodyMemory:
    """What one request holds. `release` it whatever happens."""

    __slots__ = ("_size", "_tenant")

    def __init__(self) -> None:
        self._tenant = ""
        self._size = 0

    @property
    def size(self) -> int:
        return self._size

    def hold(self, size: int, tenant: str) -> None:
        """The body of this tenant's request has so many bytes now. Raises TandemError `overloaded` where too much is
        held."""
        more = size - self._size
        if _held.get(tenant, 0) + more > MAX_HELD_BYTES - (_held_bytes + more):
            problem = f"requests of tenant `{tenant}` fill the memory that this router has for bodies"
            raise TandemError("overloaded", f"{problem}; try again shortly", retry_after_s=1.0)
        self._tenant = tenant
        self._take(size)

    def release(self) -> None:
        """The request is over, and what was made of its body is gone."""
        if self._size:
            self._take(0)

    def _take(self, size: int) -> None:
        global _held_bytes
        more = size - self._size
        self._size = size
        _held_bytes += more
        mine = _held[self._tenant] = _held.get(self._tenant, 0) + more
        if not mine:
            del _held[self._tenant]
