# mypy: disallow-untyped-decorators=False
"""The inner loop shared by the attention kernels, and the tile sizes that fit a GPU.

Layout of the KV pool as the kernels see it: K and V of one layer are [num_blocks, block_size, kv_heads, head_dim],
contiguous; key `n` of a request is row `table[n // block_size] * block_size + n % block_size`. Every key looks up its
own block, so tiles do not depend on the block size and block sizes need not be powers of two.

Offsets into the pool are 64-bit: a pool of 2**31 elements is only 4 GiB in bf16.
"""

from __future__ import annotations

import math
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

PIPELINE_STAGES = 3
"""Stages of the inner loop: one for the block table, two for K and V. Keeps every kernel below 99 KiB of shared memory,
what a block may use on the smallest chips of the Ampere and Ada generations."""
LOG2_E = math.log2(math.e)
LOG_2 = tl.constexpr(math.log(2.0))
"""Constant of kernels, like every module constant that they read."""


@dataclass(frozen=True, slots=True)
class Tiles:
    """Launch sizes of one kernel: a few per model and GPU, never per batch (each set is one compilation)."""

    rows: int
    """Query rows (token x head of a group) per program."""
    keys: int
    """Keys per step of the inner loop."""
    warps: int


@triton.jit
def fold_keys(
    q: tl.tensor,
    acc: tl.tensor,
    row_max: tl.tensor,
    row_sum: tl.tensor,
    key_start: tl.tensor,
    key_stop: tl.tensor,
    first_visible: tl.tensor,
    last_visible: tl.tensor,
    k_base: tl.tensor,
    v_base: tl.tensor,
    table: tl.tensor,
    stride_slot: tl.tensor,
    scale_log2: tl.tensor,
    HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    BLOCK_N: tl.constexpr,
    MASKED: tl.constexpr,
) -> tuple[tl.tensor, tl.tensor, tl.tensor]:
    """Online softmax (FlashAttention-2) of q [M, BLOCK_D] over keys [key_start, key_stop), added to the running state.

    State: acc float32 [M, BLOCK_D] not yet divided by row_sum float32 [M]; row_max float32 [M] of the unscaled scores.
    MASKED: row m sees keys first_visible[m]..last_visible[m], both included. Without it every row sees every key and
    key_stop - key_start is a multiple of BLOCK_N. A tile that a row does not see at all leaves that row's state
    bit for bit as it was, and both forms do the same arithmetic on what is seen: a row's result does not depend on
    which other rows share its tile, so chunked and whole prefill agree exactly.
    """
    dims = tl.arange(0, BLOCK_D)
    for start in range(key_start, key_stop, BLOCK_N):
        keys = start + tl.arange(0, BLOCK_N)
        if MASKED:
            blocks = tl.load(table + keys // BLOCK_SIZE, mask=keys < key_stop, other=0)
        else:
            blocks = tl.load(table + keys // BLOCK_SIZE)
        slots = blocks.to(tl.int64) * BLOCK_SIZE + keys % BLOCK_SIZE
        offsets = slots[:, None] * stride_slot + dims[None, :]
        if MASKED or HEAD_DIM != BLOCK_D:
            loaded = (keys < key_stop)[:, None] & (dims < HEAD_DIM)[None, :]
            k = tl.load(k_base + offsets, mask=loaded, other=0.0)
        else:
            k = tl.load(k_base + offsets)
        scores = tl.dot(q, tl.trans(k), input_precision="ieee")
        if MASKED:
            visible = (keys[None, :] >= first_visible[:, None]) & (keys[None, :] <= last_visible[:, None])
            scores = tl.where(visible, scores, float("-inf"))
        new_max = tl.maximum(row_max, tl.max(scores, 1))
        shift = tl.where(new_max == float("-inf"), 0.0, new_max) * scale_log2
        weights = tl.exp2(scores * scale_log2 - shift[:, None])
        rescale = tl.exp2(row_max * scale_log2 - shift)
        row_sum = row_sum * rescale + tl.sum(weights, 1)
        acc = acc * rescale[:, None]
        if MASKED or HEAD_DIM != BLOCK_D:
            v = tl.load(v_base + offsets, mask=loaded, other=0.0)
        else:
            v = tl.load(v_base + offsets)
        acc = tl.dot(weights.to(v.dtype), v, acc, input_precision="ieee")
        row_max = new_max
    return acc, row_max, row_sum


@triton.jit
def finish_rows(
    acc: tl.tensor, row_max: tl.tensor, row_sum: tl.tensor, scale_log2: tl.tensor
) -> tuple[tl.tensor, tl.tensor]:
    """(o, lse) of a running state: o float32 [M, BLOCK_D], lse float32 [M] as a natural logarithm.

    A row that saw no key has o = 0 and lse = -inf, the neutral element of the log-sum-exp merge.
    """
    safe_sum = tl.where(row_sum == 0.0, 1.0, row_sum)
    lse = (row_max * scale_log2 + tl.log2(safe_sum)) * LOG_2
    return acc / safe_sum[:, None], lse


def on_device(x: Tensor) -> AbstractContextManager[object]:
    """Triton launches on the current device, whatever its arguments are on."""
    return torch.cuda.device(x.device) if x.is_cuda else nullcontext()


def padded_dim(head_dim: int) -> int:
    """Width of a tile that holds a head: a power of two, at least what `tl.dot` takes."""
    return max(16, int(triton.next_power_of_2(head_dim)))


def key_tile(head_dim: int, dtype: torch.dtype) -> int:
    """Keys per tile: 16 KiB of K in 16 bits; fewer in float32, whose dot products run on registers."""
    return 16 if dtype.itemsize == 4 else min(64, max(16, 16384 // (padded_dim(head_dim) * dtype.itemsize)))


def check_layout(q: Tensor, k: Tensor, v: Tensor) -> None:
    """Raises ValueError where the kernels would read something else than was meant."""
    if q.dim() != 3 or k.dim() != 4 or k.shape != v.shape:
        raise ValueError(
            "want q [rows, heads, head_dim] and k, v [blocks, block_size, kv_heads, head_dim], got "
            f"{tuple(q.shape)}, {tuple(k.shape)}, {tuple(v.shape)}"
        )
    if q.shape[1] % k.shape[2] or q.shape[2] != k.shape[3]:
        raise ValueError(f"q {tuple(q.shape)} does not group over the KV heads of {tuple(k.shape)}")
    if q.dtype != k.dtype or k.dtype != v.dtype:
        raise ValueError(f"q, k and v must have one dtype, got {q.dtype}, {k.dtype}, {v.dtype}")
    if q.stride(2) != 1 or q.stride(1) != q.shape[2] or not k.is_contiguous() or not v.is_contiguous():
        raise ValueError("the heads of a row of q, and k and v as a whole, must be contiguous")
