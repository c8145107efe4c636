"""What the router knows of its workers: loads, prefix caches, speeds. Kept up to date by their sessions.

One `WorkerState` per session, made when the session is first looked at; `Placed` follows one request on one worker.
The arithmetic is in `load.py`, `prefix_index.py` and the planner's `perf_model.py`.
"""

from __future__ import annotations

import re
import time
from collections.abc import Sequence

from tandem.kvstore.identity import BlockHash
from tandem.planner.perf_model import ModelShape, PerfModel
from tandem.proto import worker_pb2
from tandem.router.fleet.load import Work, WorkerLoad
from tandem.router.fleet.session import WorkerSession, hashes
from tandem.router.placing.prefix_index import MAX_BLOCKS, PrefixIndex

LEAST_INDEX_BLOCKS = 65_536
INDEX_SPARE = 2
"""The index keeps so many times the blocks that the workers have: promised ones come on top, and those of workers that
have gone are wiped little by little."""
FIRST_OUTPUT_TOKENS = 256.0
"""Output tokens of an average answer, until some have ended."""
_REMEMBERED = 100
"""Answers in that average, the latest most."""
_COMPUTED = (worker_pb2.FINISH_REASON_HANDED_OVER, worker_pb2.FINISH_REASON_STOP)
"""Ends of a request without tokens whose prompt was computed: handed over, or an embedding."""


_LINK_FAULT = re.compile(r"\b(lease|stalled|unreachable|slow): ")
"""Reasons of a lost hand-over that speak against the link rather than against one of its ends."""


class Pool:
    """Used from the event loop."""

    def __init__(self, max_index_blocks: int = MAX_BLOCKS) -> None:
        """`max_index_blocks`: see RouterConfig."""
        self.index = PrefixIndex(min(LEAST_INDEX_BLOCKS, max_index_blocks))
        self._max_index_blocks = max_index_blocks
        self._worker_blocks = 0
        self.output_tokens = FIRST_OUTPUT_TOKENS
        """Output tokens of a recent answer, on average."""
        self._models: dict[tuple[str, ModelShape], PerfModel] = {}
        self._states: dict[tuple[str, int], WorkerState] = {}

    def state(self, session: WorkerSession) -> WorkerState:
        """The state of a worker's session; a new one where the worker has connected again."""
        state = self._states.get(session.identity)
        if state is None or state.session is not session:
            state = self._states[session.identity] = WorkerState(self, session)
            session.attach(state)
        return state

    def model(self, info: worker_pb2.WorkerInfo) -> PerfModel:
        """Shared by all workers that are equally fast."""
        shape = ModelShape(info.num_parameters, info.weight_bytes, info.kv_bytes_per_token)
        key = info.hardware_class, shape
        if key not in self._models:
            self._models[key] = PerfModel(info.hardware_class, shape)
        return self._models[key]

    def add_blocks(self, blocks: int) -> None:
        """The workers have so many blocks of KV more, or fewer: the index is made to fit."""
        self._worker_blocks += blocks
        fitting = max(LEAST_INDEX_BLOCKS, INDEX_SPARE * self._worker_blocks)
        self.index.resize(min(fitting, self._max_index_blocks))

    def forget(self, state: WorkerState) -> None:
        self.index.retire(state.load.slot)
        self.add_blocks(-state.session.info.num_blocks)
        if self._states.get(state.session.identity) is state:
            del self._states[state.session.identity]

    def answered(self, tokens: int) -> None:
        self.output_tokens += (tokens - self.output_tokens) / _REMEMBERED


class WorkerState:
    """A session's `Feed`."""

    def __init__(self, pool: Pool, session: WorkerSession) -> None:
        info = session.info
        self.session = session
        self._pool = pool
        self._block_size = info.block_size
        self._step_s = 0.0
        self._listed = False
        pool.add_blocks(info.num_blocks)
        self.load = WorkerLoad(
            model=pool.model(info),
            slot=pool.index.add(None if info.sends_cache_events else info.num_blocks),
            capacity_tokens=info.num_blocks * info.block_size,
            max_requests=info.max_num_seqs,
            name=info.worker_id,
            host=info.host_id,
            store_node=info.store_node,
        )
        self.alive = True

    def on_status(self, status: worker_pb2.WorkerStatus) -> None:
        """Corrects the load by what the worker says of requests that are not this router's, and learns from its decode
        steps."""
        load = self.load
        used = (status.total_blocks - min(status.free_blocks, status.total_blocks)) * self._block_size
        load.foreign(
            requests=max(0, status.running + status.waiting - load.requests),
            decoding=max(0, status.decoding - load.decoding),
            pending_tokens=max(0, status.pending_prefill_tokens - load.waiting_tokens),
            used_tokens=max(0, used - load.reserved_tokens),
            by_band=status.by_band,
        )
        if status.decode_step_s != self._step_s:  # else nothing was decoded since the last time
            self._step_s = status.decode_step_s
            load.model.observe_decode(status.decoding, status.running_tokens, status.decode_step_s)

    def on_cache(self, events: worker_pb2.CacheEvents) -> None:
        """Follows the worker's prefix cache. A reset voids what was known of it."""
        if not self.session.info.sends_cache_events:
            return
        index, load = self._pool.index, self.load
        if events.reset and self._listed:
            load.slot = index.renew(load.slot)
        self._listed = True
        index.removed(load.slot, [BlockHash(block) for block in hashes(events.removed)])
        index.stored(load.slot, [BlockHash(block) for block in hashes(events.stored)])

    def on_closed(self) -> None:
        self.alive = False
        self._pool.forget(self)


class Placed:
    """One request on one worker: the `Watcher` that turns its outputs into load, prefix index and measurements."""

    __slots__ = ("_chain", "_fresh", "_pool", "_promised_from", "_resumed", "_source", "_state", "work")

    def __init__(
        self,
        pool: Pool,
        state: WorkerState,
        work: Work,
        chain: Sequence[BlockHash],
        promised_from: int,
        *,
        source: WorkerState | None = None,
        resumed: bool = False,
    ) -> None:
        """`promised_from`: the first block of `chain` that the worker will compute. `source`: the prefill worker that
        computes it instead, for the decode worker's side of a hand-over; nothing is promised here then, as a later
        prompt would not find in this worker's queue what is still on its way. `resumed`: the prompt report is not of
        all that is computed."""
        self.work = work
        self._pool = pool
        self._state = state
        self._chain = chain
        self._promised_from = promised_from if source is None else len(chain)
        self._source = source
        self._resumed = resumed
        self._fresh = True
        work.start(time.monotonic())
        pool.index.promise(state.load.slot, chain, self._promised_from)

    def on_output(self, output: worker_pb2.RequestOutput) -> None:
        """Follows one request on its worker: when its prompt is computed, how many tokens it has produced."""
        reason = output.finish_reason
        if self._fresh and (output.token_ids or reason in _COMPUTED):
            self._fresh = False
            if self._state.alive:
                self._pool.index.computed(self._state.load.slot, self._chain)
            self.work.computed(time.monotonic())
            if output.HasField("prompt"):
                self._learn(output.prompt)
        self.work.produced(len(output.token_ids))
        if reason in (worker_pb2.FINISH_REASON_STOP, worker_pb2.FINISH_REASON_LENGTH) and self.work.produced_tokens:
            self._pool.answered(self.work.produced_tokens)

    def on_end(self) -> None:
        self.work.end(time.monotonic())
        if self._state.alive:
            self._pool.index.ended(self._state.load.slot, self._chain, self._promised_from)

    def _learn(self, report: worker_pb2.PromptReport) -> None:
        if self._resumed:
            return
        if self._source is not None:
            self._learn_link(self._source, report)
        handed_over = self._source is not None and not report.recompute_reason
        state = self._source if handed_over and self._source is not None else self._state
        model, prompt = state.load.model, self.work.prompt_tokens
        model.observe_prefill(prompt - report.cached_tokens, report.cached_tokens, report.prefill_s - report.load_s)
        if report.load_s > 0.0:
            model.observe_fetch(report.cached_by_tier, report.load_s)

    def _learn_link(self, source: WorkerState, report: worker_pb2.PromptReport) -> None:
        load, now = self._state.load, time.monotonic()
        link, tokens = (source.load.host, load.host), self.work.prompt_tokens - self.work.cached_tokens
        if not report.recompute_reason:
            load.model.observe_handover(tokens, report.handover_s, link, now)
        elif _LINK_FAULT.search(report.recompute_reason):
            load.model.handover_failed(tokens, report.handover_s, link, now)
