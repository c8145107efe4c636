"""What is computed in the next step: one queue, one token budget (the idea of vLLM v1's scheduler, at a small size).

Pure policy: no tensors, no clock, no randomness. The engine passes the time in and carries the plan out.

Rules, in order:

1. Every decoding request gets its one token. Where a block is missing, the request that is last in order (highest
   priority value, then latest arrival) is preempted: its blocks go back, its output is kept and computed again.
2. Running prompts share what is left of the budget, in order; chunks end at block boundaries. Beside requests that
   decode they get less of it, where that is set: everybody waits for the whole step.
3. Waiting requests are admitted in turn (`waiting.py`: fair between tenants) while slots, budget and blocks last. A
   request gets the blocks of all its known tokens at once or waits, so every admitted request can finish its prompt.
   Requests with a KV import wait in the same queue, then hold their blocks outside the steps until the import ends;
   they count as slots, so the number of slots bounds what absent peers can hold. So do those that load KV from the
   store.
4. A waiting request of an earlier band (lower priority value) than somebody running goes before that one's prompt, and
   where slots or blocks are missing it displaces: those last in order of later bands are preempted, as many as it takes
   or none. A request is displaced `MAX_DISPLACED` times at most; then it stays to its end. In the same band a tenant
   with few slots displaces those of one that has far more (`common/slot_shares.py`).
5. The last band (batches) takes what others leave. While they have work it gets a piece of a step now and then
   (`last_band.py`): few prompt tokens, few decode rows, in turn. Steps of its own are small too where their time grows
   with their tokens, since somebody who comes may have to wait for one.
6. A waiting request whose next block is just being computed by a request before it in order waits for that block
   instead of computing it twice (n > 1, shared system prompts).
7. A request that waits for what its grammar allows next keeps its place and blocks, and is left out until it is known.
"""

from __future__ import annotations

import heapq
from bisect import bisect_left, bisect_right, insort
from collections import Counter
from collections.abc import Callable, Collection, Container
from dataclasses import dataclass, field

from tandem.common.errors import TandemError
from tandem.common.fairness import LAST_BAND, ServiceCounters
from tandem.engine.request import Preemption, RequestKey
from tandem.engine.schedule.block_manager import BlockManager, IntegrityError
from tandem.engine.schedule.last_band import PROMPT_TOKENS, ROWS, LastBand, Room
from tandem.engine.schedule.sequence import Phase, Sequence
from tandem.engine.schedule.slot_shares import SlotShares, held_by
from tandem.engine.schedule.waiting import WaitingQueue
from tandem.kvstore.identity import BlockHash, extend_chain
from tandem.kvstore.interfaces import TierName

MAX_DISPLACED = 3
"""Times that a request is preempted for others: each time costs its recompute."""
DEAR_SHARE = 4
"""One slot in so many is for sequences whose masks take long."""


@dataclass(frozen=True, slots=True)
class Chunk:
    """The next `num_tokens` of a sequence's prompt (or of what a preemption lost)."""

    sequence: Sequence
    num_tokens: int


@dataclass(slots=True)
class StepPlan:
    decodes: list[Sequence] = field(default_factory=list)
    chunks: list[Chunk] = field(default_factory=list)
    admitted: list[Sequence] = field(default_factory=list)
    """Got their blocks in this step: RUNNING, IMPORTING or LOADING, cached tokens in `num_computed`."""
    preempted: list[Sequence] = field(default_factory=list)

    @property
    def num_tokens(self) -> int:
        return len(self.decodes) + sum(chunk.num_tokens for chunk in self.chunks)

    @property
    def sequences(self) -> list[Sequence]:
        """Those that it computes."""
        return [*self.decodes, *(chunk.sequence for chunk in self.chunks)]

    def drop(self, gone: Collection[Sequence]) -> None:
        """Computes nothing of `gone`."""
        if gone:
            self.decodes = [sequence for sequence in self.decodes if sequence not in gone]
            self.chunks = [chunk for chunk in self.chunks if chunk.sequence not in gone]

    def halves(self) -> tuple[StepPlan, StepPlan]:
        """What it computes, in two plans of about as many sequences."""
        half = (len(self.decodes) + len(self.chunks) + 1) // 2
        decodes, chunks = self.decodes, self.chunks
        rest = max(half - len(decodes), 0)
        return StepPlan(decodes[:half], chunks[:rest]), StepPlan(decodes[half:], chunks[rest:])


class Scheduler:
    def __init__(
        self,
        blocks: BlockManager,
        *,
        max_num_seqs: int,
        max_num_batched_tokens: int,
        max_waiting: int,
        max_prompt_tokens_beside_decodes: int | None = None,
    ) -> None:
        """`max_prompt_tokens_beside_decodes` is at least a block; None: what the decodes leave."""
        self.blocks = blocks
        self._max_num_seqs = max_num_seqs
        self._budget = max_num_batched_tokens
        self._beside_decodes = max_prompt_tokens_beside_decodes or max_num_batched_tokens
        self._max_waiting = max_waiting
        self._piece_tokens = max(PROMPT_TOKENS, blocks.block_size)
        self._last_band = LastBand()
        self._shares = SlotShares(max_num_seqs)
        self._last_row = (LAST_BAND, -1)
        """The order of the last band's row that was decoded last: those behind it are next."""
        self.on_full_blocks: Callable[[Sequence], None] | None = None
        """Called where blocks of a sequence have become full and computed in all layers."""
        self._looking_up: dict[RequestKey, Sequence] = {}
        self._waiting = WaitingQueue(ServiceCounters())
        self._running: list[Sequence] = []
        """Sorted by order."""
        self._importing: dict[RequestKey, Sequence] = {}
        self._loading: dict[RequestKey, Sequence] = {}
        self._holding: dict[RequestKey, Sequence] = {}
        self._deadlines: list[tuple[float, int, Sequence]] = []
        """A heap; entries of finished sequences are dropped when they come up."""
        self._arrivals = 0

    # Intake and end

    def add(self, sequence: Sequence, look_up: bool = False) -> None:
        """Queues `sequence`, or keeps its place in the queue until it is `looked_up`.

        Raises TandemError `overloaded`, or `context_length_exceeded` if it can never fit.
        """
        if self.blocks.blocks_for(sequence.max_total) > self.blocks.usable_blocks:
            raise TandemError(
                "context_length_exceeded",
                f"the request may need {sequence.max_total} tokens of KV cache, "
                f"the worker has {self.blocks.usable_blocks * self.blocks.block_size}",
            )
        if self.num_waiting >= self._max_waiting:
            raise TandemError("overloaded", f"{self.num_waiting} requests are waiting already", retry_after_s=1.0)
        sequence.arrival = self._arrivals
        self._arrivals += 1
        if look_up:
            sequence.phase = Phase.LOOKUP
            self._looking_up[sequence.key] = sequence
        else:
            self._waiting.add(sequence)
        if sequence.deadline is not None:
            heapq.heappush(self._deadlines, (sequence.deadline, sequence.arrival, sequence))

    def looked_up(self, sequence: Sequence) -> None:
        """The store has answered (`Sequence.stored`) or was too slow: `sequence` waits where it would have waited."""
        self._leave(sequence)
        sequence.phase = Phase.WAITING
        self._waiting.add(sequence)

    def finish(self, sequence: Sequence) -> None:
        """Ends `sequence` in whatever phase it is, and takes its blocks back."""
        self._leave(sequence)
        sequence.phase = Phase.FINISHED
        if self.blocks.holds(sequence.key):
            self.blocks.free(sequence.key)

    def hold(self, sequence: Sequence) -> None:
        """Out of the steps, but the blocks stay: until `finish`."""
        self._leave(sequence)
        sequence.phase = Phase.HOLDING
        self._holding[sequence.key] = sequence

    def join(self, sequence: Sequence, num_computed: int, gated: bool = False, inexact_from: int | None = None) -> None:
        """An import or a load ended: `num_computed` tokens of `sequence` are in its blocks, the rest is computed here.

        `gated`: the last layers of these tokens are still on their way. Such a sequence is not preempted.
        `inexact_from`: the first of them that is not exact.
        """
        self._leave(sequence)
        sequence.wants_import = False
        sequence.gated = gated
        sequence.num_computed = num_computed
        sequence.inexact_from = inexact_from
        sequence.phase = Phase.RUNNING
        insort(self._running, sequence, key=_order)

    def suspend(self, sequence: Sequence, num_computed: int) -> None:
        """A gated sequence waits outside the steps again: only `num_computed` tokens are certainly in its blocks, those
        that were there before its load."""
        self._leave(sequence)
        sequence.gated = False
        sequence.num_computed = num_computed
        sequence.inexact_from = None
        sequence.phase = Phase.LOADING
        self._loading[sequence.key] = sequence

    def expired(self, now: float) -> list[Sequence]:
        """The sequences whose deadline has passed. Each is returned once; the caller finishes it."""
        late: list[Sequence] = []
        while self._deadlines and self._deadlines[0][0] <= now:
            sequence = heapq.heappop(self._deadlines)[2]
            if sequence.phase is not Phase.FINISHED:
                late.append(sequence)
        return late

    def next_deadline(self) -> float | None:
        while self._deadlines and self._deadlines[0][2].phase is Phase.FINISHED:
            heapq.heappop(self._deadlines)
        return self._deadlines[0][0] if self._deadlines else None

    # Steps

    def schedule(self, now: float) -> StepPlan:
        """The next step; `now` (s) becomes the time at which sequences were first scheduled."""
        plan = StepPlan()
        self._admit_urgent(plan, now)
        self._admit_crowded_out(plan, now)
        displaced = len(plan.preempted)
        room = self._room_of_last_band(now)
        self._plan_decodes(plan, room)
        left = self._budget - len(plan.decodes)
        if plan.decodes and plan.decodes[0].priority < LAST_BAND:
            left = min(left, self._beside_decodes)
        for sequence in self._running:
            if left <= 0:
                break
            if _prefills(sequence):
                left -= self._plan_chunk(plan, sequence, left, room)
        if len(plan.preempted) == displaced:
            self._admit(plan, left, now, room)
        return plan

    def computed(self, plan: StepPlan) -> None:
        """All layers of the planned tokens are in the pool: advance, and publish the blocks that became full."""
        block_size = self.blocks.block_size
        for sequence in plan.decodes:
            sequence.num_computed += 1
            if sequence.account is not None:
                sequence.account.charge(sequence.output_cost)
            if sequence.num_computed % block_size == 0:
                self.publish(sequence)
        for chunk in plan.chunks:
            sequence = chunk.sequence
            sequence.num_computed += chunk.num_tokens
            if sequence.num_output and not sequence.remaining and sequence.account is not None:
                sequence.account.charge(sequence.output_cost)  # it goes on with its next token
            if sequence.num_computed <= sequence.num_prompt and (
                not sequence.chunk_ends or sequence.chunk_ends[-1] < sequence.num_computed
            ):
                sequence.chunk_ends.append(sequence.num_computed)
            self.publish(sequence)

    def took(self, plan: StepPlan, seconds: float) -> None:
        """The step of `plan` is over: what the last band had of it is on its account."""
        sizes = [(each.priority, 1, 0) for each in plan.decodes]
        sizes += [(chunk.sequence.priority, 0, chunk.num_tokens) for chunk in plan.chunks]
        rows = sum(rows for priority, rows, _ in sizes if priority < LAST_BAND)
        prompt_tokens = sum(tokens for priority, _, tokens in sizes if priority < LAST_BAND)
        self._last_band.took(rows, prompt_tokens, plan.num_tokens - rows - prompt_tokens, seconds)

    def next_piece(self) -> float | None:
        """When the last band may go on although earlier bands have work; None: it need not wait for that."""
        return self._last_band.due_at

    def publish(self, sequence: Sequence) -> None:
        """Puts the blocks of `sequence` that are full, computed and exact into the prefix cache. Blocks with inexact
        rows stay the request's own: its hashes promise exact ones."""
        if self.blocks.caching:
            block_size, chain = self.blocks.block_size, sequence.chain
            for index in range(sequence.published, sequence.exact_tokens // block_size):
                if index == len(chain):
                    tokens = sequence.tokens[index * block_size : (index + 1) * block_size]
                    chain.append(extend_chain(chain[-1] if chain else sequence.root, tokens))
                self.blocks.publish(sequence.key, index, chain[index])
                sequence.published = index + 1
        if self.on_full_blocks is not None:
            self.on_full_blocks(sequence)

    def _room_of_last_band(self, now: float) -> Room:
        bands = self._waiting.bands
        live = (*self._live, *self._looking_up.values())
        if LAST_BAND not in bands and not any(each.priority == LAST_BAND for each in live):
            self._last_band.has_no_work()
            return Room(0, 0)
        earlier = [each for each in live if each.priority < LAST_BAND]
        waits = any(band < LAST_BAND for band in bands)
        if not earlier and (not waits or self._running):  # who still waits does so for what those running hold
            self._last_band.is_alone(now)
            exports = any(each.request.kv_export is not None for each in self._running)
            return Room(self._max_num_seqs, self._piece_tokens if exports else self._beside_decodes)
        waits = waits or any(each.phase is not Phase.RUNNING or _prefills(each) for each in earlier)
        return Room(ROWS, self._piece_tokens) if self._last_band.is_due(now, waits) else Room(0, 0)

    def _resting(self, room: Room) -> Container[Sequence]:
        """Decodes of the last band that are not in this step: all but `room.rows`, which take turns."""
        first = bisect_left(self._running, (LAST_BAND, -1), key=_order)
        rows = [each for each in self._running[first:] if not _prefills(each)]
        if len(rows) <= room.rows:
            return ()
        start = bisect_right(rows, self._last_row, key=_order)
        in_turn = rows[start:] + rows[:start]
        if room.rows:
            self._last_row = in_turn[room.rows - 1].order
        return set(in_turn[room.rows :])

    def _plan_decodes(self, plan: StepPlan, room: Room) -> None:
        block_size, resting = self.blocks.block_size, self._resting(room)
        for sequence in tuple(self._running):
            if sequence.phase is not Phase.RUNNING or _prefills(sequence) or sequence in resting:
                continue
            if sequence.waits_for_mask:
                continue
            if sequence.num_computed % block_size == 0:
                last_band = sequence.priority == LAST_BAND
                while not self.blocks.extend(sequence.key, sequence.num_computed + 1, last_band):
                    victim = self._victim()
                    self._preempt(plan, victim, Preemption.MEMORY)
                    if victim is sequence:
                        break
                if sequence.phase is not Phase.RUNNING:
                    continue
            plan.decodes.append(sequence)
        if plan.preempted:
            plan.decodes = [sequence for sequence in plan.decodes if sequence.phase is Phase.RUNNING]

    def _plan_chunk(self, plan: StepPlan, sequence: Sequence, left: int, room: Room) -> int:
        """Returns how many tokens it got of the `left` ones."""
        if sequence.waits_for_mask:
            return 0
        if sequence.priority == LAST_BAND:
            left = min(left, room.prompt_tokens)
        num_tokens = sequence.remaining
        if sequence.num_computed < sequence.num_prompt:
            # Output that is computed again goes separately: the prompt keeps the shapes that it had the first time.
            num_tokens = sequence.num_prompt - sequence.num_computed
        ends = (end for end in sequence.chunk_ends if end > sequence.num_computed)
        if (end := next(ends, None)) is not None:
            num_tokens = min(num_tokens, end - sequence.num_computed)
        if num_tokens > left:
            end = (sequence.num_computed + left) // self.blocks.block_size * self.blocks.block_size
            num_tokens = max(end - sequence.num_computed, 0)
        if num_tokens:
            plan.chunks.append(Chunk(sequence, num_tokens))
            if sequence.priority == LAST_BAND:
                room.prompt_tokens -= num_tokens
        return num_tokens

    def _admit(self, plan: StepPlan, left: int, now: float, room: Room) -> None:
        if not self._waiting or self._free_slots <= 0:
            return
        pending: dict[BlockHash, tuple[int, int]] | None = None
        dear_slots, reserved = self._dear_slots, self._shares.reserved(now)
        for sequence in self._waiting.in_turn():
            if self._free_slots <= 0 or left <= 0 or sequence in plan.preempted:
                break
            if sequence.has_dear_masks and dear_slots <= 0:
                continue
            if self._free_slots <= reserved and self._shares.is_large(self._slots_of(sequence)):
                continue
            if sequence.priority == LAST_BAND and not room.prompt_tokens and not sequence.wants_import:
                continue
            if pending is None:
                pending = self._pending_blocks()
            if self._waits_for_block(sequence, pending):
                continue
            if not self._take_in(plan, sequence, pending, now):
                break
            dear_slots -= sequence.has_dear_masks
            if sequence.phase is Phase.RUNNING:
                left -= self._plan_chunk(plan, sequence, left, room)

    def _admit_urgent(self, plan: StepPlan, now: float) -> None:
        """Those of an earlier band than somebody running. Who is displaced joins the queue behind them, in a band that
        `in_turn` has not reached."""
        band = self._waiting.first_band
        if band is None or not self._running or band >= self._running[-1].priority:
            return
        pending = self._pending_blocks(before=self._running[-1].priority)
        dear_slots = self._dear_slots
        for sequence in self._waiting.in_turn():
            if not self._running or sequence.priority >= self._running[-1].priority:
                break
            if sequence.has_dear_masks and dear_slots <= 0:
                continue
            if self._waits_for_block(sequence, pending):
                continue
            later = [each for each in reversed(self._running) if each.priority > sequence.priority]
            victims = [each for each in later if _displaceable(each)]
            if not self._make_room(plan, sequence, victims) or not self._take_in(plan, sequence, pending, now):
                break
            dear_slots -= sequence.has_dear_masks

    def _admit_crowded_out(self, plan: StepPlan, now: float) -> None:
        """One of each tenant that has far fewer slots than another, where there is no room left."""
        band = self._waiting.first_band
        if band is None or band == LAST_BAND:
            return
        heads = self._waiting.heads(band)
        if len(heads) == 1 and all(each.request.tenant == heads[0].request.tenant for each in self._running):
            return
        pending: dict[BlockHash, tuple[int, int]] | None = None
        for sequence in heads:
            victims = self._shares.victims(sequence, filter(_displaceable, reversed(self._running)), self._live)
            if not victims or self._fits_without([], sequence) or (sequence.has_dear_masks and self._dear_slots <= 0):
                continue
            pending = self._pending_blocks() if pending is None else pending
            if self._waits_for_block(sequence, pending):
                continue
            before = len(plan.preempted)
            if self._make_room(plan, sequence, victims) and self._take_in(plan, sequence, pending, now):
                self._shares.reserve(len(plan.preempted) - before, now)

    def _make_room(self, plan: StepPlan, sequence: Sequence, victims: list[Sequence]) -> bool:
        """Displaces as few as it takes, the first of `victims` first. False, with nobody displaced, where all of them
        would not be enough."""
        if not self._fits_without(victims, sequence):
            return False
        count = next(count for count in range(len(victims) + 1) if self._fits_without(victims[:count], sequence))
        for victim in victims[:count]:
            victim.displaced += 1
            self._preempt(plan, victim, Preemption.PRIORITY)
        return True

    def _fits_without(self, victims: list[Sequence], sequence: Sequence) -> bool:
        if self._free_slots + len(victims) <= 0:
            return False
        keys = [victim.key for victim in victims]
        spare = self.blocks.spare_blocks(len(sequence.tokens), _usable(sequence), without=keys)
        return spare >= len(self._running) - len(victims)

    def _take_in(
        self, plan: StepPlan, sequence: Sequence, pending: dict[BlockHash, tuple[int, int]], now: float
    ) -> bool:
        """Gives it its blocks. False, with nothing changed, where there are too few."""
        # A few blocks stay for those who decode, or the newcomer would be the next one preempted.
        cached = self.blocks.allocate(
            sequence.key,
            len(sequence.tokens),
            _usable(sequence),
            reserve=len(self._running),
            last_band=sequence.priority == LAST_BAND,
        )
        if cached is None:
            return False
        sequence.num_computed = cached
        if self._shares.reserved(now) and not self._shares.is_large(self._slots_of(sequence)):
            self._shares.reserve(0, now)
        self._waiting.admit(sequence, 0 if sequence.wants_import else sequence.to_compute)
        sequence.published = cached // self.blocks.block_size
        if sequence.first_scheduled is None:
            sequence.first_scheduled = now
            if sequence.report is not None:
                of_prompt = min(cached, sequence.num_prompt)
                sequence.report.cached_tokens = of_prompt
                sequence.report.cached_by_tier = {TierName.DEVICE: of_prompt} if of_prompt else {}
        plan.admitted.append(sequence)
        if sequence.wants_import:
            sequence.phase = Phase.IMPORTING
            self._importing[sequence.key] = sequence
            return True
        if sequence.stored[0] <= cached < sequence.stored[1]:
            sequence.phase = Phase.LOADING
            self._loading[sequence.key] = sequence
        else:
            sequence.phase = Phase.RUNNING
            insort(self._running, sequence, key=_order)
        if self.blocks.caching:
            for block_hash in sequence.chain[sequence.published :]:
                pending.setdefault(block_hash, sequence.order)
        return True

    @property
    def _free_slots(self) -> int:
        return self._max_num_seqs - len(self._running) - len(self._importing) - len(self._loading)

    @property
    def _live(self) -> list[Sequence]:
        """Those that have a slot."""
        return [*self._running, *self._importing.values(), *self._loading.values()]

    def _slots_of(self, sequence: Sequence) -> int:
        """Those that its tenant has in its band."""
        return held_by(sequence.priority, self._live)[sequence.request.tenant]

    @property
    def _dear_slots(self) -> int:
        """Slots that sequences with dear masks may still take: they hold them for long without a step."""
        most = max(1, self._max_num_seqs // DEAR_SHARE)
        return most - sum(each.has_dear_masks for each in self._live)

    def _waits_for_block(self, sequence: Sequence, pending: dict[BlockHash, tuple[int, int]]) -> bool:
        return not sequence.wants_import and self._computed_elsewhere(sequence, _usable(sequence), pending)

    def _computed_elsewhere(
        self, sequence: Sequence, chain: list[BlockHash], pending: dict[BlockHash, tuple[int, int]]
    ) -> bool:
        """Whether the first block that `sequence` misses is being computed, or loaded, by somebody before it."""
        reusable = chain[: (len(sequence.tokens) - 1) // self.blocks.block_size]
        hits = self.blocks.cached_prefix(reusable, len(sequence.tokens))
        return hits < len(reusable) and pending.get(reusable[hits], sequence.order) < sequence.order

    def _pending_blocks(self, before: int = LAST_BAND + 1) -> dict[BlockHash, tuple[int, int]]:
        """Blocks that running and loading prompts of the bands before `before` will publish, with the order of the
        first that will."""
        pending: dict[BlockHash, tuple[int, int]] = {}
        if not self.blocks.caching:
            return pending
        for sequence in (*self._running, *self._loading.values()):
            if sequence.priority < before and _prefills(sequence):
                exact = sequence.inexact_from
                end = len(sequence.chain) if exact is None else exact // self.blocks.block_size
                for block_hash in sequence.chain[sequence.published : end]:
                    pending.setdefault(block_hash, sequence.order)
        return pending

    def _victim(self) -> Sequence:
        """The last in order among those whose blocks nobody else reads or writes."""
        for sequence in reversed(self._running):
            if sequence.request.kv_export is None and not sequence.gated:
                return sequence
        raise IntegrityError("a decode needs a block and there is nobody to preempt")

    def _preempt(self, plan: StepPlan, sequence: Sequence, reason: Preemption) -> None:
        self._running.remove(sequence)
        self.blocks.free(sequence.key)
        sequence.restart()
        sequence.preempted = reason
        self._waiting.add(sequence)
        plan.preempted.append(sequence)
        if sequence in plan.admitted:  # a step may not both give and take
            plan.admitted.remove(sequence)

    def _leave(self, sequence: Sequence) -> None:
        match sequence.phase:
            case Phase.LOOKUP:
                del self._looking_up[sequence.key]
            case Phase.WAITING:
                self._waiting.remove(sequence)
            case Phase.RUNNING:
                self._running.remove(sequence)
            case Phase.IMPORTING:
                del self._importing[sequence.key]
            case Phase.LOADING:
                del self._loading[sequence.key]
            case Phase.HOLDING:
                del self._holding[sequence.key]
            case Phase.FINISHED:
                pass

    # What is going on (readable from any thread: each property copies before it looks)

    @property
    def num_running(self) -> int:
        """Requests with blocks: computed, importing, loading or held for a hand-over."""
        return len(self._running) + len(self._importing) + len(self._loading) + len(self._holding)

    @property
    def num_waiting(self) -> int:
        return len(self._waiting) + len(self._looking_up)

    @property
    def pending_prefill_tokens(self) -> int:
        """Prompt tokens that are to be computed here, as far as known: cache hits of waiting requests unknown."""
        waiting = sum(each.to_compute for each in self._waiting.sequences() if not each.wants_import)
        waiting += sum(sequence.to_compute for sequence in tuple(self._looking_up.values()))
        waiting += sum(sequence.to_compute for sequence in tuple(self._loading.values()))
        return waiting + sum(sequence.remaining for sequence in tuple(self._running) if _prefills(sequence))

    def by_band(self) -> dict[int, int]:
        """Requests by priority: with blocks, and waiting."""
        groups = (self._running, self._importing.values(), self._loading.values(), self._holding.values())
        live = [each for group in groups for each in tuple(group)]
        return Counter(each.priority for each in (*live, *self._waiting.sequences(), *tuple(self._looking_up.values())))

    def decode_load(self) -> tuple[int, int]:
        """Decoding requests, and the tokens whose KV they read in a step."""
        lengths = [sequence.num_computed for sequence in tuple(self._running) if not _prefills(sequence)]
        return len(lengths), sum(lengths)

    def check_integrity(self) -> None:
        """Raises IntegrityError with what is wrong here or in the blocks."""
        self.blocks.check_integrity()
        wrong = self._waiting.problems()
        phases = (
            (Phase.LOOKUP, list(self._looking_up.values())),
            (Phase.WAITING, self._waiting.sequences()),
            (Phase.RUNNING, self._running),
            (Phase.IMPORTING, list(self._importing.values())),
            (Phase.LOADING, list(self._loading.values())),
            (Phase.HOLDING, list(self._holding.values())),
        )
        keys: list[RequestKey] = []
        for phase, sequences in phases:
            for sequence in sequences:
                keys.append(sequence.key)
                if sequence.phase is not phase:
                    wrong.append(f"{sequence.key} is {sequence.phase} among the {phase.value}")
                if sequence.gated and phase is not Phase.RUNNING:
                    wrong.append(f"{sequence.key} is {phase.value} and gated")
                has_blocks = phase not in (Phase.LOOKUP, Phase.WAITING)
                if self.blocks.holds(sequence.key) != has_blocks:
                    wrong.append(f"{sequence.key} is {phase.value} and has blocks: {self.blocks.holds(sequence.key)}")
                elif has_blocks:
                    capacity = len(self.blocks.table(sequence.key)) * self.blocks.block_size
                    if capacity < sequence.num_computed:
                        wrong.append(f"{sequence.key} computed {sequence.num_computed} tokens in {capacity} slots")
                if sequence.published * self.blocks.block_size > sequence.exact_tokens:
                    wrong.append(
                        f"{sequence.key} published more than the {sequence.exact_tokens} tokens that are exact"
                    )
        if len(set(keys)) != len(keys):
            wrong.append("a request is in two phases")
        if self.blocks.num_owners != sum(1 for key in keys if self.blocks.holds(key)):
            wrong.append("blocks are owned by a request that is gone")
        if wrong:
            raise IntegrityError("; ".join(wrong))


def _order(sequence: Sequence) -> tuple[int, int]:
    return sequence.order


def _usable(sequence: Sequence) -> list[BlockHash]:
    """What of its chain may come from the cache."""
    return [] if sequence.computes_all else sequence.chain


def _displaceable(sequence: Sequence) -> bool:
    """Nobody else reads or writes its blocks, and it has not yielded too often."""
    return sequence.request.kv_export is None and not sequence.gated and sequence.displaced < MAX_DISPLACED


def _prefills(sequence: Sequence) -> bool:
    return sequence.num_computed < sequence.num_prompt or len(sequence.tokens) - sequence.num_computed > 1
