"""The KV store's part of the engine thread: which requests ask the store, load from it, and what is saved to it.

    accept ─> LOOKUP ──answer, or too late──> WAITING ──blocks──> LOADING ──all layers──> RUNNING
                                                    └─nothing to load──> RUNNING   └─first layers (gated)─┘

Nothing here blocks: what may is a job for `Workers`, which posts its result back to the engine thread. Whatever goes
wrong on the way, the request goes on with what it has and computes the rest.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterable
from functools import partial

import numpy as np
import numpy.typing as npt
import torch

from tandem.engine.model.batch import KvPool
from tandem.engine.model.loader import LoadedModel
from tandem.engine.request import RequestKey
from tandem.engine.schedule.block_manager import BlockManager
from tandem.engine.schedule.plan import StepPlan
from tandem.engine.schedule.ranges import EMPTY, TokenRanges
from tandem.engine.schedule.scheduler import Scheduler
from tandem.engine.schedule.sequence import Phase, Sequence
from tandem.engine.settings import MAX_WAITING, EngineConfig
from tandem.engine.status import StepMeter
from tandem.engine.store.cache import EngineStore
from tandem.engine.store.chunks import Chunks
from tandem.engine.store.loading import Gate, Loading
from tandem.engine.store.lookup import LookUp
from tandem.engine.store.saver import Saver
from tandem.engine.store.saving import KnownKeys, Save
from tandem.engine.store.state import StoreState
from tandem.engine.store.threads import Workers

logger = logging.getLogger(__name__)

LOOKUP_S = 0.3
"""A slower look-up is a miss."""
LEAST_LOAD_S = 0.25
MOST_LOAD_S = 10.0
UNKNOWN_LOAD_S = 2.0
"""Loading may take as long as computing its tokens would, within these bounds: by then waiting has cost as much as it
could have saved. The third is for an engine that has not measured itself yet."""
STUCK_S = 1.0
"""Loading that has not ended so long after its time is given up by the engine."""
STOP_S = 3.0


class StoreFlow:
    """Engine thread only, but for `wait_saved`."""

    def __init__(
        self,
        store: EngineStore,
        config: EngineConfig,
        loaded: LoadedModel,
        pool: KvPool,
        blocks: BlockManager,
        scheduler: Scheduler,
        meter: StepMeter,
        *,
        post: Callable[[Iterable[Sequence], Callable[[], None]], None],
        about: Callable[[Iterable[Sequence], Callable[[], None]], None],
        resume: Callable[[Sequence], object],
    ) -> None:
        """`about` carries out a call that is about some sequences, and if it raises ends them and no other; `post` has
        the engine thread do so; `resume` takes a sequence that is RUNNING now, or no longer gated.
        Raises ConfigError if the store's chunks do not fit the engine's blocks."""
        store.check(config.block_size)
        self._store = store
        self._chunk_tokens = store.chunk_tokens
        self._max_step_tokens = config.max_num_batched_tokens
        self._loaded = loaded
        self._pool = pool
        self._blocks = blocks
        self._scheduler = scheduler
        self._meter = meter
        self._post = post
        self._about = about
        self._resume = resume
        self._known = KnownKeys()
        self._states: dict[RequestKey, StoreState] = {}
        """Those of sequences that have asked, loaded or saved something, until they end."""
        self._pending: dict[RequestKey, Sequence] = {}
        """Sequences whose look-up or loading is in progress."""
        self._closing = False
        self._lookups = Workers("kv-lookup", 1, MAX_WAITING)
        self._loaders = Workers("kv-load", store.loaders, 2 * config.max_num_seqs)
        self._chunks = Chunks(store, loaded)
        self._saver = Saver(store, self._chunks, self._known, pool, blocks, meter, self._saved)
        scheduler.on_full_blocks = self._full_blocks

    # Requests come, wait and go

    def accept(self, sequence: Sequence) -> bool:
        """Whether the store is to be asked (`look_up`) before `sequence` queues."""
        if sequence.wants_import or sequence.computes_all:
            return False
        known = len(sequence.tokens)
        gain = min(known // self._chunk_tokens * self._chunk_tokens, known - 1) - self._on_device(sequence)
        return gain >= self._blocks.block_size

    def look_up(self, sequence: Sequence) -> None:
        """Asks the store, on another thread. `sequence` queues when the answer is there, after `LOOKUP_S` at the
        latest, or at once where too many are asking."""
        state = self._state(sequence)
        state.lookup = LookUp(
            self._store,
            sequence.root,
            sequence.request.token_ids,
            cached_tokens=self._on_device(sequence),
            tokens_per_s=self._meter.prefill_tokens_per_s,
            answered=partial(self._hand_back, sequence),
        )
        if self._lookups.put(state.lookup):
            state.given_up_at = time.monotonic() + LOOKUP_S
            self._pending[sequence.key] = sequence
        else:
            state.lookup = None
            self._store.counters.lookup("crowded")
            self._scheduler.looked_up(sequence)

    def runs(self, sequence: Sequence) -> None:
        """`sequence` got its blocks, or its loading ended: what was prefetched for it and not loaded is let go."""
        state = self._states.get(sequence.key)
        if state is not None and state.lookup is not None:
            self._discard(state.lookup)
            state.lookup = None

    def load(self, sequence: Sequence, slots: npt.NDArray[np.int64]) -> None:
        """`sequence` has its blocks and is LOADING. `slots` int64 [known tokens]."""
        state = self._state(sequence)
        if state.lookup is None:
            raise ValueError(f"{sequence.key} has nothing to load")
        lookup, state.lookup = state.lookup, None
        rate = self._meter.prefill_tokens_per_s
        limit_s, step_s = UNKNOWN_LOAD_S, 0.0
        if rate > 0:
            missing = sequence.stored.within(sequence.num_computed, sequence.stored.end)
            limit_s = min(max(missing.count / rate, LEAST_LOAD_S), MOST_LOAD_S)
            if self._store.overlap and (sequence.stored.end < sequence.num_prompt or sequence.to_compute > 1):
                # Only chunks wait for layers in a step: where all that is left is to decode, loading has to be over.
                step_s = min(sequence.to_compute, self._max_step_tokens) / rate
        state.loading = Loading(
            self._store,
            self._pool,
            lookup,
            slots=torch.from_numpy(slots).to(self._loaded.device),
            start=sequence.num_computed,
            spec_of=partial(self._chunks.spec, sequence, state),
            near_allowed=self._store.near_allowed and sequence.request.near_allowed,
            limit_s=limit_s,
            step_s=step_s,
            joinable=lambda loading: self._post((sequence,), partial(self._joinable, sequence, loading)),
            ended=lambda loading: self._post((sequence,), partial(self._ended, sequence, loading)),
        )
        state.loading_began = time.monotonic()
        state.given_up_at = state.loading_began + limit_s + STUCK_S
        self._pending[sequence.key] = sequence
        if not self._loaders.put(state.loading):
            state.loading.drop()
            self._give_up(sequence)

    def forget(self, sequence: Sequence) -> None:
        """`sequence` ends: nothing is written into its blocks after this."""
        state = self._states.pop(sequence.key, None)
        if state is None:
            return
        self._pending.pop(sequence.key, None)
        if state.lookup is not None:
            state.lookup.abandoned = True
            if sequence.phase is not Phase.LOOKUP:
                self._discard(state.lookup)
        if state.loading is not None:
            state.loading.close()
        sequence.gated = False

    # Time

    def next_due(self) -> float | None:
        return min((self._state(sequence).given_up_at for sequence in self._pending.values()), default=None)

    def expire(self, now: float) -> None:
        for sequence in [s for s in self._pending.values() if self._state(s).given_up_at <= now]:
            self._about((sequence,), partial(self._give_up, sequence))

    def _give_up(self, sequence: Sequence) -> None:
        """The store is too slow: `sequence` goes on without."""
        state = self._state(sequence)
        self._pending.pop(sequence.key, None)
        if state.lookup is not None:
            state.lookup.abandoned = True
            state.lookup = None
            self._store.counters.lookup("slow")
            self._scheduler.looked_up(sequence)
        elif state.loading is not None:
            loading, state.loading = state.loading, None
            loading.close()
            self._store.counters.load("stuck", 0.0, {})
            self._go_on(sequence, loading.before, None)

    # Answers of the workers

    def _hand_back(self, sequence: Sequence, lookup: LookUp) -> None:
        """Takes an answered look-up to the engine thread. On the look-up thread."""
        if self._closing:
            lookup.discard()  # a call that took longer than the engine waited for it
        else:
            self._post((sequence,), partial(self._answered, sequence, lookup))

    def _answered(self, sequence: Sequence, lookup: LookUp) -> None:
        state = self._states.get(sequence.key)
        if state is None or state.lookup is not lookup:
            self._discard(lookup)
            return
        self._pending.pop(sequence.key, None)
        self._store.counters.lookup(lookup.outcome)
        state.keys = lookup.keys
        now = time.monotonic()
        for item in lookup.found:
            self._known.add(item.key, now)
        if lookup.located:
            sequence.stored = lookup.stored
        else:
            state.lookup = None
        self._scheduler.looked_up(sequence)

    def _joinable(self, sequence: Sequence, loading: Loading) -> None:
        if self._loading_of(sequence) is loading and sequence.phase is Phase.LOADING:
            self._report_wait(sequence)
            self._scheduler.join(sequence, loading.planned, inexact_from=loading.inexact_from, gated=True)
            self._resume(sequence)

    def _ended(self, sequence: Sequence, loading: Loading) -> None:
        for index in loading.bad:
            self._known.discard(loading.located[index].key)
        if self._loading_of(sequence) is loading:
            self._settle(sequence, loading)
            self._go_on(sequence, loading.there, loading.inexact_from)

    def _settle(self, sequence: Sequence, loading: Loading) -> None:
        """Loading is over and counted; the report says what it brought."""
        self._state(sequence).loading = None
        self._pending.pop(sequence.key, None)
        tokens = loading.tokens_by_tier()
        self._store.counters.load(loading.outcome, loading.seconds, tokens)
        if sequence.report is not None and tokens:
            sequence.report.cached_tokens = loading.there.within(0, sequence.num_prompt).count
            sequence.report.near_tokens = loading.near_tokens(sequence.num_prompt)
            for tier, count in loading.tokens_by_tier(sequence.num_prompt).items():
                sequence.report.cached_by_tier[tier] = sequence.report.cached_by_tier.get(tier, 0) + count

    def _go_on(self, sequence: Sequence, there: TokenRanges, inexact_from: int | None) -> None:
        """The tokens `there` are, exact below `inexact_from`; the rest is computed."""
        sequence.stored = EMPTY
        if sequence.phase is Phase.LOADING:
            self._report_wait(sequence)
            self._scheduler.join(sequence, there, inexact_from=inexact_from)
            self._scheduler.publish(sequence)
            self._resume(sequence)
        elif sequence.gated:
            sequence.gated = False
            sequence.there = there
            sequence.inexact_from = inexact_from
            self._scheduler.publish(sequence)
            self._resume(sequence)

    # Steps

    def loading_from(self, sequence: Sequence) -> int:
        """Tokens of a gated sequence that are there in all layers already."""
        loading = self._loading_of(sequence)
        return loading.start if loading is not None else sequence.num_computed

    def gate(self, plan: StepPlan) -> Gate | None:
        """What a step has to wait for, if there is anything."""
        if not self._pending:
            return None
        loadings = {chunk.sequence: self._loading_of(chunk.sequence) for chunk in plan.chunks if chunk.sequence.gated}
        return Gate(loadings) if loadings else None

    def stepped(self, gate: Gate) -> None:
        """The forward is over. All layers of those that passed are there; the others wait for the end of their loading,
        and then compute what it has not brought."""
        for sequence in gate.passing:
            if (loading := self._loading_of(sequence)) is not None:
                self._settle(sequence, loading)
            if sequence.report is not None:
                sequence.report.load_s += gate.waited_s
            sequence.gated = False
            sequence.stored = EMPTY
        for sequence in gate.broken:
            self._store.counters.gate_missed()
            loading = self._loading_of(sequence)
            self._state(sequence).loading_began = time.monotonic()
            self._scheduler.suspend(sequence, loading.before if loading is not None else EMPTY)

    # Saving

    def _full_blocks(self, sequence: Sequence) -> None:
        self._saver.offer_new(sequence, self._state(sequence))

    def _saved(self, save: Save) -> None:
        """Takes an ended save to the engine thread. On the saver's thread, or on the engine's."""
        self._post((), partial(self._saver.ended, save))

    # End

    def wait_saved(self, timeout_s: float) -> bool:
        """Waits until all that was offered is saved or refused. From any thread. False: time is up."""
        return self._saver.wait_idle(timeout_s)

    def close(self) -> bool:
        """All requests have ended. What is queued for saving is dropped. False: a thread hangs in the store; it reads
        and writes nothing that anybody else uses. What the workers still posted has to be carried out after this."""
        self._closing = True
        end = time.monotonic() + STOP_S
        stopped = [w.stop(max(end - time.monotonic(), 0.0)) for w in (self._lookups, self._loaders, self._saver)]
        return all(stopped)

    # Helpers

    def _on_device(self, sequence: Sequence) -> int:
        """Known tokens that the device's prefix cache has now."""
        return self._blocks.cached_prefix(sequence.chain, len(sequence.tokens)) * self._blocks.block_size

    def _discard(self, lookup: LookUp) -> None:
        if lookup.fetch is not None and not self._loaders.put(_Discard(lookup)):
            lookup.discard()

    def _state(self, sequence: Sequence) -> StoreState:
        """The state of a sequence that has not ended."""
        return self._states.setdefault(sequence.key, StoreState())

    def _loading_of(self, sequence: Sequence) -> Loading | None:
        """The `Loading` of `sequence` that is in progress."""
        state = self._states.get(sequence.key)
        return state.loading if state is not None else None

    def _report_wait(self, sequence: Sequence) -> None:
        """Reports how long `sequence`, which is about to leave LOADING, was there."""
        if sequence.report is not None:
            sequence.report.load_s += time.monotonic() - self._state(sequence).loading_began


class _Discard:
    """Closing a fetch may be a message to another process, so the engine thread does not do it."""

    def __init__(self, lookup: LookUp) -> None:
        self._lookup = lookup

    def run(self) -> None:
        self._lookup.discard()

    def drop(self) -> None:
        self._lookup.discard()
