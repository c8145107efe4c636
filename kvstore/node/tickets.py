"""The two-phase put.

open ── commit ──> done       the object can be found
  │ └── abort ───> done       the memory is free
  └─ lapses (PUT_LEASE_S) ──> zombie: the key is free for others, the memory is not: the writer may still write.
                              It is used again after abort or commit (which fails), or after ZOMBIE_GRACE_S.

Memory that is held for a put to come is a ticket for a key that nobody asks for; `commit_as` says what it became.
"""

from __future__ import annotations

import contextlib
import enum
from typing import Protocol

from tandem.kvstore.interfaces import ObjectInfo, ObjectKey, Refusal
from tandem.kvstore.node.host import HostObject


class TicketState(enum.Enum):
    OPEN = enum.auto()
    ZOMBIE = enum.auto()
    DONE = enum.auto()


class TicketOffice(Protocol):
    """The node, as a ticket sees it."""

    def commit_put(self, ticket: Ticket) -> bool: ...

    def abort_put(self, ticket: Ticket) -> None: ...

    def rename_put(self, ticket: Ticket, key: ObjectKey, info: ObjectInfo) -> Refusal | None: ...


class Ticket:
    """`interfaces.PutTicket`. State and deadline belong to the node's lock."""

    def __init__(self, office: TicketOffice, item: HostObject, buffer: memoryview, deadline: float) -> None:
        self._office = office
        self._buffer = buffer
        self.item = item
        self.state = TicketState.OPEN
        self.deadline = deadline
        """When it lapses; of a zombie: when its memory is used again."""

    @property
    def key(self) -> ObjectKey:
        return self.item.key

    @property
    def buffer(self) -> memoryview:
        """Writable. Raises ValueError when used after commit or abort."""
        return self._buffer

    @property
    def offset(self) -> int:
        """Where `buffer` lies in the arena, for a writer in another process."""
        return self.item.offset

    @property
    def size(self) -> int:
        return self.item.info.size

    def commit(self) -> bool:
        self._close_buffer()
        return self._office.commit_put(self)

    def commit_as(self, key: ObjectKey, info: ObjectInfo) -> bool:
        """`commit` as another object than the put was begun for. True also if that is there or is being put already.
        Raises ValueError for another size or owner than it was begun with."""
        if (info.size, info.owner) != (self.item.info.size, self.item.info.owner):
            raise ValueError(f"memory for {self.size} bytes of {self.item.info.owner!r} holds something else")
        refusal = self._office.rename_put(self, key, info)
        if refusal is None:
            return self.commit()
        self.abort()
        return refusal is Refusal.EXISTS

    def abort(self) -> None:
        self._close_buffer()
        self._office.abort_put(self)

    def _close_buffer(self) -> None:
        """A write after the end would go into an object that others read: here it fails instead, unless the writer
        made arrays of the buffer, which keep it open."""
        with contextlib.suppress(BufferError):
            self._buffer.release()
