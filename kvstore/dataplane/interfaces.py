"""What the data plane needs of the node it serves: `interfaces.HomeNode`, with places in the arena made visible."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager
from typing import Protocol

from tandem.kvstore.interfaces import Fetch, Located, ObjectInfo, ObjectKey, PutTicket, Refusal


class ServedArena(Protocol):
    """Host memory of the node."""

    @property
    def fd(self) -> int:
        """Descriptor of the shared memory; negative where the system has none."""

    @property
    def capacity_bytes(self) -> int: ...

    def view(self, offset: int, size: int) -> memoryview: ...


class ServedTicket(PutTicket, Protocol):
    """A put whose memory has a place in the arena."""

    @property
    def offset(self) -> int:
        """Place of `buffer` in the arena."""

    def commit_as(self, key: ObjectKey, info: ObjectInfo) -> bool:
        """`commit` as another object than the put was begun for. True also if that is there or is being put already.
        Raises ValueError for another size or owner than it was begun with."""


class ServedFetch(Fetch, Protocol):
    """A fetch whose objects have places in the arena."""

    def offset(self, index: int) -> int:
        """Place of object `index` in the arena."""


class ServedNode(Protocol):
    """`node.KvNode`."""

    @property
    def arena(self) -> ServedArena: ...

    def begin_put(self, key: ObjectKey, info: ObjectInfo) -> ServedTicket | Refusal: ...

    def locate(self, keys: Sequence[ObjectKey]) -> list[Located]: ...

    def locate_here(self, keys: Sequence[ObjectKey]) -> list[Located] | None:
        """Answers as `locate` does, if this node has all of them; None: others have to be asked. Never waits."""

    def fetch(self, located: Sequence[Located], overlap_s: float, lease_s: float | None) -> ServedFetch:
        """`lease_s` None: until `close`."""

    def quarantine(self, key: ObjectKey, reason: str) -> None: ...

    def view(self, key: ObjectKey) -> AbstractContextManager[memoryview | None]:
        """Leased read-only bytes of an object in host memory."""

    def read_range(self, key: ObjectKey, offset: int, out: memoryview) -> bool:
        """Copies bytes of an object into `out`, from whichever tier of this node has it. False: none has all."""
