"""Host memory of a node: one mapping, contiguous runs, shared with other processes by its descriptor.

Pages are taken from the system a little before they are first written (`pages.py`) and are then reused for as long as
the node lives: best fit with merging of neighbours keeps old runs in use, so a store of which little is used stays
small.
"""

from __future__ import annotations

import contextlib
import mmap
import os
from bisect import bisect_left, insort

from tandem.common.errors import ConfigError
from tandem.common.memory import readable_size, usable_memory
from tandem.kvstore.interfaces import StoreIntegrityError
from tandem.kvstore.node.pages import PageWarmer
from tandem.wire.shared_memory import can_share, share

ALIGNMENT = 4096
"""Alignment of every run in bytes: one page, which is also what direct disk reads need."""


def aligned(size: int) -> int:
    return -(-size // ALIGNMENT) * ALIGNMENT


class HostArena:
    """Allocates runs of bytes. Not thread-safe: the node calls it under its lock; views may be used from any thread."""

    def __init__(self, capacity_bytes: int) -> None:
        """Raises ConfigError when there is not one page, or the system does not grant the mapping."""
        self.capacity_bytes = capacity_bytes // ALIGNMENT * ALIGNMENT
        if self.capacity_bytes <= 0:
            raise ConfigError(f"kv_host_bytes is {capacity_bytes}: give at least {ALIGNMENT}")
        if capacity_bytes > (usable := usable_memory()):
            raise ConfigError(
                f"kv_host_bytes is {capacity_bytes}, more than the memory there is ({readable_size(usable)}): give less"
            )
        self.fd = -1
        """Descriptor of the memfd, sealed against a change of size; -1 where there is none and the memory is this
        process's."""
        try:
            self._view = self._map_memory()
        except OSError as error:
            raise ConfigError(f"kv_host_bytes is {capacity_bytes} and cannot be mapped ({error}): give less") from error
        self.pages = PageWarmer(self._view)
        self._runs: dict[int, int] = {}
        """Size by offset, of what is handed out."""
        self._free_by_size: list[tuple[int, int]] = [(self.capacity_bytes, 0)]
        """(size, offset), sorted."""
        self._free_at: dict[int, int] = {0: self.capacity_bytes}
        self._free_ending_at: dict[int, int] = {self.capacity_bytes: 0}
        self.used_bytes = 0

    def _map_memory(self) -> memoryview:
        if not can_share():
            return memoryview(mmap.mmap(-1, self.capacity_bytes))
        memory, view = share("tandem-kv-host", self.capacity_bytes)
        self.fd = memory.descriptor
        return view

    def allocate(self, size: int) -> int | None:
        """Offset of a run of `size` bytes; None if no free run is long enough. Raises ValueError for no bytes."""
        if size <= 0:
            raise ValueError(f"a run of {size} bytes")
        size = aligned(size)
        place = bisect_left(self._free_by_size, (size, 0))
        if place == len(self._free_by_size):
            return None
        length, offset = self._free_by_size[place]
        self._forget_free(offset, length)
        if length > size:
            self._add_free(offset + size, length - size)
        self._runs[offset] = size
        self.used_bytes += size
        self.pages.used_up_to(offset + size)
        return offset

    def free(self, offset: int) -> None:
        """Raises KeyError if no run starts there."""
        size = self._runs.pop(offset)
        self.used_bytes -= size
        before = self._free_ending_at.get(offset)
        if before is not None:
            length = self._free_at[before]
            self._forget_free(before, length)
            offset, size = before, size + length
        after = self._free_at.get(offset + size)
        if after is not None:
            self._forget_free(offset + size, after)
            size += after
        self._add_free(offset, size)

    def view(self, offset: int, size: int) -> memoryview:
        """Writable. Its user sees to it that the run stays his."""
        return self._view[offset : offset + size]

    @property
    def largest_free(self) -> int:
        return self._free_by_size[-1][0] if self._free_by_size else 0

    @property
    def fragmentation(self) -> float:
        """Share of the free memory outside of the largest free run."""
        free = self.capacity_bytes - self.used_bytes
        return 1 - self.largest_free / free if free else 0.0

    def runs(self) -> dict[int, int]:
        """Size by offset of everything handed out."""
        return dict(self._runs)

    def check_integrity(self) -> None:
        """Raises StoreIntegrityError with everything that is wrong. Cost: the number of runs."""
        wrong: list[str] = []
        pieces = sorted(
            [(offset, size, "used") for offset, size in self._runs.items()]
            + [(offset, size, "free") for offset, size in self._free_at.items()]
        )
        position, last = 0, "used"
        for offset, size, kind in pieces:
            if offset != position:
                wrong.append(f"{offset - position} bytes at {position} are lost or handed out twice")
            if kind == last == "free":
                wrong.append(f"the free run at {offset} was not merged")
            position, last = offset + size, kind
        if position != self.capacity_bytes:
            wrong.append(f"the runs end at {position}, the arena at {self.capacity_bytes}")
        if self._free_by_size != sorted((size, offset) for offset, size in self._free_at.items()):
            wrong.append("the free list by size differs from the one by offset")
        if self._free_ending_at != {offset + size: offset for offset, size in self._free_at.items()}:
            wrong.append("the free list by end differs from the one by offset")
        if self.used_bytes != sum(self._runs.values()):
            wrong.append(f"{self.used_bytes} bytes are counted as used, the runs have {sum(self._runs.values())}")
        if wrong:
            raise StoreIntegrityError("host arena: " + "; ".join(wrong))

    def close(self) -> None:
        """Memory that somebody still looks at goes when the last view does."""
        if self.fd >= 0:
            os.close(self.fd)
            self.fd = -1
        with contextlib.suppress(BufferError):
            self._view.release()

    def _add_free(self, offset: int, size: int) -> None:
        insort(self._free_by_size, (size, offset))
        self._free_at[offset] = size
        self._free_ending_at[offset + size] = offset

    def _forget_free(self, offset: int, size: int) -> None:
        del self._free_by_size[bisect_left(self._free_by_size, (size, offset))]
        del self._free_at[offset]
        del self._free_ending_at[offset + size]
