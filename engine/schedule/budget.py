"""The device memory beside the weights, in blocks: one pool for KV and whoever else needs some. Pure, engine thread.

KV takes blocks one by one as sequences grow, and keeps what it can do without as a cache. Others (adapters) take whole
blocks and give them back; for them the cache gives way, but never a sequence, and KV keeps enough for its longest one.
"""

from __future__ import annotations

import heapq
from collections.abc import Callable, Collection
from typing import NewType

BlockId = NewType("BlockId", int)


class BlockBudget:
    """Free blocks, and who has borrowed some."""

    def __init__(
        self, num_blocks: int, least_for_kv: int, evictable: Callable[[], int], evict: Callable[[], BlockId]
    ) -> None:
        """Block 0 belongs to nobody. `least_for_kv`: blocks that others leave to KV. `evictable` says how many cached
        blocks nobody owns, `evict` takes one of them out of the cache."""
        self.num_blocks = num_blocks
        self._least_for_kv = least_for_kv
        self._evictable = evictable
        self._evict = evict
        self._free = [BlockId(block) for block in range(1, num_blocks)]
        """A heap: the lowest id first, which makes runs of neighbours likely at no cost."""
        self._lent: set[BlockId] = set()
        """Blocks that others than KV have."""

    @property
    def for_kv(self) -> int:
        """Blocks that KV may have: all that others have not."""
        return self.num_blocks - 1 - len(self._lent)

    @property
    def available(self) -> int:
        """Free, or cached and evictable."""
        return len(self._free) + self._evictable()

    @property
    def free(self) -> list[BlockId]:
        return list(self._free)

    @property
    def lent(self) -> frozenset[BlockId]:
        return frozenset(self._lent)

    def take(self) -> BlockId:
        """A block for KV. There has to be one that is available."""
        return heapq.heappop(self._free) if self._free else self._evict()

    def put(self, block: BlockId) -> None:
        """Takes a block back from KV."""
        heapq.heappush(self._free, block)

    def lend(self, count: int) -> list[BlockId] | None:
        """Blocks for somebody else than KV, whole: in all layers. None, with nothing changed, where so many are not
        available, or KV would be left with too few."""
        if count > self.available or self.for_kv - count < self._least_for_kv:
            return None
        blocks = [self.take() for _ in range(count)]
        self._lent.update(blocks)
        return blocks

    def give_back(self, blocks: Collection[BlockId]) -> None:
        """Ends what `lend` began, for all or some of its blocks. Raises ValueError for blocks that are not lent."""
        if not self._lent.issuperset(blocks):
            raise ValueError(f"blocks {sorted(set(blocks) - self._lent)} are not lent")
        self._lent.difference_update(blocks)
        for block in set(blocks):
            self.put(block)
