"""Turns a step plan into a `ForwardBatch`.

Block tables live in one array with a row per running sequence, written when a sequence is admitted and when it gets
another block; a decode row costs a few integers per step, whatever its context.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from tandem.engine.model.batch import ForwardBatch, PrefillSlice
from tandem.engine.request import Pooling
from tandem.engine.schedule.block_manager import BlockManager
from tandem.engine.schedule.plan import Chunk, StepPlan
from tandem.engine.schedule.sequence import Sequence
from tandem.engine.step.pooling import pooled_rows

Ints = npt.NDArray[np.int64]


class DecodeRows:
    """The decode rows of a batch, kept from step to step, as arrays and as tensors that share their memory.

    While the same sequences decode, a step adds one to each position; only a sequence that enters a new block needs a
    look at its table.
    """

    def __init__(self, sequences: list[Sequence], rows: list[int], blocks: BlockManager, tables: Ints) -> None:
        """`tables` [max_num_seqs, max_blocks]: the block tables of all running sequences; `rows`: those of
        `sequences`."""
        self._sequences = list(sequences)
        self._blocks = blocks
        self._all_tables = tables
        self._rows = np.array(rows, dtype=np.int64)
        self.token_ids = np.array([sequence.last_token for sequence in sequences], dtype=np.int64)
        self._counters = np.empty((3, len(sequences)), dtype=np.int64)
        """All that grows by one per step, in one array."""
        self.positions, self.slots, self.context_lens = self._counters
        self.positions[:] = [sequence.num_computed for sequence in sequences]
        self.context_lens[:] = self.positions + 1
        self.longest = int(self.context_lens.max()) if sequences else 0
        self._enter_blocks()
        self.slots[:] = _slots(tables[self._rows], self.positions, blocks.block_size)
        self._gather()
        logit_rows = np.arange(len(sequences), dtype=np.int64)
        self._views = [
            torch.from_numpy(values)
            for values in (self.token_ids, self.positions, self.slots, self.context_lens, logit_rows)
        ]

    def belong_to(self, sequences: list[Sequence]) -> bool:
        return self._sequences == sequences

    def advance(self) -> None:
        """Each sequence has computed one token, and the next one is chosen."""
        self.token_ids[:] = [sequence.last_token for sequence in self._sequences]
        self._counters += 1
        self.longest += 1
        self._until_boundary -= 1
        if self._until_boundary == 0:
            for index, block in self._enter_blocks():
                self.slots[index] = block * self._blocks.block_size
            self._gather()

    def tensors(self) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
        """token_ids, positions, slots, context_lens, logit_rows, block_tables."""
        tokens, positions, slots, context_lens, logit_rows = self._views
        return tokens, positions, slots, context_lens, logit_rows, self.block_tables

    def _enter_blocks(self) -> list[tuple[int, int]]:
        """Copies the blocks that sequences start to write to into their rows: pairs of index and block."""
        block_size = self._blocks.block_size
        offsets = self.positions % block_size
        self._until_boundary = block_size - int(offsets.max()) if len(offsets) else 0
        """Steps until a sequence enters its next block."""
        entered: list[tuple[int, int]] = []
        for index in np.flatnonzero(offsets == 0).tolist():
            place = int(self.positions[index]) // block_size
            block = self._blocks.table(self._sequences[index].key)[place]
            self._all_tables[self._rows[index], place] = block
            entered.append((index, block))
        return entered

    def _gather(self) -> None:
        width = self._blocks.blocks_for(self.longest)
        self.block_tables = torch.from_numpy(self._all_tables[:, :width][self._rows])


class Runner:
    """Rows of block tables, and the batches made from them. Engine thread only."""

    def __init__(self, blocks: BlockManager, max_num_seqs: int, max_model_len: int, device: torch.device) -> None:
        self._blocks = blocks
        self._device = device
        self._tables: Ints = np.zeros((max_num_seqs, blocks.blocks_for(max_model_len)), dtype=np.int64)
        self._free_rows = list(range(max_num_seqs - 1, -1, -1))
        self._rows: dict[Sequence, int] = {}
        self._decodes = DecodeRows([], [], blocks, self._tables)

    @property
    def free_rows(self) -> int:
        return len(self._free_rows)

    def admit(self, sequence: Sequence) -> int:
        """Gives `sequence` a row, which it returns. There is one for each running sequence."""
        index = self._rows[sequence] = self._free_rows.pop()
        table = self._blocks.table(sequence.key)
        row = self._tables[index]
        row[: len(table)] = table
        row[len(table) :] = 0
        return index

    def release(self, sequence: Sequence) -> None:
        """Takes the row back, if it has one."""
        row = self._rows.pop(sequence, None)
        if row is not None:
            self._free_rows.append(row)

    def holds(self, sequence: Sequence) -> bool:
        """Whether `sequence` has a row."""
        return sequence in self._rows

    def forget_decodes(self) -> None:
        """Not all rows of the last batch that was built were computed and sampled."""
        self._decodes = DecodeRows([], [], self._blocks, self._tables)

    def build(self, plan: StepPlan) -> tuple[ForwardBatch, list[Sequence]]:
        """Returns the batch and the sequences to sample for.

        Its logits come in this order: one row per sequence to sample for, then, for each chunk of a request that
        wants prompt log-probabilities, one row per token of the chunk. Pooled rows follow, in the order of chunks.
        """
        if plan.decodes and self._decodes.belong_to(plan.decodes):
            self._decodes.advance()
        else:
            rows = [self._rows[sequence] for sequence in plan.decodes]
            self._decodes = DecodeRows(plan.decodes, rows, self._blocks, self._tables)
        decodes = self._decodes
        tokens, positions, slots, context_lens, logit_rows, block_tables = decodes.tensors()
        prefills: list[PrefillSlice] = []
        sampled = plan.decodes
        num_pooled = 0
        if plan.chunks:
            tokens, positions, slots, logit_rows, sampled, num_pooled = self._with_chunks(plan, prefills)
        batch = ForwardBatch(
            token_ids=self._on_device(tokens),
            positions=self._on_device(positions),
            slots=self._on_device(slots),
            num_decode=len(plan.decodes),
            block_tables=self._on_device(block_tables),
            context_lens=self._on_device(context_lens),
            max_context_len=decodes.longest,
            prefills=prefills,
            logit_rows=self._on_device(logit_rows),
            num_pooled=num_pooled,
        )
        return batch, sampled

    def _with_chunks(
        self, plan: StepPlan, prefills: list[PrefillSlice]
    ) -> tuple[Tensor, Tensor, Tensor, Tensor, list[Sequence], int]:
        """The rows of the chunks after those of the decodes, their slices into `prefills`."""
        tokens, positions, slots = [self._decodes.token_ids], [self._decodes.positions], [self._decodes.slots]
        sampled = list(plan.decodes)
        last_rows = list(range(len(sampled)))
        scored_rows: list[int] = []
        pooled: list[int] = []
        row = len(sampled)
        for chunk in plan.chunks:
            sequence = chunk.sequence
            where = np.concatenate([np.arange(first, end) for first, end in chunk.tokens])
            table = self._tables[self._rows[sequence], : self._blocks.blocks_for(chunk.end)]
            tokens.extend(np.array(sequence.tokens[first:end], dtype=np.int64) for first, end in chunk.tokens)
            positions.append(where)
            slots.append(_slots(table, where, self._blocks.block_size))
            block_ids = self._on_device(torch.from_numpy(table))
            prefills.append(PrefillSlice(row, len(where), chunk.end, block_ids))
            if sequence.request.pooling is not Pooling.NONE:
                pooled.extend(range(row + len(where) - pooled_rows(chunk), row + len(where)))
            elif samples(chunk):
                sampled.append(sequence)
                last_rows.append(row + len(where) - 1)
            if sequence.scores_prompt:
                scored_rows.extend(range(row, row + len(where)))
            row += len(where)
        joined = (np.concatenate(tokens), np.concatenate(positions), np.concatenate(slots))
        logit_rows = np.array(last_rows + scored_rows + pooled, dtype=np.int64)
        tokens_t, positions_t, slots_t, logit_rows_t = map(torch.from_numpy, (*joined, logit_rows))
        return tokens_t, positions_t, slots_t, logit_rows_t, sampled, len(pooled)

    def _on_device(self, tensor: Tensor) -> Tensor:
        return tensor if self._device.type == "cpu" else tensor.to(self._device, non_blocking=True)


def slots_of(blocks: BlockManager, sequence: Sequence) -> Ints:
    """The pool slot of each known token of `sequence`, which has its blocks: int64 [len(tokens)]."""
    table = np.array(blocks.table(sequence.key), dtype=np.int64)
    return _slots(table, np.arange(len(sequence.tokens)), blocks.block_size)


def samples(chunk: Chunk) -> bool:
    """Whether the chunk reaches the last known token, so that the next one can be chosen."""
    return chunk.num_tokens == chunk.sequence.remaining


def _slots(table: Ints, positions: Ints, block_size: int) -> Ints:
    """Pool slots of `positions` [n] of one table [blocks], or of one position each of n tables [n, blocks]."""
    places, offsets = np.divmod(positions, block_size)
    blocks = table[places] if table.ndim == 1 else table[np.arange(len(places)), places]
    slots: Ints = blocks * block_size + offsets
    return slots
