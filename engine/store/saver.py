"""Which chunks are saved to the store: those that have become complete, are exact, and are not known to be there."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable

import numpy as np
import torch

from tandem.engine.model.batch import KvPool
from tandem.engine.schedule.block_manager import BlockManager
from tandem.engine.schedule.sequence import Sequence
from tandem.engine.status import StepMeter
from tandem.engine.store.cache import EngineStore
from tandem.engine.store.chunks import Chunks
from tandem.engine.store.saving import KnownKeys, Save
from tandem.engine.store.state import StoreState
from tandem.engine.store.threads import Workers

logger = logging.getLogger(__name__)

RETAINED_SHARE = 4
"""A quarter of the pool, at most, is held for saving."""


class Saver:
    """Engine thread only, but for `wait_idle`."""

    def __init__(
        self,
        store: EngineStore,
        chunks: Chunks,
        known: KnownKeys,
        pool: KvPool,
        blocks: BlockManager,
        meter: StepMeter,
        saved: Callable[[Save], None],
    ) -> None:
        """`saved` has the engine thread call `ended`."""
        self._store = store
        self._chunks = chunks
        self._known = known
        self._pool = pool
        self._blocks = blocks
        self._meter = meter
        self._saved = saved
        self._worker = Workers("kv-save", 1, store.save_queue)

    def offer_new(self, sequence: Sequence, state: StoreState) -> None:
        """Saves the chunks of `sequence` that have become complete, and are exact."""
        complete = sequence.exact_tokens // self._store.chunk_tokens
        try:
            for index in range(state.offered, complete):
                self._offer(sequence, state, index)
        except Exception:
            logger.exception("chunks of %s could not be offered to the KV store", sequence.key)
            self._store.counters.save("failed")
        state.offered = max(state.offered, complete)

    def ended(self, save: Save) -> None:
        """Takes the blocks back that were retained for `save`, whatever became of it."""
        self._blocks.give_back(save.blocks)
        self._store.counters.save(save.outcome, save.seconds)
        if not save.is_stored:
            self._known.discard(save.key)

    def wait_idle(self, timeout_s: float) -> bool:
        """Waits until all that was offered is saved or refused. From any thread. False: time is up."""
        return self._worker.wait_idle(timeout_s)

    def stop(self, timeout_s: float) -> bool:
        """Drops what is queued. False: a save still runs after `timeout_s`."""
        return self._worker.stop(timeout_s)

    def _offer(self, sequence: Sequence, state: StoreState, index: int) -> None:
        key, now = self._chunks.key(sequence, state, index), time.monotonic()
        if self._known.has(key, now):
            return
        block_size, chunk_tokens = self._blocks.block_size, self._store.chunk_tokens
        count = chunk_tokens // block_size
        if (self._blocks.num_retained + count) * RETAINED_SHARE > self._blocks.usable_blocks:
            self._store.counters.save("dropped")
            return
        spec = self._chunks.spec(sequence, state, index)
        blocks = self._blocks.retain(sequence.key, index * count, count)
        slots = (np.array(blocks, dtype=np.int64)[:, None] * block_size + np.arange(block_size, dtype=np.int64)).ravel()
        rate = self._meter.prefill_tokens_per_s
        save = Save(
            self._store,
            self._pool,
            spec,
            slots=torch.from_numpy(slots).to(self._pool.storage.device),
            blocks=blocks,
            recompute_s=chunk_tokens / rate if rate > 0 else 0.0,
            ended=self._saved,
        )
        self._known.add(key, now)  # nobody else need offer it while it is being saved
        if not self._worker.put(save):
            self.ended(save)
