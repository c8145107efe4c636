"""Ways to read another node's arena that need no byte on the connection: `PeerConnection` leases the objects there, has
a window copy them, and ends the lease. `nixl.py` has the window to another host."""

from __future__ import annotations

import enum
from collections.abc import Sequence
from typing import Protocol

import numpy as np

Place = tuple[int, memoryview]
"""Offset in the other node's arena, and the writable buffer that is to hold as many bytes from there on."""


class Outcome(enum.Enum):
    """What became of one copy."""

    DONE = enum.auto()
    NOT_BEGUN = enum.auto()
    """Nothing was and will be written: the bytes may be had in another way."""
    LOST = enum.auto()
    """Not all bytes came, and some may come later: the buffer must not be filled in another way."""


class Window(Protocol):
    """A way into another node's arena."""

    @property
    def capacity_bytes(self) -> int:
        """Bytes of the other node's arena."""

    def read(self, places: Sequence[Place]) -> list[Outcome]:
        """Never raises. Blocks for at most some seconds. The places lie inside of the arena, and are leased."""

    def close(self) -> None: ...


class MappedArena:
    """The arena of a node of this host, in this process's address space."""

    def __init__(self, arena: memoryview) -> None:
        self._arena = np.frombuffer(arena, np.uint8)

    @property
    def capacity_bytes(self) -> int:
        return len(self._arena)

    def read(self, places: Sequence[Place]) -> list[Outcome]:
        """numpy's copy lets other threads run; a memoryview's does not."""
        for offset, out in places:
            np.copyto(np.frombuffer(out, np.uint8), self._arena[offset : offset + len(out)])
        return [Outcome.DONE] * len(places)

    def write(self, offset: int, content: memoryview) -> None:
        np.copyto(self._arena[offset : offset + len(content)], np.frombuffer(content, np.uint8))

    def close(self) -> None:
        """The memory is unmapped when nobody looks at it any more."""


def address_of(view: memoryview) -> int:
    """Address of the first byte of `view`, in this process."""
    return int(np.frombuffer(view, np.uint8).__array_interface__["data"][0])
