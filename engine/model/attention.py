"""Attention as one primitive: attend to a segment of keys, then merge the parts by log-sum-exp (DESIGN 7).

`partial_attention` and `merge` are slow, obvious and in float32. Everything faster is tested against them: the CPU
backend (`cpu_attention.py`) and the Triton kernels (`kernels/`).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor

from tandem.engine.model.batch import ForwardBatch, KvPool


class AttentionBackend(Protocol):
    """Made with the sliding window of each layer; used by the decoder once per layer and step."""

    row_invariant_by_construction: bool
    """Whether the kernels themselves see to it, on any processor, that a row's result has the same bits whatever the
    other rows, the chunks of the prompt and the place of its blocks, and decoded as in a prompt."""

    def attend(self, layer: int, q: Tensor, batch: ForwardBatch, pool: KvPool) -> Tensor:
        """Attention of the rows q [N, num_heads, head_dim] to the KV of their requests in `pool`, where the rows' own
        K and V are already written. The softmax scale is head_dim ** -0.5. Returns [N, num_heads * head_dim].

        What a step's layers share is made at its first layer: a batch must not change while it is in use.
        """


def visible_keys(query_positions: Tensor, key_positions: Tensor, window: int | None) -> Tensor:
    """bool [M, T]: key position <= query position, and > query position - window with a sliding window."""
    query, key = query_positions.unsqueeze(1), key_positions.unsqueeze(0)
    visible = key <= query
    return visible if window is None else visible & (key > query - window)


def partial_attention(q: Tensor, k: Tensor, v: Tensor, visible: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Attention to one segment of keys.

    q [M, num_heads, D]; k, v [T, num_kv_heads, D]; `visible` bool [M, T], None: all. Returns o float32
    [M, num_heads, D] and the log-sum-exp of the scaled scores, float32 [M, num_heads]. A row that sees no key has
    o = 0 and lse = -inf.
    """
    group = q.shape[1] // k.shape[1]
    keys, values = (x.float().repeat_interleave(group, dim=1) for x in (k, v))
    scores = torch.einsum("mhd,thd->mht", q.float(), keys) * q.shape[-1] ** -0.5
    if visible is not None:
        scores = scores.masked_fill(~visible.unsqueeze(1), -torch.inf)
    lse = scores.logsumexp(dim=-1)
    weights = (scores - lse.unsqueeze(-1)).exp().nan_to_num(0.0)
    return torch.einsum("mht,thd->mhd", weights, values), lse


def merge(parts: Sequence[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
    """Attention to the union of disjoint segments from each one's (o, lse), in any order (FlashDecoding, Dao 2023)."""
    outputs, sums = (torch.stack(list(tensors)) for tensors in zip(*parts, strict=True))
    lse = sums.logsumexp(dim=0)
    weights = (sums - lse).exp().nan_to_num(0.0)
    return (outputs * weights.unsqueeze(-1)).sum(dim=0), lse


class ReferenceAttention:
    """`AttentionBackend` by `partial_attention`, one request at a time, on any device."""

    row_invariant_by_construction = False

    def __init__(self, sliding_windows: tuple[int | None, ...]) -> None:
        self._windows = sliding_windows

    def attend(self, layer: int, q: Tensor, batch: ForwardBatch, pool: KvPool) -> Tensor:
        """Attention of one layer, a row at a time or a slice at a time: q [rows, heads, head_dim] -> [rows, heads *
        head_dim], of q's dtype."""
        out = torch.empty_like(q, memory_format=torch.contiguous_format)
        lengths = batch.context_lens.tolist()
        pieces = [(row, 1, lengths[row], batch.block_tables[row]) for row in range(batch.num_decode)]
        pieces += [(piece.row, piece.num_tokens, piece.end, piece.block_ids) for piece in batch.prefills]
        for row, count, end, blocks in pieces:
            used, rows = blocks[: -(-end // pool.block_size)], slice(row, row + count)
            k, v = (part.index_select(0, used).flatten(0, 1)[:end] for part in (pool.k[layer], pool.v[layer]))
            keys = torch.arange(end, device=q.device)
            visible = visible_keys(batch.positions[rows], keys, self._windows[layer])
            out[rows] = partial_attention(q[rows], k, v, visible)[0]
        return out.flatten(1)
