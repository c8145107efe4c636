"""Payload in shared memory: one arena per connection, made by the sender, mapped by both.

The sender is trusted not to overwrite a region before it is acknowledged: the checksum is taken on the region itself,
so a writer that breaks this rule after the check goes unnoticed. Both ends are workers of one platform; the check is
against bugs and bit flips, not against attack.
"""

from __future__ import annotations

from collections import deque

from tandem.handover.frames import Kind, Rows
from tandem.wire.header import Header, ProtocolError
from tandem.wire.link import Link
from tandem.wire.shared_memory import SharedMemory, share

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
        """The first `count` regions ever allocated are free. Raises ProtocolError when there were not so many."""
        if not self.freed <= count <= self.allocated:
            raise ProtocolError(f"acknowledges {count} frames; {self.freed} to {self.allocated} are possible")
        while self.freed < count:
            self._live.popleft()
            self.freed += 1


class ArenaSender:
    """The writing end. `memory` goes to the receiver with the Hello."""

    def __init__(self, size: int) -> None:
        self.memory: SharedMemory | None
        self.memory, self._view = share("tandem-kv-arena", size)
        self._ring = Ring(size)
        self.offset = 0

    def reserve(self, length: int) -> memoryview | None:
        """Reserves the next region; None while the receiver has not freed enough."""
        offset = self._ring.allocate(length)
        if offset is None:
            return None
        self.offset = offset
        return self._view[offset : offset + length]

    def cancel(self) -> None:
        self._ring.cancel()

    def send(self, link: Link, stream: int, rows: Rows, payload: memoryview) -> None:
        link.send(Kind.ROWS, stream, rows)

    def credit(self, consumed: int) -> None:
        self._ring.free_through(consumed)

    def handed_over(self) -> None:
        """The receiver has the descriptor; the mapping keeps the memory."""
        if self.memory is not None:
            self.memory.close()
            self.memory = None

    def close(self) -> None:
        """The mapping goes with the last slice of it: a callback may have kept one."""
        self.handed_over()
        del self._view


class ArenaReceiver:
    """The reading end. Takes ownership of `memory`. Raises ProtocolError when it is not what the sender announced, or
    could shrink."""

    acknowledges = True

    def __init__(self, memory: SharedMemory) -> None:
        if memory.size > MAX_ARENA_BYTES:
            memory.close()
            raise ProtocolError(f"an arena of {memory.size} bytes, the limit is {MAX_ARENA_BYTES}")
        self._view = memory.map()

    def receive(self, link: Link, header: Header, rows: Rows) -> memoryview:
        if header.payload_length or rows.offset + rows.length > len(self._view):
            raise ProtocolError("Rows outside the arena")
        return self._view[rows.offset : rows.offset + rows.length]

    def close(self) -> None:
        """The mapping goes with the last slice of it: a callback may have kept one."""
        del self._view
