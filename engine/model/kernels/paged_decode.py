# mypy: disallow-untyped-decorators=False
"""Attention of one query token per request over the paged KV pool: memory-bound, so it is about filling the GPU.

One program reads a stretch of one request's keys for one KV head and serves all query heads of that head's group from
it. Contexts are cut into splits that run in parallel (flash-decoding) and are merged by their log-sum-exp. Where a
context is cut depends on nothing but its own length, so a request's output does not change with the batch it is in.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from tandem.engine.model.kernels.tiles import (
    LOG2_E,
    LOG_2,
    PIPELINE_STAGES,
    Tiles,
    check_layout,
    finish_rows,
    fold_keys,
    key_tile,
    padded_dim,
)

MIN_SPLIT_KEYS = 256
"""Shorter splits would spend more on the merge than they gain in parallelism."""
MAX_SPLITS = 32
"""Bounds the workspace: 4 * batch * heads * MAX_SPLITS * (head_dim + 1) bytes."""


@triton.jit
def _split_keys(span: tl.tensor, MIN_SPLIT: tl.constexpr, SPLITS: tl.constexpr, BLOCK_N: tl.constexpr) -> tl.tensor:
    """Keys per split of a request that attends to `span` keys: a multiple of BLOCK_N."""
    keys = tl.cdiv(tl.cdiv(span, SPLITS), BLOCK_N) * BLOCK_N
    return tl.maximum(keys, MIN_SPLIT)


@triton.jit(do_not_specialize=["stride_table", "num_splits"])
def _decode_kernel(
    q: tl.tensor,
    k: tl.tensor,
    v: tl.tensor,
    tables: tl.tensor,
    context_lens: tl.tensor,
    out: tl.tensor,
    lse: tl.tensor,
    scale_log2: tl.tensor,
    stride_q: tl.tensor,
    stride_slot: tl.tensor,
    stride_table: tl.tensor,
    num_splits: tl.tensor,
    GROUP: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    WINDOW: tl.constexpr,
    MIN_SPLIT: tl.constexpr,
    SPLITS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
) -> None:
    """Grid (batch, kv_heads, num_splits). out [batch, heads, num_splits, HEAD_DIM], lse [batch, heads, num_splits]."""
    row = tl.program_id(0).to(tl.int64)
    kv_head = tl.program_id(1)
    split = tl.program_id(2)
    context = tl.load(context_lens + row).to(tl.int32)
    span = context
    if WINDOW > 0:
        span = tl.minimum(context, WINDOW)
    split_keys = _split_keys(span, MIN_SPLIT, SPLITS, BLOCK_N)
    start = context - span + split * split_keys
    stop = tl.minimum(start + split_keys, context)
    # Split 0 always runs: a row without context must still write o = 0, lse = -inf.
    if start < stop or split == 0:
        heads = tl.arange(0, BLOCK_M)
        dims = tl.arange(0, BLOCK_D)
        stored = (heads < GROUP)[:, None] & (dims < HEAD_DIM)[None, :]
        first_head = kv_head * GROUP
        q_tile = tl.load(
            q + row * stride_q + (first_head + heads)[:, None] * HEAD_DIM + dims[None, :], mask=stored, other=0.0
        )
        acc, row_max, row_sum = fold_keys(
            q_tile,
            tl.zeros([BLOCK_M, BLOCK_D], dtype=tl.float32),
            tl.full([BLOCK_M], float("-inf"), dtype=tl.float32),
            tl.zeros([BLOCK_M], dtype=tl.float32),
            start,
            stop,
            tl.zeros([BLOCK_M], dtype=tl.int32),
            tl.zeros([BLOCK_M], dtype=tl.int32) + (stop - 1),
            k + kv_head * HEAD_DIM,
            v + kv_head * HEAD_DIM,
            tables + row * stride_table,
            stride_slot,
            scale_log2,
            HEAD_DIM,
            BLOCK_D,
            BLOCK_SIZE,
            BLOCK_N,
            True,
        )
        o_tile, lse_tile = finish_rows(acc, row_max, row_sum, scale_log2)
        target = (row * tl.num_programs(1) * GROUP + first_head + heads) * num_splits + split
        tl.store(out + target[:, None] * HEAD_DIM + dims[None, :], o_tile.to(out.dtype.element_ty), mask=stored)
        tl.store(lse + target, lse_tile, mask=heads < GROUP)


@triton.jit(do_not_specialize=["num_splits"])
def _merge_kernel(
    partial: tl.tensor,
    partial_lse: tl.tensor,
    context_lens: tl.tensor,
    out: tl.tensor,
    lse: tl.tensor,
    num_splits: tl.tensor,
    HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    WINDOW: tl.constexpr,
    MIN_SPLIT: tl.constexpr,
    SPLITS: tl.constexpr,
    BLOCK_N: tl.constexpr,
) -> None:
    """Grid (batch, heads): the log-sum-exp merge of the splits of one head."""
    row = tl.program_id(0).to(tl.int64)
    target = row * tl.num_programs(1) + tl.program_id(1)
    span = tl.load(context_lens + row).to(tl.int32)
    if WINDOW > 0:
        span = tl.minimum(span, WINDOW)
    used = tl.maximum(tl.cdiv(span, _split_keys(span, MIN_SPLIT, SPLITS, BLOCK_N)), 1)
    splits = tl.arange(0, SPLITS)
    dims = tl.arange(0, BLOCK_D)
    source = target * num_splits + splits
    each_lse = tl.load(partial_lse + source, mask=splits < used, other=float("-inf"))
    top = tl.max(each_lse, 0)
    safe_top = tl.where(top == float("-inf"), 0.0, top)
    weights = tl.exp2((each_lse - safe_top) / LOG_2)
    total = tl.sum(weights, 0)
    total = tl.where(total == 0.0, 1.0, total)
    loaded = (splits < used)[:, None] & (dims < HEAD_DIM)[None, :]
    each = tl.load(partial + source[:, None] * HEAD_DIM + dims[None, :], mask=loaded, other=0.0)
    merged = tl.sum(each * weights[:, None], 0) / total
    tl.store(out + target * HEAD_DIM + dims, merged.to(out.dtype.element_ty), mask=dims < HEAD_DIM)
    tl.store(lse + target, top + tl.log2(total) * LOG_2)


def decode_tiles(head_dim: int, group: int, dtype: torch.dtype) -> Tiles:
    """The rows are the heads of a group, padded to what `tl.dot` takes."""
    return Tiles(rows=max(16, int(triton.next_power_of_2(group))), keys=key_tile(head_dim, dtype), warps=4)


def paged_decode(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    block_tables: Tensor,
    context_lens: Tensor,
    *,
    max_context_len: int,
    scale: float,
    window: int | None = None,
    out: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """`partial_attention` of one query per request: (o, lse), lse float32 [B, heads] as a natural logarithm.

    q: [B, heads, head_dim], the heads of a row contiguous. k, v: one layer of the pool, [num_blocks, block_size,
    kv_heads, head_dim], of q's dtype. block_tables: int64 or int32 [B, any]; entries past a context are not read.
    context_lens: int64 or int32 [B], the query's own row included; `max_context_len` is a bound on it known to the
    host. window: the number of latest keys each query sees. out: contiguous, of q's shape, any float dtype; made in q's
    dtype where it is not given. A context of 0 gives o = 0, lse = -inf.

    Raises ValueError if the layouts do not fit together.
    """
    check_layout(q, k, v)
    batch, heads, head_dim = q.shape
    kv_heads = k.shape[2]
    if out is None:
        out = torch.empty((batch, heads, head_dim), dtype=q.dtype, device=q.device)
    if out.shape != q.shape or not out.is_contiguous() or block_tables.stride(-1) != 1:
        raise ValueError("out must be contiguous and of q's shape, and a row of block_tables contiguous")
    lse = torch.empty((batch, heads), dtype=torch.float32, device=q.device)
    if batch == 0:
        return out, lse
    tiles = decode_tiles(head_dim, heads // kv_heads, q.dtype)
    longest = min(max_context_len, window) if window else max_context_len
    num_splits = max(1, min(MAX_SPLITS, triton.cdiv(longest, MIN_SPLIT_KEYS)))
    partial, partial_lse = out, lse
    if num_splits > 1:
        partial = torch.empty((batch, heads, num_splits, head_dim), dtype=torch.float32, device=q.device)
        partial_lse = torch.empty((batch, heads, num_splits), dtype=torch.float32, device=q.device)
    _decode_kernel[(batch, kv_heads, num_splits)](
        q,
        k,
        v,
        block_tables,
        context_lens,
        partial,
        partial_lse,
        scale * LOG2_E,
        q.stride(0),
        k.stride(1),
        block_tables.stride(0),
        num_splits,
        GROUP=heads // kv_heads,
        HEAD_DIM=head_dim,
        BLOCK_D=padded_dim(head_dim),
        BLOCK_SIZE=k.shape[1],
        WINDOW=window or 0,
        MIN_SPLIT=MIN_SPLIT_KEYS,
        SPLITS=MAX_SPLITS,
        BLOCK_M=tiles.rows,
        BLOCK_N=tiles.keys,
        num_warps=tiles.warps,
        num_stages=PIPELINE_STAGES,
    )
    if num_splits > 1:
        _merge_kernel[(batch, heads)](
            partial,
            partial_lse,
            context_lens,
            out,
            lse,
            num_splits,
            HEAD_DIM=head_dim,
            BLOCK_D=padded_dim(head_dim),
            WINDOW=window or 0,
            MIN_SPLIT=MIN_SPLIT_KEYS,
            SPLITS=MAX_SPLITS,
            BLOCK_N=tiles.keys,
            num_warps=4,
        )
    return out, lse
