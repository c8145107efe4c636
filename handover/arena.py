"""Payload in shared memory: one memfd per connection, made by the sender, mapped by both.

The sender seals the size, so the receiver cannot be killed by SIGBUS when the file shrinks. The sender is trusted not
to overwrite a region before it is acknowledged: the checksum is taken on the region itself, so a writer that breaks
this rule after the check goes unnoticed. Both ends are workers of one platform; the check is against bugs and bit
flips, not against attack.
"""

from __future__ import annotations

import fcntl
import mmap
import os
from collections import deque

from tandem.handover.frames import Frame, FrameError
from tandem.handover.link import Link

ALIGNMENT = 64
MAX_ARENA_BYTES = 1 << 30


class Ring:
    """Allocates aligned regions of [0, capacity) that are freed in the order of allocation."""

    def __init__(self, capacity: int) -> None:
        self.capacity = capacity
        self.allocated = 0
        """Regions ever allocated."""
        self.freed = 0
        self._live: deque[tuple[int, int]] = deque()

    def allocate(self, length: int) -> int | None:
        """Offset of a free region. Starts again at 0 whenever nothing is live, so light use stays in warm memory."""
        size = -(-length // ALIGNMENT) * ALIGNMENT
        if not 0 < size <= self.capacity:
            raise ValueError(f"{length} bytes do not fit in an arena of {self.capacity}")
        start = 0
        if self._live:
            tail, head = self._live[0][0], self._live[-1][1]
            if head > tail:
                start = head if head + size <= self.capacity else 0
                limit = self.capacity if start else tail
            else:
                start, limit = head, tail
            if start + size > limit:
                return None
        self._live.append((start, start + size))
        self.allocated += 1
        return start

    def cancel(self) -> None:
        """Undoes the last allocation."""
        self._live.pop()
        self.allocated -= 1

    def free_through(self, count: int) -> None:
        """The first `count` regions ever allocated are free. Raises FrameError when there were not so many."""
        if not self.freed <= count <= self.allocated:
            raise FrameError(f"acknowledges {count} frames; {self.freed} to {self.allocated} are possible")
        while self.freed < count:
            self._live.popleft()
            self.freed += 1


class ArenaSender:
    """The writing end. `fd` goes to the receiver with the Hello."""

    name = "arena"

    def __init__(self, size: int) -> None:
        fd = os.memfd_create("tandem-kv-arena", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
        try:
            os.ftruncate(fd, size)
            fcntl.fcntl(fd, fcntl.F_ADD_SEALS, fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SEAL)
            self._map = mmap.mmap(fd, size)
        except BaseException:
            os.close(fd)
            raise
        self.fd = fd
        self._view = memoryview(self._map)
        self._ring = Ring(size)
        self._offset = 0

    def reserve(self, length: int) -> memoryview | None:
        offset = self._ring.allocate(length)
        if offset is None:
            return None
        self._offset = offset
        return self._view[offset : offset + length]

    def cancel(self) -> None:
        self._ring.cancel()

    def send(self, link: Link, frame: Frame, payload: memoryview) -> None:
        link.send(frame._replace(offset=self._offset))

    def credit(self, consumed: int) -> None:
        self._ring.free_through(consumed)

    def handed_over(self) -> None:
        """The receiver has the descriptor; the mapping keeps the memory."""
        if self.fd >= 0:
            os.close(self.fd)
            self.fd = -1

    def close(self) -> None:
        self.handed_over()
        _unmap(self._map, self._view)


class ArenaReceiver:
    """The reading end. Takes ownership of `fd`. Raises FrameError when it is not what the sender announced, or could
    shrink."""

    name = "arena"
    acknowledges = True

    def __init__(self, fd: int, size: int) -> None:
        try:
            if not 0 < size <= MAX_ARENA_BYTES:
                raise FrameError(f"an arena of {size} bytes, the limit is {MAX_ARENA_BYTES}")
            seals = fcntl.fcntl(fd, fcntl.F_GET_SEALS)
            if not seals & fcntl.F_SEAL_SHRINK:
                raise FrameError("the arena is not sealed against shrinking")
            if os.fstat(fd).st_size != size:
                raise FrameError(f"the arena has {os.fstat(fd).st_size} bytes, {size} were announced")
            self._map = mmap.mmap(fd, size)
        except OSError as error:
            raise FrameError(f"the arena cannot be mapped: {error}") from error
        finally:
            os.close(fd)
        self._view = memoryview(self._map)

    def receive(self, link: Link, frame: Frame) -> memoryview:
        if frame.offset + frame.length > len(self._view):
            raise FrameError("Rows outside the arena")
        return self._view[frame.offset : frame.offset + frame.length]

    def close(self) -> None:
        _unmap(self._map, self._view)


def _unmap(mapping: mmap.mmap, view: memoryview) -> None:
    try:
        view.release()
        mapping.close()
    except BufferError:
        pass  # a callback kept a slice: the memory goes when the slice does
