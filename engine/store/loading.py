"""Copies KV from the store into the engine's pool, layer by layer, so that the first layers can be computed with while
the last ones are on their way (as in CacheGen and LMCache's layer-wise loading).

`Loading` runs on a loader thread; `Gate` lets a forward step wait for the layers that it is about to read.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Mapping

from torch import Tensor

from tandem.engine.model.batch import KvPool, all_finite
from tandem.engine.schedule.ranges import TokenRanges
from tandem.engine.schedule.sequence import Sequence
from tandem.engine.store.cache import EngineStore
from tandem.engine.store.lookup import LookUp
from tandem.kvstore.bundle import Bundle, ChunkSpec, parse
from tandem.kvstore.codecs import Fidelity
from tandem.kvstore.interfaces import Fetch, TierName

logger = logging.getLogger(__name__)

GATE_S = 0.1
"""The most that all waits of one step may take together: others are in the step, too, and get their tokens so much
later."""
POLL_S = 0.05
"""How soon a loader notices that nobody needs what it loads any more."""
NOTABLE_S = 0.001
"""A shorter wait is none."""
MARGIN = 1.5
"""Loading is expected to take this much longer than its measured pace says."""


def arrives_in_time(ready: int, num_layers: int, layer_s: float, step_s: float) -> bool:
    """Whether a step of `step_s` seconds that begins now, with `ready` of `num_layers` layers there and one more every
    `layer_s`, will find each layer in place when it comes to it."""
    compute_s = step_s / num_layers
    return all((layer + 1 - ready) * layer_s * MARGIN <= layer * compute_s for layer in (ready, num_layers - 1))


class Loading:
    """The objects of one look-up on their way into the blocks of one sequence. Tokens between those that were there and
    the first object are not loaded.

    It loads the leading objects that can be had: one that is missing, late or wrong ends the run there. Rows are
    written under a lock that `close` takes, so blocks never go back while bytes arrive.
    """

    def __init__(
        self,
        store: EngineStore,
        pool: KvPool,
        lookup: LookUp,
        *,
        slots: Tensor,
        start: int,
        spec_of: Callable[[int], ChunkSpec],
        near_allowed: bool,
        limit_s: float,
        step_s: float,
        joinable: Callable[[Loading], None],
        ended: Callable[[Loading], None],
    ) -> None:
        """`slots` int64 [known tokens]; rows below `start` are there already and may be shared: they are not written.
        `spec_of(i)` says what chunk i has to be; with `near_allowed` its rows need not be exact. `limit_s`: from now
        until loading has to be complete. `step_s`: length of the step that computes the rest; 0: do not offer to join
        early. `joinable` and `ended` post to the engine thread; `ended` is called once, `joinable` at most once and
        before it."""
        self._store = store
        self._pool = pool
        self._slots = slots
        self._spec_of = spec_of
        self._near_allowed = near_allowed
        self._step_s = step_s
        self._joinable = joinable
        self._ended = ended
        self.located = lookup.located
        self.first_chunk = lookup.first_chunk
        self.start = start
        self.before = TokenRanges.up_to(start)
        """Tokens that were there."""
        self.planned = self.before.union(lookup.stored)
        """Tokens that are there if all comes."""
        self._stored = lookup.stored
        self._fetch: Fetch | None = lookup.take_fetch() if lookup.fetch is not None else None
        self._fetch_began = lookup.fetch_began if self._fetch is not None else 0.0
        self._began = time.monotonic()
        self._deadline = self._began + limit_s
        self._skipped = max(start // store.chunk_tokens - lookup.first_chunk, 0)
        """Leading objects that are on the device by now."""
        self._objects = len(self.located)
        """Length of the run that can be had."""
        self._bundles: list[Bundle | None] = []
        self._near: list[int] = []
        """Objects whose rows are not exact."""
        self._whole = False
        """All layers of the run are in host memory."""
        self._blocked = False
        """It waited for the fetch: that took as long as it seems."""
        self._first_layer_at = 0.0
        self._offered = False
        self.outcome = "ok"
        self.bad: list[int] = []
        """Objects whose bytes were wrong."""
        self.seconds = 0.0
        """Time from its turn on a loader thread until the last layer."""
        self._writing = threading.Lock()
        self._open = True
        self._progress = threading.Condition()
        self._layers = 0
        """Layers of the whole run that are in the pool."""
        self._cut = False
        self._over = False

    # Engine thread

    @property
    def there(self) -> TokenRanges:
        """Once it has ended: tokens that are in the pool in all layers."""
        end = (self.first_chunk + self._objects) * self._store.chunk_tokens
        return self.before.union(self._stored.within(0, end))

    @property
    def inexact_from(self) -> int | None:
        """The first token of the run that can be had whose rows are not exact; known with the first layer."""
        near = [index for index in self._near if index < self._objects]
        return self._rows(near[0])[0] if near else None

    def near_tokens(self, below: int) -> int:
        """Once it has ended: tokens before `below` that it brought and that are not exact."""
        rows = [self._rows(index) for index in self._near if index < self._objects]
        return sum(max(min(end, below) - first, 0) for first, end in rows)

    def tokens_by_tier(self, below: int | None = None) -> dict[str, int]:
        """Once it has ended: what it brought; with `below`, of the tokens before that one."""
        tokens: dict[str, int] = {}
        for index in range(self._skipped, self._objects):
            first, end = self._rows(index)
            end = end if below is None else min(end, below)
            if first < end:
                tier: TierName = self.located[index].tier
                tokens[tier] = tokens.get(tier, 0) + end - first
        return tokens

    def wait_layer(self, layer: int, timeout_s: float) -> bool:
        """Waits until `layer` of everything that was to be loaded is in the pool. False: it is too late, or will not
        come."""
        with self._progress:
            if self._layers <= layer:
                self._progress.wait_for(lambda: self._layers > layer or self._cut or self._over, timeout_s)
            return self._layers > layer and not self._cut

    def close(self) -> None:
        """Nothing is written any more from here on. Waits for one layer of one object at most."""
        with self._writing:
            self._open = False

    # Loader thread

    def run(self) -> None:
        """Copies all layers, on a loader thread. Never raises: what goes wrong is the outcome, and fewer tokens are
        loaded."""
        self._began = time.monotonic()
        try:
            self._copy()
        except Exception:
            logger.exception("loading from the KV store failed")
            self._shorten(0, "internal")
        self._release()
        if self.outcome == "ok":
            self._learn()
        else:
            self.seconds = time.monotonic() - self._began
        with self._progress:
            self._over = True
            self._progress.notify_all()
        self._ended(self)

    def drop(self) -> None:
        self._release()

    def _release(self) -> None:
        self._bundles.clear()
        if self._fetch is not None:
            self._fetch.close()

    def _copy(self) -> None:
        if not self._open:
            self._shorten(0, "cancelled")
            return
        if self._fetch is None:
            self._fetch_began = self._began
            self._fetch = self._store.home.fetch(self.located, self._step_s)
        num_layers = self._pool.num_layers
        for layer in range(num_layers):
            self._await(self._fetch, layer + 1)
            if layer == 0:
                self._open_bundles(self._fetch)
            for index in range(self._skipped, self._objects):
                if index >= self._objects or not self._copy_layer(layer, index):
                    break
            if self._objects <= self._skipped:
                return
            self.seconds = time.monotonic() - self._began
            with self._progress:
                self._layers = layer + 1
                self._progress.notify_all()
            self._offer(layer + 1, num_layers)

    def _await(self, fetch: Fetch, num_layers: int) -> None:
        """Until the first `num_layers` layers of the run are in host memory, a shorter run where that fails."""
        while not self._whole:
            began = time.monotonic()
            patience = min(self._deadline - began, POLL_S)
            there = patience > 0 and fetch.wait(num_layers, patience)
            waited = time.monotonic() - began
            self._blocked = self._blocked or waited > NOTABLE_S
            if there:
                return
            late = self._deadline - began <= POLL_S
            if not self._open:
                self._shorten(0, "cancelled")
            elif late or waited < patience / 2:  # an answer before its time: an object cannot be had
                self._shorten(fetch.intact(), "slow" if late else "missing")
            else:
                continue
            self._whole = True

    def _open_bundles(self, fetch: Fetch) -> None:
        self._bundles = [None] * self._skipped
        for index in range(self._skipped, self._objects):
            bundle = parse(fetch.buffer(index))
            if bundle is None:
                self._wrong(index, "corrupt", "it is no bundle")
                return
            if difference := bundle.matches(self._spec_of(self.first_chunk + index)):
                self._wrong(index, "mismatch", difference)
                return
            if bundle.header.fidelity is not Fidelity.EXACT:
                if not self._near_allowed:
                    self._shorten(index, "fidelity")
                    return
                self._near.append(index)
            self._bundles.append(bundle)

    def _copy_layer(self, layer: int, index: int) -> bool:
        bundle = self._bundles[index]
        rows = bundle.layer(layer) if bundle is not None else None
        if rows is None:
            self._wrong(index, "corrupt", f"the checksum of layer {layer} is wrong")
            return False
        if not all_finite(rows, self._pool.storage.dtype):
            self._wrong(index, "corrupt", f"layer {layer} holds numbers that are not finite")
            return False
        first, end = self._rows(index)
        offset = first - (self.first_chunk + index) * self._store.chunk_tokens
        with self._writing:
            if self._open:
                self._pool.write_rows(layer, self._slots[first:end], rows, offset)
                return True
        self._shorten(0, "cancelled")
        return False

    def _rows(self, index: int) -> tuple[int, int]:
        """Tokens [first, end) that object `index` fills."""
        chunk_tokens = self._store.chunk_tokens
        first = (self.first_chunk + index) * chunk_tokens
        return max(first, self.start), max(min(first + chunk_tokens, self._stored.end), self.start)

    def _wrong(self, index: int, outcome: str, why: str) -> None:
        key = self.located[index].key
        logger.warning("object %s of the KV store (%s) is not used: %s", key.hex(), self.located[index].link, why)
        self.bad.append(index)
        self._shorten(index, outcome)
        self._store.home.quarantine(key, f"{outcome}: {why}")

    def _shorten(self, objects: int, outcome: str) -> None:
        with self._progress:
            if objects < self._objects:
                self._objects = max(objects, 0)
                self._cut = True
                self.outcome = outcome
                self._progress.notify_all()

    def _offer(self, ready: int, num_layers: int) -> None:
        now = time.monotonic()
        if ready == 1:
            self._first_layer_at = now
        elif self._step_s > 0 and ready < num_layers and not self._cut and not self._offered:
            layer_s = (now - self._first_layer_at) / (ready - 1)
            if arrives_in_time(ready, num_layers, layer_s, self._step_s):
                self._offered = True
                self._joinable(self)

    def _learn(self) -> None:
        """Tells the links what loading took, where that can be told: if all came over one link, and loading either
        waited for it or had nothing to wait for."""
        links = {item.link for item in self.located}
        if len(links) == 1 and (self._blocked or self.located[0].tier is TierName.HOST):
            size = sum(item.size for item in self.located)
            seconds = time.monotonic() - (self._fetch_began if self._blocked else self._began)
            self._store.links.observe(links.pop(), size, len(self.located), seconds)


class Gate:
    """The `before_attention` callback of one forward step: waits for the layers of gated sequences."""

    def __init__(self, loadings: Mapping[Sequence, Loading | None]) -> None:
        """`loadings` of the gated sequences that the step computes."""
        self._loadings = loadings
        self.broken: list[Sequence] = []
        """Whose KV did not come in time: what the step computes for them means nothing."""
        self.passing: list[Sequence] = list(loadings)
        self.waited_s = 0.0

    def __call__(self, layer: int) -> None:
        for sequence in tuple(self.passing):
            loading, began = self._loadings[sequence], time.monotonic()
            if loading is None or not loading.wait_layer(layer, max(GATE_S - self.waited_s, 0.0)):
                self.passing.remove(sequence)
                self.broken.append(sequence)
            self.waited_s += time.monotonic() - began
