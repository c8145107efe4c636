# mypy: disallow-untyped-decorators=False
"""Attention of many query tokens per request over the paged KV pool: chunks of prompts, several in one launch.

A tile of query rows is token x head of one KV head's group (row m: token m // group, head m % group), so each K and V
tile is read once for the whole group, whatever its size. Cached context and new tokens are both read from the pool: the
new rows were written first. The mask is exact: a query at position p sees the keys at positions <= p, and the positions
of a slice's rows are given: they ascend, and need not follow one another.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from tandem.engine.model.kernels.tiles import (
    LOG2_E,
    PIPELINE_STAGES,
    Tiles,
    check_layout,
    finish_rows,
    fold_keys,
    key_tile,
    padded_dim,
)


@triton.jit
def _prefill_kernel(
    q: tl.tensor,
    k: tl.tensor,
    v: tl.tensor,
    tables: tl.tensor,
    slices: tl.tensor,
    positions: tl.tensor,
    out: tl.tensor,
    lse: tl.tensor,
    scale_log2: tl.tensor,
    stride_q: tl.tensor,
    stride_slot: tl.tensor,
    GROUP: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    WINDOW: tl.constexpr,
    ALWAYS_MASKED: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
) -> None:
    """Grid (tiles of the longest slice, kv_heads, slices). The last tile of a slice is the longest and starts first.
    ALWAYS_MASKED: all keys go through one loop, so that where a tile of rows begins does not choose the code."""
    TOKENS: tl.constexpr = BLOCK_M // GROUP
    kv_head = tl.program_id(1)
    fields = slices + tl.program_id(2) * 3
    first_row = tl.load(fields)
    num_tokens = tl.load(fields + 1)
    table = tables + tl.load(fields + 2)
    tile = tl.num_programs(0) - 1 - tl.program_id(0)
    tile_start = tile * TOKENS
    if tile_start < num_tokens:
        tile_stop = tl.minimum(tile_start + TOKENS, num_tokens)
        rows = tl.arange(0, BLOCK_M)
        tokens = tile_start + rows // GROUP
        heads = kv_head * GROUP + rows % GROUP
        real = tokens < tile_stop
        dims = tl.arange(0, BLOCK_D)
        stored = real[:, None] & (dims < HEAD_DIM)[None, :]
        source = (first_row + tokens).to(tl.int64) * stride_q + heads * HEAD_DIM
        q_tile = tl.load(q + source[:, None] + dims[None, :], mask=stored, other=0.0)
        lowest = tl.load(positions + first_row + tile_start).to(tl.int32)
        highest = tl.load(positions + first_row + tile_stop - 1).to(tl.int32)
        last_visible = tl.load(positions + first_row + tokens, mask=real, other=-1).to(tl.int32)
        first_visible = tl.zeros([BLOCK_M], dtype=tl.int32)
        start = 0
        # Keys that every row of the tile sees need no mask: all whole tiles up to the first row's position.
        masked_start = (lowest + 1) // BLOCK_N * BLOCK_N
        if WINDOW > 0:
            first_visible = last_visible - (WINDOW - 1)
            start = tl.maximum(lowest - (WINDOW - 1), 0) // BLOCK_N * BLOCK_N
        if WINDOW > 0 or ALWAYS_MASKED:
            masked_start = start
        acc = tl.zeros([BLOCK_M, BLOCK_D], dtype=tl.float32)
        row_max = tl.full([BLOCK_M], float("-inf"), dtype=tl.float32)
        row_sum = tl.zeros([BLOCK_M], dtype=tl.float32)
        k_base = k + kv_head * HEAD_DIM
        v_base = v + kv_head * HEAD_DIM
        if WINDOW == 0 and not ALWAYS_MASKED:
            acc, row_max, row_sum = fold_keys(
                q_tile,
                acc,
                row_max,
                row_sum,
                start,
                masked_start,
                first_visible,
                last_visible,
                k_base,
                v_base,
                table,
                stride_slot,
                scale_log2,
                HEAD_DIM,
                BLOCK_D,
                BLOCK_SIZE,
                BLOCK_N,
                False,
            )
        acc, row_max, row_sum = fold_keys(
            q_tile,
            acc,
            row_max,
            row_sum,
            masked_start,
            highest + 1,
            first_visible,
            last_visible,
            k_base,
            v_base,
            table,
            stride_slot,
            scale_log2,
            HEAD_DIM,
            BLOCK_D,
            BLOCK_SIZE,
            BLOCK_N,
            True,
        )
        o_tile, lse_tile = finish_rows(acc, row_max, row_sum, scale_log2)
        target = (first_row + tokens).to(tl.int64) * (tl.num_programs(1) * GROUP) + heads
        tl.store(out + target[:, None] * HEAD_DIM + dims[None, :], o_tile.to(out.dtype.element_ty), mask=stored)
        tl.store(lse + target, lse_tile, mask=real)


def prefill_tiles(head_dim: int, group: int, dtype: torch.dtype) -> Tiles:
    """128 rows for 16-bit heads up to 128 wide, fewer beyond: what the registers of a program hold without spilling."""
    rows = max(32, min(128, 32768 // (padded_dim(head_dim) * dtype.itemsize)))
    return Tiles(rows=max(rows, int(triton.next_power_of_2(group))), keys=key_tile(head_dim, dtype), warps=8)


def paged_prefill(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    block_tables: Tensor,
    slices: Tensor,
    positions: Tensor,
    *,
    max_tokens: int,
    scale: float,
    window: int | None = None,
    out: Tensor | None = None,
    always_masked: bool = False,
) -> tuple[Tensor, Tensor]:
    """`partial_attention` of slices of requests: (o, lse), lse float32 [N, heads] as a natural logarithm.

    q: [N, heads, head_dim], the heads of a row contiguous. k, v: one layer of the pool, [num_blocks, block_size,
    kv_heads, head_dim], of q's dtype. block_tables: int64 or int32 [sum of blocks], the tables of all slices one after
    another. slices: int32 [S, 3], per slice: first row in q, number of rows, start of its table in `block_tables`.
    positions: int64 [N], where each row stands in its request; they ascend in a slice. `max_tokens` is a bound on the
    rows of one slice known to the host. window: the number of latest keys each query sees, itself included. out:
    contiguous, of q's shape, any float dtype; made in q's dtype where it is not given. always_masked: for
    `batch_invariant`, a few percent slower. Rows of q in no slice are left as they are in `out`, and undefined in lse.

    Raises ValueError if the layouts do not fit together.
    """
    check_layout(q, k, v)
    rows, heads, head_dim = q.shape
    kv_heads = k.shape[2]
    if out is None:
        out = torch.empty((rows, heads, head_dim), dtype=q.dtype, device=q.device)
    if out.shape != q.shape or not out.is_contiguous():
        raise ValueError("out must be contiguous and of q's shape")
    if slices.dtype != torch.int32 or slices.shape[1:] != (3,) or not slices.is_contiguous():
        raise ValueError(f"slices must be contiguous int32 [S, 3], got {slices.dtype} {tuple(slices.shape)}")
    if positions.dtype != torch.int64 or positions.shape != (rows,) or not positions.is_contiguous():
        raise ValueError(f"positions must be contiguous int64 [{rows}], got {positions.dtype} {tuple(positions.shape)}")
    lse = torch.empty((rows, heads), dtype=torch.float32, device=q.device)
    if slices.shape[0] == 0 or max_tokens == 0:
        return out, lse
    group = heads // kv_heads
    tiles = prefill_tiles(head_dim, group, q.dtype)
    grid = (triton.cdiv(max_tokens, tiles.rows // group), kv_heads, slices.shape[0])
    _prefill_kernel[grid](
        q,
        k,
        v,
        block_tables,
        slices,
        positions,
        out,
        lse,
        scale * LOG2_E,
        q.stride(0),
        k.stride(1),
        GROUP=group,
        HEAD_DIM=head_dim,
        BLOCK_D=padded_dim(head_dim),
        BLOCK_SIZE=k.shape[1],
        WINDOW=window or 0,
        ALWAYS_MASKED=always_masked,
        BLOCK_M=tiles.rows,
        BLOCK_N=tiles.keys,
        num_warps=tiles.warps,
        num_stages=PIPELINE_STAGES,
    )
    return out, lse
