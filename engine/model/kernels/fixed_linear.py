# mypy: disallow-untyped-decorators=False
"""Linear layers for `batch_invariant` on a GPU: tiles of one size whatever the number of rows, and no split of the sum.

Libraries choose tiles and splits by the number of rows. Here each output is one sum over the inputs, in steps of
BLOCK_K, and the number of rows does not even choose between two compilations.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from tandem.engine.model.kernels.tiles import PIPELINE_STAGES, on_device

BLOCK_M = 64
"""Rows. With fewer the product waits for memory anyway: a decode step of one row reads the same weights."""
BLOCK_N = 64
WARPS = 4


@triton.jit(do_not_specialize=["rows"])
def _linear_kernel(
    x: tl.tensor,
    weight: tl.tensor,
    bias: tl.tensor,
    residual: tl.tensor,
    out: tl.tensor,
    rows: tl.tensor,
    inputs: tl.tensor,
    outputs: tl.tensor,
    HAS_BIAS: tl.constexpr,
    HAS_RESIDUAL: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
) -> None:
    """Grid (tiles of outputs, tiles of rows). x [rows, inputs], weight [outputs, inputs], residual and out
    [rows, outputs]."""
    columns = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    lines = (tl.program_id(1) * BLOCK_M + tl.arange(0, BLOCK_M)).to(tl.int64)
    places = tl.arange(0, BLOCK_K)
    acc = tl.zeros([BLOCK_M, BLOCK_N], dtype=tl.float32)
    for start in range(0, inputs, BLOCK_K):
        each = start + places
        left = tl.load(
            x + lines[:, None] * inputs + each[None, :],
            mask=(lines < rows)[:, None] & (each < inputs)[None, :],
            other=0.0,
        )
        right = tl.load(
            weight + columns.to(tl.int64)[:, None] * inputs + each[None, :],
            mask=(columns < outputs)[:, None] & (each < inputs)[None, :],
            other=0.0,
        )
        acc = tl.dot(left, tl.trans(right), acc, input_precision="ieee")
    target = lines[:, None] * outputs + columns[None, :]
    stored = (lines < rows)[:, None] & (columns < outputs)[None, :]
    if HAS_BIAS:
        acc += tl.load(bias + columns, mask=columns < outputs, other=0.0).to(tl.float32)[None, :]
    if HAS_RESIDUAL:
        acc += tl.load(residual + target, mask=stored, other=0.0).to(tl.float32)
    tl.store(out + target, acc.to(out.dtype.element_ty), mask=stored)


def input_tile(dtype: torch.dtype) -> int:
    """BLOCK_K: fewer in float32, whose products run on registers."""
    return 16 if dtype.itemsize == 4 else 64


class TritonLinear:
    """y = x W^T + b (see `linear.Linear`)."""

    def __init__(self, weight: Tensor, bias: Tensor | None) -> None:
        """weight [out, in], bias [out] or None."""
        self._weight = weight.contiguous()
        self._bias = bias

    def __call__(self, x: Tensor) -> Tensor:
        return self._compute(x.contiguous(), None)

    def plus(self, x: Tensor, residual: Tensor) -> Tensor:
        return self._compute(x.contiguous(), residual.contiguous())

    def _compute(self, x: Tensor, residual: Tensor | None) -> Tensor:
        rows, (outputs, inputs) = x.shape[0], self._weight.shape
        out = torch.empty(rows, outputs, dtype=x.dtype, device=x.device)
        if rows == 0:
            return out
        grid = (triton.cdiv(outputs, BLOCK_N), triton.cdiv(rows, BLOCK_M))
        with on_device(x):
            _linear_kernel[grid](
                x,
                self._weight,
                x if self._bias is None else self._bias,
                x if residual is None else residual,
                out,
                rows,
                inputs,
                outputs,
                HAS_BIAS=self._bias is not None,
                HAS_RESIDUAL=residual is not None,
                BLOCK_M=BLOCK_M,
                BLOCK_N=BLOCK_N,
                BLOCK_K=input_tile(x.dtype),
                num_warps=WARPS,
                num_stages=PIPELINE_STAGES,
            )
        return out
