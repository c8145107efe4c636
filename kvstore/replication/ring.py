"""Consistent hashing: which nodes should hold a key, so that a node that comes or goes moves only its own share.

After Karger et al., "Consistent Hashing and Random Trees" (STOC 1997). Pure.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterable

from blake3 import blake3

_RING_KEY = blake3(b"tandem kv ring v1").digest()


class Ring:
    """Immutable: make a new one when the nodes change. Equal node ids give equal rings in every process."""

    def __init__(self, node_ids: Iterable[str], virtual: int = 64) -> None:
        """`virtual`: points of a node on the circle. 64 keep the shares within about 40 % of the mean."""
        self.node_ids = tuple(sorted(set(node_ids)))
        points = sorted(
            (_hash(f"{node}#{number}".encode()), node) for node in self.node_ids for number in range(virtual)
        )
        self._places = [place for place, _ in points]
        self._nodes = [node for _, node in points]

    def owners(self, key: bytes, n: int) -> tuple[str, ...]:
        """The first `n` different nodes at or after the key's place on the circle: all of them if there are fewer."""
        wanted = min(n, len(self.node_ids))
        found: dict[str, None] = {}
        start = bisect_left(self._places, _hash(key))
        for step in range(len(self._nodes)):
            if len(found) >= wanted:
                break
            found.setdefault(self._nodes[(start + step) % len(self._nodes)])
        return tuple(found)


def _hash(data: bytes) -> int:
    return int.from_bytes(blake3(data, key=_RING_KEY).digest(8), "big")
