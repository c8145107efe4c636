"""The attention backend of the CPU where there are native kernels (`native.c`): pages are read where they lie.

**Row invariance.** A row's result has the same bits whatever the other rows, the padding, the chunk of the prompt it is
computed in, the place of its blocks, and whether it is decoded or part of a prompt, on any processor: one kernel
computes all rows, takes keys in tiles counted from the first of the request, and adds in one order.
"""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import torch
from torch import Tensor

from tandem.engine.model.batch import ForwardBatch, KvPool
from tandem.engine.model.native import NativeKernels

_WORK_OF_A_THREAD = 1 << 18
"""Query rows times keys times KV heads worth waking a thread for: about 0.2 ms."""


class NativeAttention:
    """`AttentionBackend` of one model. Computes with as many threads as torch had when it was made."""

    row_invariant_by_construction = True

    def __init__(self, sliding_windows: tuple[int | None, ...], kernels: NativeKernels) -> None:
        self._windows = sliding_windows
        self._kernels = kernels
        self._batch: ForwardBatch | None = None
        self._slices = torch.empty(0)
        self._parts = 1
        self._most_parts = torch.get_num_threads()
        self._threads = ThreadPoolExecutor(self._most_parts, "attention")

    def attend(self, layer: int, q: Tensor, batch: ForwardBatch, pool: KvPool) -> Tensor:
        """See `AttentionBackend`."""
        if batch is not self._batch:
            self._batch = batch
            self._slices = _slices(batch)
            self._parts = max(1, min(self._most_parts, _work(batch) * pool.num_kv_heads // _WORK_OF_A_THREAD))
        out = torch.empty(q.shape[0], q.shape[1] * q.shape[2], dtype=q.dtype)
        work = (self._slices, batch.positions, q, layer, self._windows[layer], pool, out)
        others = [
            self._threads.submit(self._kernels.attend, *work, part, self._parts) for part in range(1, self._parts)
        ]
        self._kernels.attend(*work, 0, self._parts)
        for other in others:
            other.result()
        return out


def _slices(batch: ForwardBatch) -> Tensor:
    """The batch's slices as `NativeKernels.attend` takes them. They point into the batch."""
    if not batch.block_tables.is_contiguous():
        raise ValueError("block tables must be dense")
    decodes, tables = batch.num_decode, batch.block_tables
    rows = torch.arange(decodes)
    addresses = rows * (tables.shape[1] * tables.itemsize) + tables.data_ptr()
    slices = torch.stack((rows, torch.ones_like(rows), addresses), dim=1)
    if not batch.prefills:
        return slices
    if not all(piece.block_ids.is_contiguous() for piece in batch.prefills):
        raise ValueError("block ids must be dense")
    prompts = [[piece.row, piece.num_tokens, piece.block_ids.data_ptr()] for piece in batch.prefills]
    return torch.cat((slices, torch.tensor(prompts)))


def _work(batch: ForwardBatch) -> int:
    """Query rows times keys, about."""
    return batch.num_decode * batch.max_context_len + sum(piece.num_tokens * piece.end for piece in batch.prefills)
