"""The KV store as an engine uses it: built by a worker, handed to `Engine`, which does the rest through `flow.py`."""

from __future__ import annotations

import threading

from tandem.common.errors import ConfigError
from tandem.engine.store.stats import StoreCounters, StoreStats
from tandem.kvstore.cost import LinkCosts
from tandem.kvstore.interfaces import HomeNode

MAX_PREFETCHED = 32
"""Requests whose KV is brought to host memory while they wait for blocks. Those beyond ask for it when they have them,
so that a long queue does not fill the node with leases."""


class EngineStore:
    """The KV store as one engine uses it. The worker that made it closes `home`, after the engine has stopped."""

    def __init__(
        self,
        home: HomeNode,
        *,
        chunk_tokens: int = 256,
        worker_id: str = "",
        model: str = "",
        save_queue: int = 64,
        loaders: int = 2,
        overlap: bool = True,
        near_allowed: bool = False,
        links: LinkCosts | None = None,
    ) -> None:
        """`chunk_tokens`: tokens per object, a multiple of the engine's block_size; all workers of a model agree on it.
        `worker_id` is written into what is saved; `model` is the served name. `save_queue`: chunks that wait to be
        saved, more are dropped. `loaders`: requests that are loaded at one time, a thread each. `overlap`: compute the
        first layers while the last ones arrive. `near_allowed`: also use KV that went through a codec that is not
        exact, which may change tokens. `links`: what is known of the time that fetches take; learned if None."""
        for name, value in (("chunk_tokens", chunk_tokens), ("save_queue", save_queue), ("loaders", loaders)):
            if value < 1:
                raise ConfigError(f"{name} {value}: must be at least 1")
        self.home = home
        self.chunk_tokens = chunk_tokens
        self.worker_id = worker_id
        self.model = model
        self.save_queue = save_queue
        self.loaders = loaders
        self.overlap = overlap
        self.near_allowed = near_allowed
        self.links = links if links is not None else LinkCosts()
        self.counters = StoreCounters()
        self.prefetches = threading.BoundedSemaphore(MAX_PREFETCHED)

    def check(self, block_size: int) -> None:
        """Raises ConfigError if an engine with this `block_size` cannot use it."""
        if self.chunk_tokens % block_size:
            raise ConfigError(
                f"chunk_tokens {self.chunk_tokens}: must be a multiple of block_size {block_size}; "
                "change one of the two (every worker that shares the store needs the same chunk_tokens)"
            )

    def stats(self) -> StoreStats:
        return self.counters.snapshot()
