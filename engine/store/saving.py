"""Copies computed chunks from the engine's pool into the store."""

from __future__ import annotations

import logging
import time
from collections import OrderedDict
from collections.abc import Callable

from torch import Tensor

from tandem.engine.model.batch import KvPool, all_finite
from tandem.engine.schedule.budget import BlockId
from tandem.engine.store.cache import EngineStore
from tandem.kvstore.bundle import BundleWriter, ChunkSpec, bundle_size
from tandem.kvstore.interfaces import ObjectInfo, ObjectKey, PutTicket, Refusal

logger = logging.getLogger(__name__)


class Save:
    """One chunk. Its blocks are retained until `ended`."""

    def __init__(
        self,
        store: EngineStore,
        pool: KvPool,
        spec: ChunkSpec,
        *,
        slots: Tensor,
        blocks: list[BlockId],
        recompute_s: float,
        ended: Callable[[Save], None],
    ) -> None:
        """`slots` int64 [tokens of the chunk]. `ended` posts to the engine thread and is called once."""
        self.key = ObjectKey(spec.key)
        self.blocks = blocks
        self.outcome = "dropped"
        self.seconds = 0.0
        self._store = store
        self._pool = pool
        self._spec = spec
        self._slots = slots
        self._recompute_s = recompute_s
        self._ended = ended

    @property
    def is_stored(self) -> bool:
        return self.outcome in ("saved", Refusal.EXISTS)

    def run(self) -> None:
        """Copies the chunk into the store, on the saver's thread. Never raises: see `outcome`."""
        began = time.monotonic()
        try:
            self.outcome = self._save()
        except Exception:
            logger.exception("a chunk could not be saved to the KV store")
            self.outcome = "failed"
        self.seconds = time.monotonic() - began
        self._ended(self)

    def drop(self) -> None:
        self._ended(self)

    def _save(self) -> str:
        spec = self._spec
        info = ObjectInfo(
            size=bundle_size(spec),
            num_tokens=len(spec.tokens),
            owner=spec.owner,
            model=spec.model,
            recompute_s=self._recompute_s,
            start_position=spec.start_position,
        )
        ticket = self._store.home.begin_put(self.key, info)
        if isinstance(ticket, Refusal):
            return ticket.value
        try:
            self._fill(ticket)
        except BaseException:
            ticket.abort()
            raise
        return "saved" if ticket.commit() else "lapsed"

    def _fill(self, ticket: PutTicket) -> None:
        writer = BundleWriter(self._spec, ticket.buffer)
        for layer in range(self._pool.num_layers):
            rows = writer.layer(layer)
            self._pool.read_rows(layer, self._slots, rows)
            if not all_finite(rows, self._pool.storage.dtype):
                raise ValueError(f"layer {layer} holds numbers that are not finite")
        writer.finish()


class KnownKeys:
    """Keys that the store had a moment ago, so that it is not asked again for every request with the same prefix. It
    may have dropped them since, so they are forgotten after a while."""

    CAPACITY = 8192
    LIFETIME_S = 60.0

    def __init__(self) -> None:
        self._until: OrderedDict[ObjectKey, float] = OrderedDict()

    def add(self, key: ObjectKey, now: float) -> None:
        """Remembers `key` for `LIFETIME_S` from `now` on. Beyond `CAPACITY` the one added longest ago is forgotten."""
        self._until[key] = now + self.LIFETIME_S
        self._until.move_to_end(key)
        if len(self._until) > self.CAPACITY:
            self._until.popitem(last=False)

    def discard(self, key: ObjectKey) -> None:
        self._until.pop(key, None)

    def has(self, key: ObjectKey, now: float) -> bool:
        return self._until.get(key, now) > now
