# mypy: disallow-untyped-decorators=False
"""RMS norm for `batch_invariant` on a GPU: one program per row. torch splits the sum of a row by the number of rows."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from tandem.engine.model.kernels.tiles import on_device

WARPS = 4


@triton.jit
def _rms_norm_kernel(
    x: tl.tensor,
    weight: tl.tensor,
    out: tl.tensor,
    eps: tl.tensor,
    size: tl.tensor,
    weights: tl.tensor,
    BLOCK: tl.constexpr,
) -> None:
    """Grid (rows,). x and out [rows, size]; row i has row i % weights of weight [weights, size]."""
    row = tl.program_id(0).to(tl.int64)
    places = tl.arange(0, BLOCK)
    values = tl.load(x + row * size + places, mask=places < size, other=0.0).to(tl.float32)
    scale = 1.0 / tl.sqrt(tl.sum(values * values, 0) / size + eps)
    weighted = values * scale * tl.load(weight + row % weights * size + places, mask=places < size, other=0.0)
    tl.store(out + row * size + places, weighted.to(out.dtype.element_ty), mask=places < size)


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """x [..., n] -> the same shape; weight float32 [n] or, for x [..., heads, n], [heads, n]."""
    x = x.contiguous()
    out = torch.empty_like(x)
    rows, size = x.numel() // x.shape[-1], x.shape[-1]
    if rows:
        weights = weight.numel() // size
        with on_device(x):
            _rms_norm_kernel[(rows,)](
                x, weight, out, eps, size, weights, BLOCK=triton.next_power_of_2(size), num_warps=WARPS
            )
    return out
