"""A pool of mock workers in virtual time: what `placement.py` drives every policy against.

A worker computes in steps, as an engine with continuous batching does: one token for each sequence that decodes, and a
chunk of the prompts at the head of its queue, under a token budget. A step takes as long as `Timing` says. Its prefix
cache keeps blocks on a least-recently-used list; what runs is pinned. Nothing here knows how requests are placed.
"""

from __future__ import annotations

import heapq
from array import array
from collections import OrderedDict, deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Protocol

STATUS_S = 0.1
"""A worker that computes says how it is at most this often; one that runs out of work says so at once."""


@dataclass(frozen=True, slots=True)
class Timing:
    """Seconds. The defaults are Llama-3.1-70B on four A100, fitted to the table that `docs/placement.md` names."""

    step_s: float = 0.0259
    """Of any step: the weights are read once."""
    prompt_token_s: float = 1.427e-4
    token_pair_s: float = 1.75e-9
    """Attention: of each prompt token to each token before it, twice (a prompt of n tokens costs n squared)."""
    sequence_s: float = 8.2e-5
    """Of each sequence that decodes in a step."""
    kv_token_s: float = 5.5e-8
    """Of each token whose KV is read in a step."""
    link_token_s: float = 1.3e-5
    """Of moving one token's KV (320 KiB) to another worker: 25 GB/s."""
    handover_s: float = 0.01
    """Of a hand-over beyond that: one more queue, stream and wake-up."""

    def prefill_s(self, tokens: int, context: int) -> float:
        """Of `tokens` prompt tokens after `context` others; without the step itself."""
        total = context + tokens
        return self.prompt_token_s * tokens + self.token_pair_s * (total * total - context * context)


@dataclass(frozen=True, slots=True)
class Request:
    arrival_s: float
    prompt_tokens: int
    output_tokens: int
    blocks: tuple[int, ...]
    """One id for each block of the prompt, the unfilled last one included; equal ids: equal tokens up to there."""


@dataclass(slots=True, eq=False)
class Job:
    """A request on its way through the pool."""

    number: int
    request: Request
    decode: int = -1
    prefill: int | None = None
    cached_tokens: int = 0
    """Not computed: found in the cache of the worker that computes the prompt."""
    computed_tokens: int = 0
    """Of the prompt, those cached included."""
    generated: int = 0
    private_blocks: int = 0
    pinned: list[int] = field(default_factory=list)
    submitted_s: float = 0.0
    started_s: float = 0.0
    prompt_done_s: float = 0.0
    first_token_s: float = 0.0
    finished_s: float = 0.0
    last_token_s: float = 0.0
    gaps: array[float] = field(default_factory=lambda: array("f"))
    """Seconds between its tokens."""


class BlockCache:
    """Which blocks a worker holds. `stored` and `removed` gather what changed until the router has been told."""

    def __init__(self, capacity: int) -> None:
        self.capacity = capacity
        self.stored: list[int] = []
        self.removed: list[int] = []
        self._pins: dict[int, int] = {}
        self._idle: OrderedDict[int, None] = OrderedDict()
        self._private = 0

    @property
    def available(self) -> int:
        """Blocks that are free or may be evicted."""
        return self.capacity - self._private - len(self._pins)

    def match(self, blocks: Sequence[int]) -> int:
        """Leading blocks that are here."""
        for index, block in enumerate(blocks):
            if block not in self._pins and block not in self._idle:
                return index
        return len(blocks)

    def reserve(self, hits: Sequence[int], private: int) -> bool:
        """Pins `hits` and takes `private` blocks, evicting what was used longest ago; or does nothing."""
        if self.available - sum(1 for block in hits if block not in self._pins) < private:
            return False
        for block in hits:
            self._pin(block)
        self._private += private
        while len(self._pins) + len(self._idle) + self._private > self.capacity:
            block, _ = self._idle.popitem(last=False)
            self.removed.append(block)
        return True

    def publish(self, block: int) -> None:
        """One private block turns out to hold `block`; where another one does already, it is given back."""
        self._private -= 1
        if block not in self._pins and block not in self._idle:
            self.stored.append(block)
        self._pin(block)

    def release(self, pinned: Sequence[int], private: int) -> None:
        """The deepest block of a chain is evicted first: without those before it, it would answer nothing."""
        self._private -= private
        for block in reversed(pinned):
            self._pins[block] -= 1
            if not self._pins[block]:
                del self._pins[block]
                self._idle[block] = None

    def _pin(self, block: int) -> None:
        self._idle.pop(block, None)
        self._pins[block] = self._pins.get(block, 0) + 1


class MockWorker:
    def __init__(
        self, index: int, timing: Timing, cache_tokens: int, block_tokens: int, step_tokens: int, max_sequences: int
    ) -> None:
        self.index = index
        self.timing = timing
        self.block_tokens = block_tokens
        self.step_tokens = step_tokens
        self.max_sequences = max_sequences
        self.cache = BlockCache(cache_tokens // block_tokens)
        self.waiting: deque[Job] = deque()
        self.prefilling: list[Job] = []
        self.arrived: deque[Job] = deque()
        """Handed over, not yet decoding."""
        self.decoding: list[Job] = []
        self.kv_tokens = 0
        """Tokens whose KV the decoding sequences read in every step."""
        self.pending_tokens = 0
        """Prompt tokens to compute, as far as is known before the cache has been looked up."""
        self.busy = False
        self.busy_s = 0.0
        self.computed_tokens = 0
        self.decode_step_s = 0.0
        """The last step in which sequences decoded and no prompt was computed."""
        self.told_s = -1.0
        self._chunks: list[tuple[Job, int]] = []

    def submit(self, job: Job, now: float) -> None:
        job.submitted_s = now
        self.waiting.append(job)
        self.pending_tokens += job.request.prompt_tokens

    def start_step(self, now: float) -> float | None:
        """Seconds that the next step takes; None: nothing to do."""
        self._join()
        budget = self.step_tokens - len(self.decoding)
        self._chunks = []
        seconds = 0.0
        for job in self.prefilling:
            budget = self._chunk(job, budget)
        while budget > 0 and self.waiting and self._running < self.max_sequences and self._admit(self.waiting[0]):
            job = self.waiting.popleft()
            job.started_s = now
            self.prefilling.append(job)
            budget = self._chunk(job, budget)
        if not self._chunks and not self.decoding:
            return None
        for job, tokens in self._chunks:
            seconds += self.timing.prefill_s(tokens, job.computed_tokens)
        seconds += self.timing.step_s + self.timing.sequence_s * len(self.decoding)
        seconds += self.timing.kv_token_s * self.kv_tokens
        if not self._chunks:
            self.decode_step_s = seconds
        self.busy_s += seconds
        return seconds

    def end_step(self, now: float) -> tuple[list[Job], list[Job]]:
        """Jobs whose prompt is computed now, and those whose last token came."""
        finished = []
        self.kv_tokens += len(self.decoding)
        for job in self.decoding:
            job.generated += 1
            job.gaps.append(now - job.last_token_s)
            job.last_token_s = now
            if job.generated >= job.request.output_tokens:
                finished.append(job)
        done = []
        for job, tokens in self._chunks:
            before = job.computed_tokens
            job.computed_tokens += tokens
            self.computed_tokens += tokens
            self.pending_tokens -= tokens
            complete = job.computed_tokens >= job.request.prompt_tokens
            self._publish(job, before, complete)
            if complete:
                job.prompt_done_s = now
                done.append(job)
        if done:
            self.prefilling = [job for job in self.prefilling if job not in done]
        for job in finished:
            self._leave(job)
        return done, finished

    def decode(self, job: Job) -> None:
        """A prompt that was computed here goes on here; its first token was in the step that just ended."""
        job.generated = 1
        self.decoding.append(job)
        self.kv_tokens += job.request.prompt_tokens + 1
        if job.generated >= job.request.output_tokens:
            self._leave(job)

    def release(self, job: Job) -> None:
        """Its blocks are reusable from now on."""
        self.cache.release(job.pinned, job.private_blocks)
        job.pinned, job.private_blocks = [], 0

    def check_idle(self) -> None:
        """Raises AssertionError where something of a request is left."""
        left = len(self.waiting) + len(self.prefilling) + len(self.arrived) + len(self.decoding)
        assert left == 0, "requests are left"
        assert (self.kv_tokens, self.pending_tokens) == (0, 0), "tokens are left"
        assert self.cache.available == self.cache.capacity, "blocks are still pinned"

    @property
    def _running(self) -> int:
        return len(self.decoding) + len(self.prefilling)

    def _leave(self, job: Job) -> None:
        self.decoding.remove(job)
        self.kv_tokens -= job.request.prompt_tokens + job.generated
        self.release(job)

    def _join(self) -> None:
        while self.arrived and self._running < self.max_sequences:
            job = self.arrived[0]
            blocks = job.request.blocks
            hits = self.cache.match(blocks)
            if not self._take(job, hits):
                return
            self.arrived.popleft()
            for block in blocks[hits:]:
                self._publish_block(job, block)
            job.generated = 1
            self.decoding.append(job)
            self.kv_tokens += job.request.prompt_tokens + 1

    def _admit(self, job: Job) -> bool:
        hits = self.cache.match(job.request.blocks)
        if not self._take(job, hits):
            return False
        job.cached_tokens = job.computed_tokens = min(hits * self.block_tokens, job.request.prompt_tokens - 1)
        self.pending_tokens -= job.cached_tokens
        return True

    def _take(self, job: Job, hits: int) -> bool:
        tokens = job.request.prompt_tokens + (job.request.output_tokens if job.decode == self.index else 0)
        private = max(-(-tokens // self.block_tokens), len(job.request.blocks)) - hits
        pinned = list(job.request.blocks[:hits])
        if not self.cache.reserve(pinned, private):
            return False
        job.pinned, job.private_blocks = pinned, private
        return True

    def _chunk(self, job: Job, budget: int) -> int:
        tokens = min(budget, job.request.prompt_tokens - job.computed_tokens)
        if tokens > 0:
            self._chunks.append((job, tokens))
        return budget - tokens

    def _publish(self, job: Job, before: int, complete: bool) -> None:
        blocks = job.request.blocks
        end = len(blocks) if complete else job.computed_tokens // self.block_tokens
        for index in range(max(before // self.block_tokens, len(job.pinned)), end):
            self._publish_block(job, blocks[index])

    def _publish_block(self, job: Job, block: int) -> None:
        self.cache.publish(block)
        job.pinned.append(block)
        job.private_blocks -= 1


class Policy(Protocol):
    """What places requests. All calls come in the order of virtual time."""

    def place(self, job: Job, now: float) -> tuple[int, int | None]:
        """The worker that decodes, and the one that computes the prompt; None: the same one."""

    def prompt_computed(self, job: Job, now: float) -> None:
        """The first token has come."""

    def finished(self, job: Job, now: float) -> None: ...

    def status(self, worker: MockWorker, now: float) -> None:
        """The worker says how it is. `worker.cache.stored` and `.removed`: since the last time."""


class MockPool:
    def __init__(
        self,
        workers: int,
        timing: Timing,
        *,
        cache_tokens: int = 3_000_000,
        block_tokens: int = 512,
        step_tokens: int = 2048,
        max_sequences: int = 256,
    ) -> None:
        self.timing = timing
        self.workers = [
            MockWorker(index, timing, cache_tokens, block_tokens, step_tokens, max_sequences)
            for index in range(workers)
        ]

    def run(self, requests: Sequence[Request], policy: Policy) -> list[Job]:
        """Every request to its last token; virtual seconds, as fast as this machine goes."""
        jobs = [Job(number, request) for number, request in enumerate(requests)]
        # (time, number, what, worker or job): equal times in the order in which they were put in.
        events: list[tuple[float, int, int, int]] = [
            (job.request.arrival_s, number, _ARRIVAL, number) for number, job in enumerate(jobs)
        ]
        heapq.heapify(events)
        count = len(events)

        def start(worker: MockWorker, now: float) -> None:
            nonlocal count
            if worker.busy:
                return
            seconds = worker.start_step(now)
            if seconds is None:
                return
            worker.busy = True
            count += 1
            heapq.heappush(events, (now + seconds, count, _STEP, worker.index))

        while events:
            now, _, what, index = heapq.heappop(events)
            if what == _ARRIVAL:
                job = jobs[index]
                job.decode, job.prefill = policy.place(job, now)
                worker = self.workers[job.decode if job.prefill is None else job.prefill]
                worker.submit(job, now)
                start(worker, now)
            elif what == _STEP:
                worker = self.workers[index]
                worker.busy = False
                done, finished = worker.end_step(now)
                for job in done:
                    if job.decode == worker.index:
                        job.first_token_s = job.last_token_s = now
                        worker.decode(job)
                        policy.prompt_computed(job, now)
                        if job.generated >= job.request.output_tokens:
                            finished.append(job)
                    else:
                        count += 1
                        heapq.heappush(events, (now + self._handover_s(job, now), count, _HANDOVER, job.number))
                for job in finished:
                    job.finished_s = now
                    policy.finished(job, now)
                start(worker, now)
                self._tell(worker, policy, now)
            else:
                job = jobs[index]
                assert job.prefill is not None
                self.workers[job.prefill].release(job)
                job.first_token_s = job.last_token_s = now
                policy.prompt_computed(job, now)
                worker = self.workers[job.decode]
                if job.request.output_tokens <= 1:
                    job.finished_s = now
                    policy.finished(job, now)
                else:
                    worker.arrived.append(job)
                    start(worker, now)
        for worker in self.workers:
            worker.check_idle()
        return jobs

    def _handover_s(self, job: Job, now: float) -> float:
        """KV leaves layer by layer while the prompt is computed; what the other side has is not sent."""
        receiver = self.workers[job.decode]
        held = receiver.cache.match(job.request.blocks) * receiver.block_tokens
        sent_s = self.timing.link_token_s * max(0, job.request.prompt_tokens - held)
        return self.timing.handover_s + max(0.0, sent_s - (now - job.started_s))

    def _tell(self, worker: MockWorker, policy: Policy, now: float) -> None:
        if worker.busy and now - worker.told_s < STATUS_S:
            return
        worker.told_s = now
        policy.status(worker, now)
        worker.cache.stored.clear()
        worker.cache.removed.clear()


_ARRIVAL, _STEP, _HANDOVER = range(3)
