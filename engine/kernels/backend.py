"""The attention backend of GPUs: a step's ForwardBatch as arguments of the Triton kernels. Chosen by
`engine/loader.py`.
"""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import dataclass

import torch
from torch import Tensor

from tandem.engine.batch import ForwardBatch, KvPool, PrefillSlice
from tandem.engine.kernels.paged_decode import paged_decode
from tandem.engine.kernels.paged_prefill import paged_prefill


@dataclass(frozen=True, slots=True)
class _PrefillArguments:
    block_tables: Tensor
    """int64 [sum of blocks]"""
    slices: Tensor
    """int32 [S, 4]: row, tokens, context, start in block_tables."""
    max_tokens: int


class TritonAttention:
    """`AttentionBackend` over the paged kernels: one launch for the decode rows and one for all prefill slices.

    A step's arguments are made at its first layer and kept until the next step: a batch must not change while in use.
    """

    row_invariant_by_construction = False

    def __init__(self, sliding_windows: tuple[int | None, ...]) -> None:
        self.sliding_windows = sliding_windows
        self._batch: ForwardBatch | None = None
        self._prefill: _PrefillArguments | None = None

    def attend(self, layer: int, q: Tensor, batch: ForwardBatch, pool: KvPool) -> Tensor:
        """q [N, heads, head_dim] -> [N, heads * head_dim], of the pool's dtype. See `AttentionBackend`."""
        if batch is not self._batch:
            self._prefill = _prefill_arguments(batch.prefills, q.device) if batch.prefills else None
            self._batch = batch
        k, v = pool.k[layer], pool.v[layer]
        scale = q.shape[-1] ** -0.5
        window = self.sliding_windows[layer]
        out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
        decode, prefill = batch.num_decode, self._prefill
        # Triton launches on the current device, whatever its arguments are on.
        with torch.cuda.device(q.device) if q.is_cuda else nullcontext():
            if decode:
                paged_decode(
                    q[:decode],
                    k,
                    v,
                    batch.block_tables,
                    batch.context_lens,
                    max_context_len=batch.max_context_len,
                    scale=scale,
                    window=window,
                    out=out[:decode],
                )
            if prefill is not None:
                paged_prefill(
                    q,
                    k,
                    v,
                    prefill.block_tables,
                    prefill.slices,
                    max_tokens=prefill.max_tokens,
                    scale=scale,
                    window=window,
                    out=out,
                )
        return out.flatten(1)


def _prefill_arguments(prefills: list[PrefillSlice], device: torch.device) -> _PrefillArguments:
    rows: list[tuple[int, int, int, int]] = []
    start = 0
    for piece in prefills:
        rows.append((piece.row, piece.num_tokens, piece.context_len, start))
        start += piece.block_ids.numel()
    # Pinned, so that the copy does not wait for the work already on the stream.
    slices = torch.tensor(rows, dtype=torch.int32, pin_memory=device.type == "cuda").to(device, non_blocking=True)
    blocks = prefills[0].block_ids if len(prefills) == 1 else torch.cat([piece.block_ids for piece in prefills])
    return _PrefillArguments(blocks.to(device), slices, max(piece.num_tokens for piece in prefills))
