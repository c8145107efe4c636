"""The router's own placement in virtual time: what `dispatch.py` and `pool.py` of `router/placing/` do around the
policy, with a clock of its own and mock workers instead of sessions."""

from __future__ import annotations

from dataclasses import dataclass

from mock_pool import Job, MockPool, MockWorker

from tandem.kvstore.identity import BlockHash
from tandem.planner.perf_model import ModelShape, PerfModel
from tandem.router.fleet.load import Work, WorkerLoad
from tandem.router.placing.placement import Hits, Placement, Request, place
from tandem.router.placing.prefix_index import PrefixIndex
from tandem.router.placing.targets import Targets
from tandem.router.settings import Disaggregate

FIRST_OUTPUT_TOKENS = 256.0
REMEMBERED = 100
"""As in `router/placing/pool.py`."""


@dataclass(frozen=True, slots=True)
class Known:
    """What workers say of themselves, and from which the performance model makes its first guess."""

    hardware_class: str = ""
    shape: ModelShape | None = None


@dataclass(slots=True)
class _Live:
    chain: list[BlockHash]
    decode: Work
    promised_from: int
    """The first block that the worker which computes the prompt had not."""
    prefill: Work | None = None

    @property
    def computes(self) -> Work:
        return self.prefill or self.decode


class Ours:
    """The first `prefills` workers of the pool only compute prompts; the others decode, and compute prompts too."""

    def __init__(
        self,
        pool: MockPool,
        turn: int,
        known: Known,
        *,
        cache_events: bool = False,
        prefills: int = 0,
        disaggregate: Disaggregate = "auto",
        targets: Targets | None = None,
    ) -> None:
        self._pool = pool
        self._turn = turn
        self._events = cache_events
        self._disaggregate = disaggregate
        self._targets = targets
        self._block_tokens = pool.workers[0].block_tokens
        self._index = PrefixIndex()
        model = PerfModel(known.hardware_class, known.shape)
        self._loads = [
            WorkerLoad(
                model=model,
                slot=self._index.add(None if cache_events else worker.cache.capacity),
                capacity_tokens=worker.cache.capacity * worker.block_tokens,
                max_requests=worker.max_sequences,
            )
            for worker in pool.workers
        ]
        self._prefills = self._loads[:prefills]
        self._decodes = self._loads[prefills:]
        self._live: dict[int, _Live] = {}
        self._output_tokens = FIRST_OUTPUT_TOKENS
        self._steps_s = [0.0] * len(pool.workers)

    def place(self, job: Job, now: float) -> tuple[int, int | None]:
        request, size = job.request, self._block_tokens
        chain = [_hash(block) for block in request.blocks]
        hits = {slot: (present * size, promised * size) for slot, present, promised in self._index.match(chain)}
        self._turn += 1
        output_tokens = round(self._output_tokens)
        chosen = place(
            self._decodes,
            self._prefills,
            Request(request.prompt_tokens, output_tokens),
            hits,
            now,
            disaggregate=self._disaggregate,
            targets=self._targets,
            turn=self._turn,
        )
        decode = self._start(
            self._decodes[chosen.decode], job, hits, output_tokens, chosen, chosen.prefill is None, now
        )
        live = _Live(chain, decode, len(chain))
        if chosen.prefill is None:
            live.promised_from = decode.cached_tokens // size
        else:
            live.prefill = self._start(self._prefills[chosen.prefill], job, hits, 0, chosen, True, now)
            live.promised_from = live.prefill.cached_tokens // size
        self._index.promise(live.computes.load.slot, chain, live.promised_from)
        self._live[job.number] = live
        return len(self._prefills) + chosen.decode, chosen.prefill

    def _start(
        self, load: WorkerLoad, job: Job, hits: Hits, output_tokens: int, chosen: Placement, computes: bool, now: float
    ) -> Work:
        prompt = job.request.prompt_tokens
        cached = min(sum(hits.get(load.slot, (0, 0))), prompt)
        stall_s = chosen.stall_s if output_tokens else 0.0
        work = Work(load, prompt, output_tokens, chosen.prefill_s if computes else 0.0, cached, stall_s=stall_s)
        work.start(now)
        return work

    def prompt_computed(self, job: Job, now: float) -> None:
        live = self._live[job.number]
        model = live.computes.load.model
        uncached = job.request.prompt_tokens - job.cached_tokens
        model.observe_prefill(uncached, job.cached_tokens, job.prompt_done_s - job.started_s)
        if live.prefill is not None:
            sent = job.request.prompt_tokens - live.decode.cached_tokens
            model.observe_handover(sent, job.first_token_s - job.prompt_done_s)
            live.prefill.end(now)
            self._computed(live)
        live.decode.computed(now)
        self._index.computed(live.decode.load.slot, live.chain)
        live.decode.produced(1)

    def finished(self, job: Job, now: float) -> None:
        live = self._live.pop(job.number)
        live.decode.produced(job.generated - live.decode.produced_tokens)
        live.decode.end(now)
        if live.prefill is None:
            self._computed(live)
        self._output_tokens += (job.generated - self._output_tokens) / REMEMBERED

    def _computed(self, live: _Live) -> None:
        slot = live.computes.load.slot
        self._index.computed(slot, live.chain)
        self._index.ended(slot, live.chain, live.promised_from)

    def status(self, worker: MockWorker, now: float) -> None:
        load = self._loads[worker.index]
        if worker.decode_step_s != self._steps_s[worker.index]:  # else nothing was decoded since the last time
            self._steps_s[worker.index] = worker.decode_step_s
            load.model.observe_decode(len(worker.decoding), worker.kv_tokens, worker.decode_step_s)
        for job in worker.decoding:
            work = self._live[job.number].decode
            work.produced(job.generated - work.produced_tokens)
        if self._events:
            self._index.removed(load.slot, [_hash(block) for block in worker.cache.removed])
            self._index.stored(load.slot, [_hash(block) for block in worker.cache.stored])

    def close(self) -> None:
        assert not self._live
        self._index.check_integrity()


_HASHES: dict[int, BlockHash] = {}


def _hash(block: int) -> BlockHash:
    found = _HASHES.get(block)
    if found is None:
        found = _HASHES[block] = BlockHash(block.to_bytes(32, "big", signed=True))
    return found
