"""Who of those that wait gets blocks. Part of the scheduler (rules 3, 4 and 6 there): pure, engine thread."""

from __future__ import annotations

from tandem.common.fairness import LAST_BAND
from tandem.engine.request import Preemption
from tandem.engine.schedule.block_manager import BlockManager
from tandem.engine.schedule.last_band import Room
from tandem.engine.schedule.plan import StepPlan
from tandem.engine.schedule.ranges import TokenRanges
from tandem.engine.schedule.roster import Roster
from tandem.engine.schedule.sequence import Phase, Sequence
from tandem.engine.schedule.slot_shares import SlotShares
from tandem.kvstore.identity import BlockHash
from tandem.kvstore.interfaces import TierName

MAX_DISPLACED = 3
"""Times that a request is preempted for others: each time costs its recompute."""
DEAR_SHARE = 4
"""One slot in so many is for sequences whose masks take long."""

Pending = dict[BlockHash, tuple[int, int]]
"""Blocks that will be published, with the order of the first sequence that will."""


class Admission:
    """Gives blocks and slots to sequences that wait, in their turn."""

    def __init__(self, blocks: BlockManager, roster: Roster, max_num_seqs: int) -> None:
        self._blocks = blocks
        self._roster = roster
        self._shares = SlotShares(max_num_seqs)
        self._most_dear = max(1, max_num_seqs // DEAR_SHARE)

    def admit(self, plan: StepPlan, left: int, now: float, room: Room) -> None:
        """Those whose turn it is, while slots, blocks and `left` tokens of the step last. `room` is the last band's."""
        if not self._roster.waiting or self._roster.free_slots <= 0:
            return
        pending: Pending | None = None
        dear_slots, reserved = self._dear_slots, self._shares.reserved(now)
        for sequence in self._roster.waiting.in_turn():
            if self._roster.free_slots <= 0 or left <= 0 or sequence in plan.preempted:
                break
            plan.looked_at = sequence
            if sequence.has_dear_masks and dear_slots <= 0:
                continue
            if self._roster.free_slots <= reserved and self._shares.is_large(self._roster.slots_of(sequence)):
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
                left -= plan.add_chunk(sequence, left, room, self._blocks.block_size)

    def admit_urgent(self, plan: StepPlan, now: float) -> None:
        """Those of an earlier band than somebody running. Who is displaced joins the queue behind them, in a band that
        `in_turn` has not reached."""
        band = self._roster.waiting.first_band
        if band is None or not self._roster.running or band >= self._roster.running[-1].priority:
            return
        pending = self._pending_blocks(before=self._roster.running[-1].priority)
        dear_slots = self._dear_slots
        for sequence in self._roster.waiting.in_turn():
            if not self._roster.running or sequence.priority >= self._roster.running[-1].priority:
                break
            plan.looked_at = sequence
            if sequence.has_dear_masks and dear_slots <= 0:
                continue
            if self._waits_for_block(sequence, pending):
                continue
            later = [each for each in reversed(self._roster.running) if each.priority > sequence.priority]
            victims = [each for each in later if _displaceable(each)]
            if not self._make_room(plan, sequence, victims) or not self._take_in(plan, sequence, pending, now):
                break
            dear_slots -= sequence.has_dear_masks

    def admit_crowded_out(self, plan: StepPlan, now: float) -> None:
        """One of each tenant that has far fewer slots than another, where there is no room left."""
        band = self._roster.waiting.first_band
        if band is None or band == LAST_BAND:
            return
        heads = self._roster.waiting.heads(band)
        if len(heads) == 1 and all(each.request.tenant == heads[0].request.tenant for each in self._roster.running):
            return
        pending: Pending | None = None
        for sequence in heads:
            plan.looked_at = sequence
            displaceable = filter(_displaceable, reversed(self._roster.running))
            victims = self._shares.victims(sequence, displaceable, self._roster.live)
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
            self._roster.preempt(plan, victim, Preemption.PRIORITY)
        return True

    def _fits_without(self, victims: list[Sequence], sequence: Sequence) -> bool:
        if self._roster.free_slots + len(victims) <= 0:
            return False
        keys = [victim.key for victim in victims]
        spare = self._blocks.spare_blocks(len(sequence.tokens), sequence.usable_chain, without=keys)
        return spare >= len(self._roster.running) - len(victims)

    def _take_in(self, plan: StepPlan, sequence: Sequence, pending: Pending, now: float) -> bool:
        """Gives it its blocks. False, with nothing changed, where there are too few."""
        # A few blocks stay for those who decode, or the newcomer would be the next one preempted.
        cached = self._blocks.allocate(
            sequence.key,
            len(sequence.tokens),
            sequence.usable_chain,
            reserve=len(self._roster.running),
            last_band=sequence.priority == LAST_BAND,
        )
        if cached is None:
            return False
        sequence.there = TokenRanges.up_to(cached)
        if self._shares.reserved(now) and not self._shares.is_large(self._roster.slots_of(sequence)):
            self._shares.reserve(0, now)
        self._roster.waiting.admit(sequence, 0 if sequence.wants_import else sequence.to_compute)
        sequence.published = cached // self._blocks.block_size
        if sequence.first_scheduled is None:
            sequence.first_scheduled = now
            if sequence.report is not None:
                of_prompt = min(cached, sequence.num_prompt)
                sequence.report.cached_tokens = of_prompt
                sequence.report.cached_by_tier = {TierName.DEVICE: of_prompt} if of_prompt else {}
        plan.admitted.append(sequence)
        if sequence.wants_import:
            self._roster.enter(sequence, Phase.IMPORTING)
            return True
        loads = bool(sequence.stored.within(cached, sequence.stored.end))
        self._roster.enter(sequence, Phase.LOADING if loads else Phase.RUNNING)
        if self._blocks.caching:
            for block_hash in sequence.chain[sequence.published :]:
                pending.setdefault(block_hash, sequence.order)
        return True

    @property
    def _dear_slots(self) -> int:
        """Slots that sequences with dear masks may still take: they hold them for long without a step."""
        return self._most_dear - sum(each.has_dear_masks for each in self._roster.live)

    def _waits_for_block(self, sequence: Sequence, pending: Pending) -> bool:
        return not sequence.wants_import and self._computed_elsewhere(sequence, sequence.usable_chain, pending)

    def _computed_elsewhere(self, sequence: Sequence, chain: list[BlockHash], pending: Pending) -> bool:
        """Whether the first block that `sequence` misses is being computed, or loaded, by somebody before it."""
        reusable = chain[: (len(sequence.tokens) - 1) // self._blocks.block_size]
        hits = self._blocks.cached_prefix(reusable, len(sequence.tokens))
        return hits < len(reusable) and pending.get(reusable[hits], sequence.order) < sequence.order

    def _pending_blocks(self, before: int = LAST_BAND + 1) -> Pending:
        """Blocks that running and loading prompts of the bands before `before` will publish, with the order of the
        first that will."""
        pending: Pending = {}
        if not self._blocks.caching:
            return pending
        for sequence in (*self._roster.running, *self._roster.loading):
            if sequence.priority < before and sequence.prefills:
                exact = sequence.inexact_from
                end = len(sequence.chain) if exact is None else exact // self._blocks.block_size
                for block_hash in sequence.chain[sequence.published : end]:
                    pending.setdefault(block_hash, sequence.order)
        return pending


def _displaceable(sequence: Sequence) -> bool:
    """Nobody else reads or writes its blocks, and it has not yielded too often."""
    return sequence.owns_its_blocks and sequence.displaced < MAX_DISPLACED
