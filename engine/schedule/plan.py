"""What one step computes: the scheduler's decision, which the engine carries out."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, field

from tandem.common.fairness import LAST_BAND
from tandem.engine.schedule.last_band import Room
from tandem.engine.schedule.ranges import TokenRanges
from tandem.engine.schedule.sequence import Sequence


@dataclass(frozen=True, slots=True)
class Chunk:
    """The next tokens of a sequence's prompt, or of what a preemption lost, that have no KV."""

    sequence: Sequence
    tokens: TokenRanges
    """Not empty; what lies between them has KV."""

    @property
    def num_tokens(self) -> int:
        return self.tokens.count

    @property
    def end(self) -> int:
        """Position of the last row plus one."""
        return self.tokens.end


@dataclass(slots=True)
class StepPlan:
    """One step: `decodes` get one token each, `chunks` are pieces of prompts."""

    decodes: list[Sequence] = field(default_factory=list)
    chunks: list[Chunk] = field(default_factory=list)
    admitted: list[Sequence] = field(default_factory=list)
    """Got their blocks in this step: RUNNING, IMPORTING or LOADING, cached tokens in `num_computed`."""
    preempted: list[Sequence] = field(default_factory=list)
    looked_at: Sequence | None = None
    """What the scheduler was deciding about last: if that raises, it is to blame."""

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

    def add_chunk(self, sequence: Sequence, left: int, room: Room, block_size: int) -> int:
        """Plans the next chunk of `sequence`, of `left` tokens at most. Returns how many it got: none where it waits
        for its mask, or where what is left does not reach the end of a block."""
        self.looked_at = sequence
        if sequence.waits_for_mask:
            return 0
        last_band = sequence.priority == LAST_BAND
        tokens = next_tokens(sequence, min(left, room.prompt_tokens) if last_band else left, block_size)
        if tokens:
            self.chunks.append(Chunk(sequence, tokens))
            if last_band:
                room.prompt_tokens -= tokens.count
        return tokens.count


def next_tokens(sequence: Sequence, left: int, block_size: int) -> TokenRanges:
    """The first tokens of `sequence` that have no KV: `left` at most, to the end of a block where they are not all."""
    start = sequence.num_computed
    # Output that is computed again goes separately: the prompt keeps the shapes that it had the first time.
    end = sequence.num_prompt if start < sequence.num_prompt else len(sequence.tokens)
    end = min(end, next((end for end in sequence.chunk_ends if end > start), end))
    tokens = sequence.ahead.gaps(start, end)
    if tokens.count > left:
        tokens = tokens.leading(left)
        tokens = tokens.within(start, tokens.end // block_size * block_size)
    return tokens
