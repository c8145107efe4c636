"""Who owns which KV block, and which blocks answer a prefix look-up.

Bookkeeping only (no tensors): the scheduler calls it on the engine thread. A block is in exactly one of three states:

- **owned**: in the table of one request or more, or retained by a reader (`refs > 0`), with or without a hash;
- **cached**: owned by nobody, but its hash answers look-ups; evicted in least-recently-used order, what only the last
  band has used before all else;
- **free**, or lent to somebody else than KV (`budget.py`).

A block gets its hash (`publish`) only once it is full and all its layers are computed, so a look-up can never meet a
block that is still being written, and a partially filled block is never shared. Block 0 belongs to nobody: padding
points at it.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Sequence
from itertools import combinations

from tandem.engine.request import RequestKey
from tandem.engine.schedule.budget import BlockBudget, BlockId
from tandem.engine.schedule.cache_events import CacheLog
from tandem.kvstore.identity import BlockHash


class IntegrityError(Exception):
    """The books do not balance: a defect in the engine, never the user's doing."""


class BlockManager:
    """The books of the KV pool: tables of requests, and the prefix cache. Block ids count from 1; block 0 is for rows
    that nobody reads."""

    def __init__(
        self, num_blocks: int, block_size: int, enable_prefix_caching: bool = True, longest_request: int = 0
    ) -> None:
        """`longest_request`: tokens of which KV can hold one request, whatever others take of the budget."""
        self.num_blocks = num_blocks
        self.block_size = block_size
        self.caching = enable_prefix_caching
        self._tables: dict[RequestKey, list[BlockId]] = {}
        self._refs = [0] * num_blocks
        self._hash_of: list[BlockHash | None] = [None] * num_blocks
        self._by_hash: dict[BlockHash, BlockId] = {}
        self._idle: dict[BlockId, None] = {}
        """Cached and owned by nobody; a dict keeps the order in which they became so."""
        self._idle_of_last_band: dict[BlockId, None] = {}
        """Those of them that no request of an earlier band has used: they go first."""
        self._of_last_band = [False] * num_blocks
        self._retained: Counter[BlockId] = Counter()
        """References of readers that are no request: the KV store's saver."""
        self.num_retained = 0
        """Their sum."""
        self.budget = BlockBudget(num_blocks, self.blocks_for(longest_request), self._num_idle, self._evict)
        """Where blocks come from."""
        self.cache_log = CacheLog()
        """Every hash that begins or ceases to answer look-ups."""

    @property
    def usable_blocks(self) -> int:
        """Blocks that requests may have."""
        return self.budget.for_kv

    @property
    def available_blocks(self) -> int:
        """Free, or cached and evictable."""
        return self.budget.available

    @property
    def num_owners(self) -> int:
        return len(self._tables)

    def blocks_for(self, num_tokens: int) -> int:
        return -(-num_tokens // self.block_size)

    def table(self, key: RequestKey) -> list[BlockId]:
        """The blocks of a request in token order: a live view, not to be changed."""
        return self._tables[key]

    def holds(self, key: RequestKey) -> bool:
        return key in self._tables

    def cached_prefix(self, chain: Sequence[BlockHash], num_tokens: int) -> int:
        """How many leading blocks a request of `num_tokens` could take from the cache: at least one of its tokens
        is left to compute, because its logits are needed."""
        if not self.caching:
            return 0
        hits = 0
        for block_hash in chain[: (num_tokens - 1) // self.block_size]:
            if block_hash not in self._by_hash:
                break
            hits += 1
        return hits

    def allocate(
        self,
        key: RequestKey,
        num_tokens: int,
        chain: Sequence[BlockHash],
        reserve: int = 0,
        last_band: bool = False,
    ) -> int | None:
        """Gives `key`, a request of the last band or not, the blocks for `num_tokens`, the longest cached prefix of
        `chain` among them.

        Returns the number of tokens that are cached, or None, with nothing changed, if fewer than `reserve` blocks
        would be left available. Raises ValueError if the request has a table already.
        """
        if key in self._tables:
            raise ValueError(f"{key} has blocks already")
        if self.spare_blocks(num_tokens, chain) < reserve:
            return None
        hits = self._hits(num_tokens, chain)
        fresh = self.blocks_for(num_tokens) - len(hits)
        for block in hits:
            if self._refs[block] == 0:
                del self._idle_blocks(block)[block]
            self._refs[block] += 1
            self._of_last_band[block] = self._of_last_band[block] and last_band
        self._tables[key] = hits + [self._take(last_band) for _ in range(fresh)]
        return len(hits) * self.block_size

    def spare_blocks(self, num_tokens: int, chain: Sequence[BlockHash], without: Collection[RequestKey] = ()) -> int:
        """How many blocks would be left available by `allocate`, if the requests `without` gave theirs back before.
        Negative: so many are missing."""
        hits = self._hits(num_tokens, chain)
        given_back = Counter(block for key in without for block in self._tables[key])
        freed = {block for block, count in given_back.items() if self._refs[block] == count}
        taken = self.blocks_for(num_tokens) - len(hits)
        taken += sum(1 for block in hits if self._refs[block] == 0 or block in freed)
        return self.available_blocks + len(freed) - taken

    def extend(self, key: RequestKey, num_tokens: int, last_band: bool = False) -> bool:
        """Grows the table of `key` to hold `num_tokens`; False, with nothing changed, if there are too few blocks."""
        table = self._tables[key]
        missing = self.blocks_for(num_tokens) - len(table)
        if missing > self.available_blocks:
            return False
        for _ in range(missing):
            table.append(self._take(last_band))
        return True

    def publish(self, key: RequestKey, index: int, block_hash: BlockHash) -> None:
        """Block `index` of `key` is full and computed in all layers. An equal block that came first keeps the hash."""
        block = self._tables[key][index]
        if self.caching and block_hash not in self._by_hash and self._hash_of[block] is None:
            self._by_hash[block_hash] = block
            self._hash_of[block] = block_hash
            self.cache_log.stored(block_hash)

    def free(self, key: RequestKey) -> None:
        """Takes the blocks back; full published ones stay cached. Raises KeyError if `key` has none."""
        for block in reversed(self._tables.pop(key)):
            self._drop_reference(block)

    def retain(self, key: RequestKey, first: int, count: int) -> list[BlockId]:
        """Keeps `count` blocks of `key` from index `first` on as they are, even after `free(key)`, until they are given
        back. Raises ValueError if `key` has fewer."""
        blocks = self._tables[key][first : first + count]
        if len(blocks) != count:
            raise ValueError(f"{key} has {len(self._tables[key])} blocks, not {first + count}")
        for block in blocks:
            self._refs[block] += 1
            self._retained[block] += 1
        self.num_retained += count
        return blocks

    def give_back(self, blocks: Sequence[BlockId]) -> None:
        """Ends what `retain` began. Raises ValueError for blocks that are not retained."""
        for block in reversed(blocks):
            if not self._retained[block]:
                raise ValueError(f"block {block} is not retained")
            self._retained[block] -= 1
            if not self._retained[block]:
                del self._retained[block]
            self.num_retained -= 1
            self._drop_reference(block)

    def _hits(self, num_tokens: int, chain: Sequence[BlockHash]) -> list[BlockId]:
        return [self._by_hash[block_hash] for block_hash in chain[: self.cached_prefix(chain, num_tokens)]]

    def _drop_reference(self, block: BlockId) -> None:
        self._refs[block] -= 1
        if self._refs[block] == 0:
            if self._hash_of[block] is None:
                self.budget.put(block)
            else:
                self._idle_blocks(block)[block] = None

    def _idle_blocks(self, block: BlockId) -> dict[BlockId, None]:
        """Where `block` is while nobody owns it."""
        return self._idle_of_last_band if self._of_last_band[block] else self._idle

    def _take(self, last_band: bool) -> BlockId:
        block = self.budget.take()
        self._of_last_band[block] = last_band
        self._refs[block] = 1
        return block

    def _num_idle(self) -> int:
        return len(self._idle) + len(self._idle_of_last_band)

    def _evict(self) -> BlockId:
        """Takes the block out of the cache that can best be done without."""
        idle = self._idle_of_last_band or self._idle
        block = next(iter(idle))
        del idle[block]
        block_hash = self._hash_of[block]
        if block_hash is None:
            raise IntegrityError(f"block {block} is idle but has no hash")
        del self._by_hash[block_hash]
        self._hash_of[block] = None
        self.cache_log.removed(block_hash)
        return block

    def check_integrity(self) -> None:
        """Raises IntegrityError with everything that is wrong. Cost: the size of the pool."""
        wrong: list[str] = []
        refs = [0] * self.num_blocks
        for key, table in self._tables.items():
            if len(set(table)) != len(table):
                wrong.append(f"{key} holds a block twice: {table}")
            for block in table:
                refs[block] += 1
        for block in map(BlockId, range(self.num_blocks)):
            if refs[block] > 1 and self._hash_of[block] is None:
                wrong.append(f"block {block} is shared but was never published")
            refs[block] += self._retained.get(block, 0)
            if refs[block] != self._refs[block]:
                wrong.append(f"block {block} has {refs[block]} owners and readers and counts {self._refs[block]}")
        if self.num_retained != sum(self._retained.values()) or any(n <= 0 for n in self._retained.values()):
            wrong.append("the retained blocks are counted wrongly")
        free, lent = set(self.budget.free), self.budget.lent
        idle = self._idle.keys() | self._idle_of_last_band.keys()
        if len(free) != len(self.budget.free):
            wrong.append("a block is free twice")
        owned = {block for block in map(BlockId, range(self.num_blocks)) if refs[block]}
        states = {"free": free, "cached": set(idle), "owned": owned, "lent": set(lent)}
        for (one, left), (other, right) in combinations(states.items(), 2):
            if left & right:
                wrong.append(f"blocks {sorted(left & right)} are {one} and {other}")
        if lost := set(range(1, self.num_blocks)).difference(*states.values()):
            wrong.append(f"blocks {sorted(lost)} are lost")
        if any(self._of_last_band[block] for block in self._idle) or not all(
            self._of_last_band[block] for block in self._idle_of_last_band
        ):
            wrong.append("a cached block is among those of another band")
        if 0 in free | idle | owned | lent:
            wrong.append("block 0 is handed out")
        hashed = {block: block_hash for block, block_hash in enumerate(self._hash_of) if block_hash is not None}
        if {block_hash: block for block, block_hash in hashed.items()} != self._by_hash or len(hashed) != len(
            self._by_hash
        ):
            wrong.append("the hash index differs from the blocks' hashes")
        if set(self.cache_log.snapshot()[1]) != self._by_hash.keys():
            wrong.append("routers are told of another cache")
        if set(hashed) & free or idle - set(hashed):
            wrong.append("a free block has a hash or an idle block has none")
        if wrong:
            raise IntegrityError("; ".join(wrong))
