"""What is computed in the next step: one queue, one token budget (the idea of vLLM v1's scheduler, at a small size).

Pure policy: no tensors, no clock, no randomness. The engine passes the time in and carries the plan out.

Rules, in order:

1. Every decoding request gets its one token, except that a tenant with many rows takes turns with them while another
   has few and a step's time grows with its rows (`row_shares.py`). Where a block is missing, the request that is last
   in order (highest priority value, then latest arrival) is preempted: its blocks go back, its output is kept and
   computed again.
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
from bisect import bisect_left
from collections.abc import Callable

from tandem.common.errors import TandemError
from tandem.common.fairness import LAST_BAND
from tandem.engine.request import Preemption
from tandem.engine.schedule.admission import Admission
from tandem.engine.schedule.block_manager import BlockManager, IntegrityError
from tandem.engine.schedule.last_band import PROMPT_TOKENS, ROWS, LastBand, Room
from tandem.engine.schedule.plan import Chunk, StepPlan
from tandem.engine.schedule.ranges import TokenRanges
from tandem.engine.schedule.roster import Roster, order_of
from tandem.engine.schedule.row_shares import RowShares, turns
from tandem.engine.schedule.sequence import Phase, Sequence
from tandem.kvstore.identity import extend_chain


class Scheduler:
    """Plans steps and keeps every sequence's phase. Engine thread only, except for the counts that status reads."""

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
        self._row_shares = RowShares()
        self._last_band = LastBand()
        self._last_row = (LAST_BAND, -1)
        """The order of the last band's row that was decoded last: those behind it are next."""
        self.plan = StepPlan()
        """The last one."""
        self.on_full_blocks: Callable[[Sequence], None] | None = None
        """Called where blocks of a sequence have become full and computed in all layers."""
        self.roster = Roster(blocks, max_num_seqs)
        self._admission = Admission(blocks, self.roster, max_num_seqs)
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
        self.roster.enter(sequence, Phase.LOOKUP if look_up else Phase.WAITING)
        if sequence.deadline is not None:
            heapq.heappush(self._deadlines, (sequence.deadline, sequence.arrival, sequence))

    def looked_up(self, sequence: Sequence) -> None:
        """The store has answered (`Sequence.stored`) or was too slow: `sequence` waits where it would have waited."""
        self.roster.move(sequence, Phase.WAITING)

    def finish(self, sequence: Sequence) -> None:
        """Ends `sequence` in whatever phase it is, and takes its blocks back."""
        self.roster.move(sequence, Phase.FINISHED)
        if self.blocks.holds(sequence.key):
            self.blocks.free(sequence.key)

    def hold(self, sequence: Sequence) -> None:
        """Takes `sequence` out of the steps; its blocks stay until `finish`."""
        self.roster.move(sequence, Phase.HOLDING)

    def join(
        self, sequence: Sequence, there: TokenRanges, gated: bool = False, inexact_from: int | None = None
    ) -> None:
        """An import or loading ended: the tokens `there` of `sequence` are in its blocks, the rest is computed here.

        `gated`: the last layers of these tokens are still on their way. Such a sequence is not preempted.
        `inexact_from`: the first of them that is not exact.
        """
        sequence.wants_import = False
        sequence.gated = gated
        sequence.there = there
        sequence.inexact_from = inexact_from
        self.roster.move(sequence, Phase.RUNNING)

    def suspend(self, sequence: Sequence, there: TokenRanges) -> None:
        """A gated sequence waits outside the steps again: only the tokens `there` are certainly in its blocks, those
        that were there before its loading."""
        sequence.gated = False
        sequence.there = there
        sequence.inexact_from = None
        self.roster.move(sequence, Phase.LOADING)

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
        """The next step; `now` (s) becomes the time at which sequences were first scheduled. What raises is a bug; what
        was decided until then is in `plan`."""
        plan = self.plan = StepPlan()
        self._admission.admit_urgent(plan, now)
        self._admission.admit_crowded_out(plan, now)
        displaced = len(plan.preempted)
        plan.looked_at = None
        room = self._room_of_last_band(now)
        self._plan_decodes(plan, room)
        left = self._budget - len(plan.decodes)
        if plan.decodes and plan.decodes[0].priority < LAST_BAND:
            left = min(left, self._beside_decodes)
        for sequence in self.roster.running:
            if left <= 0:
                break
            if sequence.prefills:
                left -= plan.add_chunk(sequence, left, room, self.blocks.block_size)
        if len(plan.preempted) == displaced:
            self._admission.admit(plan, left, now, room)
        plan.looked_at = None
        return plan

    def computed(self, plan: StepPlan) -> list[tuple[Sequence, Exception]]:
        """All layers of the planned tokens are in the pool: advances, and publishes the blocks that became full.
        Returns those for which this raised."""
        broken: list[tuple[Sequence, Exception]] = []
        for sequence in plan.decodes:
            try:
                self._decoded(sequence)
            except Exception as error:
                broken.append((sequence, error))
        for chunk in plan.chunks:
            try:
                self._prefilled(chunk)
            except Exception as error:
                broken.append((chunk.sequence, error))
        return broken

    def _decoded(self, sequence: Sequence) -> None:
        sequence.num_computed += 1
        if sequence.account is not None:
            sequence.account.charge(sequence.output_cost)
        if sequence.num_computed % self.blocks.block_size == 0:
            self.publish(sequence)

    def _prefilled(self, chunk: Chunk) -> None:
        sequence = chunk.sequence
        sequence.computed_to(chunk.end)
        if sequence.num_output and not sequence.remaining and sequence.account is not None:
            sequence.account.charge(sequence.output_cost)  # it goes on with its next token
        if chunk.end <= sequence.num_prompt and (not sequence.chunk_ends or sequence.chunk_ends[-1] < chunk.end):
            sequence.chunk_ends.append(chunk.end)
        self.publish(sequence)

    def took(self, plan: StepPlan, seconds: float) -> None:
        """The step of `plan` is over: what the last band had of it is on its account, and what rows cost is known."""
        if plan.decodes and not plan.chunks:
            self._row_shares.took(len(plan.decodes), seconds)
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
        bands, running = self.roster.waiting.bands, self.roster.running
        live = (*self.roster.live, *self.roster.looking_up)
        if LAST_BAND not in bands and not any(each.priority == LAST_BAND for each in live):
            self._last_band.has_no_work()
            return Room(0, 0)
        earlier = [each for each in live if each.priority < LAST_BAND]
        waits = any(band < LAST_BAND for band in bands)
        if not earlier and (not waits or running):  # who still waits does so for what those running hold
            self._last_band.is_alone(now)
            exports = any(each.pinned for each in running)
            return Room(self._max_num_seqs, self._piece_tokens if exports else self._beside_decodes)
        waits = waits or any(each.phase is not Phase.RUNNING or each.prefills for each in earlier)
        return Room(ROWS, self._piece_tokens) if self._last_band.is_due(now, waits) else Room(0, 0)

    def _resting(self, room: Room) -> set[Sequence]:
        """Decodes that are not in this step: what a tenant has beyond its share, and all of the last band's but
        `room.rows`, which take turns."""
        running = self.roster.running
        resting = self._row_shares.resting(running)
        first = bisect_left(running, (LAST_BAND, -1), key=order_of)
        rows = [each for each in running[first:] if not each.prefills]
        if len(rows) <= room.rows:
            return resting
        in_turn = turns(rows, self._last_row)
        if room.rows:
            self._last_row = in_turn[room.rows - 1].order
        return resting.union(in_turn[room.rows :])

    def _plan_decodes(self, plan: StepPlan, room: Room) -> None:
        block_size, resting = self.blocks.block_size, self._resting(room)
        for sequence in tuple(self.roster.running):
            if sequence.phase is not Phase.RUNNING or sequence.prefills or sequence in resting:
                continue
            if sequence.waits_for_mask:
                continue
            plan.looked_at = sequence
            if sequence.num_computed % block_size == 0:
                last_band = sequence.priority == LAST_BAND
                while not self.blocks.extend(sequence.key, sequence.num_computed + 1, last_band):
                    victim = self.roster.victim()
                    self.roster.preempt(plan, victim, Preemption.MEMORY)
                    if victim is sequence:
                        break
                if sequence.phase is not Phase.RUNNING:
                    continue
            plan.decodes.append(sequence)
        if plan.preempted:
            plan.decodes = [sequence for sequence in plan.decodes if sequence.phase is Phase.RUNNING]

    # What is going on (from any thread; see `Roster`)

    @property
    def num_running(self) -> int:
        return self.roster.num_running

    @property
    def num_waiting(self) -> int:
        return self.roster.num_waiting

    @property
    def pending_prefill_tokens(self) -> int:
        return self.roster.pending_prefill_tokens

    def by_band(self) -> dict[int, int]:
        return self.roster.by_band()

    def decode_load(self) -> tuple[int, int]:
        return self.roster.decode_load()

    def check_integrity(self) -> None:
        """Raises IntegrityError with what is wrong here or in the blocks."""
        self.blocks.check_integrity()
        if wrong := self.roster.problems():
            raise IntegrityError("; ".join(wrong))
