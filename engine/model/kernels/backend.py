"""The attention backend of GPUs: a step's ForwardBatch as arguments of the Triton kernels. Chosen by
`engine/model/loader.py`.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from tandem.engine.model.batch import ForwardBatch, KvPool
from tandem.engine.model.kernels.paged_decode import paged_decode
from tandem.engine.model.kernels.paged_prefill import paged_prefill
from tandem.engine.model.kernels.tiles import on_device


@dataclass(frozen=True, slots=True)
class _PrefillArguments:
    block_tables: Tensor
    """int64 [sum of blocks]"""
    slices: Tensor
    """int32 [S, 3]: row, tokens, start in block_tables."""
    max_tokens: int


class TritonAttention:
    """`AttentionBackend` over the paged kernels: one launch for the decode rows and one for all prefill slices.

    A step's arguments are made at its first layer and kept until the next step: a batch must not change while in use.
    """

    def __init__(self, sliding_windows: tuple[int | None, ...], *, batch_invariant: bool = False) -> None:
        """`batch_invariant`: a decode row has the same bits as the same row of a prompt, and a row of a prompt the same
        in any chunk. Decode rows are then slices of one token: their keys are not split."""
        self.sliding_windows = sliding_windows
        self.row_invariant_by_construction = batch_invariant
        self._batch: ForwardBatch | None = None
        self._decodes = 0
        """Rows for the decode kernel."""
        self._prefill: _PrefillArguments | None = None

    def attend(self, layer: int, q: Tensor, batch: ForwardBatch, pool: KvPool) -> Tensor:
        """q [N, heads, head_dim] -> [N, heads * head_dim], of the pool's dtype. See `AttentionBackend`."""
        if batch is not self._batch:
            self._decodes = 0 if self.row_invariant_by_construction else batch.num_decode
            self._prefill = _prefill_arguments(batch, self.row_invariant_by_construction, q.device)
            self._batch = batch
        k, v = pool.k[layer], pool.v[layer]
        scale = q.shape[-1] ** -0.5
        window = self.sliding_windows[layer]
        out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
        decode, prefill = self._decodes, self._prefill
        with on_device(q):
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
                    batch.positions,
                    max_tokens=prefill.max_tokens,
                    scale=scale,
                    window=window,
                    out=out,
                    always_masked=self.row_invariant_by_construction,
                )
        return out.flatten(1)


def _prefill_arguments(batch: ForwardBatch, with_decodes: bool, device: torch.device) -> _PrefillArguments | None:
    """None where there is no slice."""
    rows: list[tuple[int, int, int]] = []
    tables = [piece.block_ids for piece in batch.prefills]
    start = 0
    for piece in batch.prefills:
        rows.append((piece.row, piece.num_tokens, start))
        start += piece.block_ids.numel()
    # Pinned, so that the copy does not wait for the work already on the stream.
    slices = torch.tensor(rows, dtype=torch.int32, pin_memory=device.type == "cuda").view(-1, 3)
    slices = slices.to(device, non_blocking=True)
    longest = max((piece.num_tokens for piece in batch.prefills), default=0)
    if with_decodes and batch.num_decode:
        decodes, width = torch.arange(batch.num_decode, device=device), batch.block_tables.shape[1]
        one = torch.ones_like(decodes)
        ours = torch.stack((decodes, one, start + decodes * width), dim=1)
        slices = torch.cat((slices, ours.to(torch.int32)))
        tables.append(batch.block_tables.flatten())
        longest = max(longest, 1)
    if not tables:
        return None
    return _PrefillArguments((tables[0] if len(tables) == 1 else torch.cat(tables)).to(device), slices, longest)
