"""The scheduler's sequences by phase. Part of the scheduler: pure. The engine thread changes it; its counts may be read
from any thread: they copy before they look."""

from __future__ import annotations

from bisect import insort
from collections import Counter

from tandem.common.fairness import ServiceCounters
from tandem.engine.request import Preemption, RequestKey
from tandem.engine.schedule.block_manager import BlockManager, IntegrityError
from tandem.engine.schedule.plan import StepPlan
from tandem.engine.schedule.sequence import Phase, Sequence
from tandem.engine.schedule.slot_shares import held_by
from tandem.engine.schedule.waiting import WaitingQueue

_APART = (Phase.LOOKUP, Phase.IMPORTING, Phase.LOADING, Phase.HOLDING)


class Roster:
    """Every live sequence, in the one phase that it is in."""

    def __init__(self, blocks: BlockManager, max_num_seqs: int) -> None:
        """`max_num_seqs`: slots, one for each that runs, imports or loads."""
        self._blocks = blocks
        self._max_num_seqs = max_num_seqs
        self.waiting = WaitingQueue(ServiceCounters())
        self.running: list[Sequence] = []
        """Sorted by order."""
        self._apart: dict[Phase, dict[RequestKey, Sequence]] = {phase: {} for phase in _APART}
        """Those that neither wait in the queue nor run."""

    def enter(self, sequence: Sequence, phase: Phase) -> None:
        """A sequence that is nowhere else is in `phase` from now on; those that are FINISHED are not kept."""
        sequence.phase = phase
        if phase is Phase.WAITING:
            self.waiting.add(sequence)
        elif phase is Phase.RUNNING:
            insort(self.running, sequence, key=order_of)
        elif phase is not Phase.FINISHED:
            self._apart[phase][sequence.key] = sequence

    def move(self, sequence: Sequence, phase: Phase) -> None:
        """Takes a sequence from the phase in which it is to another."""
        if sequence.phase is Phase.WAITING:
            self.waiting.remove(sequence)
        elif sequence.phase is Phase.RUNNING:
            self.running.remove(sequence)
        elif sequence.phase is not Phase.FINISHED:
            del self._apart[sequence.phase][sequence.key]
        self.enter(sequence, phase)

    def preempt(self, plan: StepPlan, sequence: Sequence, reason: Preemption) -> None:
        """A running sequence loses its blocks and waits again."""
        self._blocks.free(sequence.key)
        self.move(sequence, Phase.WAITING)
        sequence.restart()
        sequence.preempted = reason
        plan.preempted.append(sequence)
        if sequence in plan.admitted:  # a step may not both give and take
            plan.admitted.remove(sequence)

    def victim(self) -> Sequence:
        """The last in order among those whose blocks nobody else reads or writes."""
        for sequence in reversed(self.running):
            if sequence.owns_its_blocks:
                return sequence
        raise IntegrityError("a decode needs a block and there is nobody to preempt")

    @property
    def loading(self) -> list[Sequence]:
        return list(self._apart[Phase.LOADING].values())

    @property
    def looking_up(self) -> list[Sequence]:
        return list(self._apart[Phase.LOOKUP].values())

    @property
    def live(self) -> list[Sequence]:
        """Those that have a slot."""
        return [*self.running, *self._apart[Phase.IMPORTING].values(), *self.loading]

    @property
    def free_slots(self) -> int:
        taken = len(self.running) + len(self._apart[Phase.IMPORTING]) + len(self._apart[Phase.LOADING])
        return self._max_num_seqs - taken

    def slots_of(self, sequence: Sequence) -> int:
        """Slots that its tenant has in its band."""
        return held_by(sequence.priority, self.live)[sequence.request.tenant]

    @property
    def num_running(self) -> int:
        """Requests with blocks: computed, importing, loading or held for a hand-over."""
        return len(self.running) + sum(len(self._apart[phase]) for phase in _APART if phase is not Phase.LOOKUP)

    @property
    def num_waiting(self) -> int:
        return len(self.waiting) + len(self._apart[Phase.LOOKUP])

    @property
    def pending_prefill_tokens(self) -> int:
        """Prompt tokens that are to be computed here, as far as known: cache hits of waiting requests unknown."""
        pending = sum(each.to_compute for each in self.waiting.sequences() if not each.wants_import)
        pending += sum(each.to_compute for each in (*self.looking_up, *self.loading))
        return pending + sum(each.remaining for each in tuple(self.running) if each.prefills)

    def by_band(self) -> Counter[int]:
        """Requests by priority: with blocks, and waiting."""
        apart = [each for phase in _APART for each in tuple(self._apart[phase].values())]
        return Counter(each.priority for each in (*tuple(self.running), *apart, *self.waiting.sequences()))

    def decode_load(self) -> tuple[int, int]:
        """Decoding requests, and the tokens whose KV they read in a step."""
        lengths = [sequence.num_computed for sequence in tuple(self.running) if not sequence.prefills]
        return len(lengths), sum(lengths)

    def problems(self) -> list[str]:
        """What `check_integrity` has to say."""
        wrong = self.waiting.problems()
        phases = [(phase, list(self._apart[phase].values())) for phase in _APART]
        phases += [(Phase.WAITING, self.waiting.sequences()), (Phase.RUNNING, self.running)]
        for phase, sequences in phases:
            for sequence in sequences:
                wrong += self._problems_of(sequence, phase)
        keys = [sequence.key for _, sequences in phases for sequence in sequences]
        if len(set(keys)) != len(keys):
            wrong.append("a request is in two phases")
        if self._blocks.num_owners != sum(1 for key in keys if self._blocks.holds(key)):
            wrong.append("blocks are owned by a request that is gone")
        return wrong

    def _problems_of(self, sequence: Sequence, phase: Phase) -> list[str]:
        """Wrong things about one that is kept as being in `phase`."""
        wrong: list[str] = []
        if sequence.phase is not phase:
            wrong.append(f"{sequence.key} is {sequence.phase} among the {phase.value}")
        if sequence.gated and phase is not Phase.RUNNING:
            wrong.append(f"{sequence.key} is {phase.value} and gated")
        has_blocks = phase not in (Phase.LOOKUP, Phase.WAITING)
        if self._blocks.holds(sequence.key) != has_blocks:
            wrong.append(f"{sequence.key} is {phase.value} and has blocks: {self._blocks.holds(sequence.key)}")
        elif has_blocks:
            capacity = len(self._blocks.table(sequence.key)) * self._blocks.block_size
            if capacity < (there := sequence.there).end:
                wrong.append(f"{sequence.key} has KV of tokens {there.parts} in {capacity} slots")
        if sequence.ahead.within(0, sequence.num_computed + 1) or sequence.ahead.end >= len(sequence.tokens):
            wrong.append(f"{sequence.key}: tokens {sequence.ahead.parts} are behind {sequence.num_computed}")
        if sequence.published * self._blocks.block_size > sequence.exact_tokens:
            wrong.append(f"{sequence.key} published more than the {sequence.exact_tokens} tokens that are exact")
        return wrong


def order_of(sequence: Sequence) -> tuple[int, int]:
    return sequence.order
