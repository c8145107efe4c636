"""Linear layers of the decoder: with fixed sums, packed for the CPU by oneDNN, int8 weight-only, or plain.

On the CPU oneDNN reorders a weight once into the blocked layout that its kernels want; with few rows that is twice as
fast as `F.linear`, and the residual addition is fused.

Library products may cut the sum over the inputs differently for another number of rows, so what a row's bits depend on
is measured where a model is loaded (`row_probe.py`). Two measures help: a product never has more than `MOST_ROWS` rows,
so that all row counts can be tried; and small bfloat16 layers, whose sum oneDNN was seen to split between 32 and 512
rows with AMX, are computed 32 rows at a time there.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from tandem.engine.model.fixed_linear import FixedLinear, fixed_kernels

_mkldnn: Any = torch.ops.mkldnn

MOST_ROWS = 512
"""Most rows of one product; more rows are computed in pieces."""
_ROWS_HINT = 16
"""Row count that oneDNN chooses the packed layout for. In float32 only this one gave row-invariant results with AMX."""
_UNSPLIT_INPUTS = 448
_SPLIT_INPUTS = 1024
_SMALL_WEIGHTS = 1 << 19
"""Weights of a layer that stay in the second-level cache while it is computed in pieces."""
_FEW_ROWS = 32
_INT8_ROWS = 8
"""Most rows with which the int8 kernel, which reads the weights once per row, beats restoring them to bfloat16."""


class Linear(Protocol):
    """y = x W^T + b with W [out, in], b [out] or none."""

    def __call__(self, x: Tensor) -> Tensor:
        """x [m, in] -> [m, out], of x's dtype."""

    def plus(self, x: Tensor, residual: Tensor) -> Tensor:
        """y + residual [m, out]."""


def make_linear(
    weight: Tensor, bias: Tensor | None, *, quantization: str | None = None, fixed_sums: bool = False
) -> Linear:
    """Picks the implementation by device and dtype. `quantization` is None or int8 (the CPU only). `fixed_sums`: on a
    GPU, or where there are `fixed_kernels`. The packed, fixed and int8 layers keep no reference to `weight`."""
    if quantization == "int8":
        return Int8Linear(weight, bias)
    if fixed_sums and weight.device.type == "cuda":
        from tandem.engine.model.kernels.fixed_linear import TritonLinear

        return TritonLinear(weight, bias)
    if fixed_sums and (kernels := fixed_kernels(weight.dtype)) is not None:
        return FixedLinear(weight, bias, kernels)
    return PackedLinear(weight, bias) if _packable(weight) else PlainLinear(weight, bias)


def _packable(weight: Tensor) -> bool:
    if weight.device.type != "cpu" or not torch._C._has_mkldnn:
        return False
    if weight.dtype == torch.bfloat16:
        return bool(_mkldnn._is_mkldnn_bf16_supported())
    return weight.dtype == torch.float32


def padded_rows(rows: int) -> int:
    """The row count to compute `rows` rows with on the CPU. oneDNN makes a kernel for each row count it meets, at a
    millisecond and half a megabyte per layer shape; rounding up leaves a few dozen row counts in all."""
    if rows <= 16:
        return 1 << max(rows - 1, 0).bit_length()
    step = 16 if rows <= 128 else 32 if rows <= 1024 else 128
    return -(-rows // step) * step


def in_pieces(compute: Callable[..., Tensor], most: int, *tensors: Tensor) -> Tensor:
    """`compute` of at most `most` rows of `tensors` at a time."""
    if tensors[0].shape[0] <= most:
        return compute(*tensors)
    return torch.cat([compute(*pieces) for pieces in zip(*(torch.split(x, most) for x in tensors), strict=True)])


class PlainLinear:
    """A `Linear` that calls `F.linear`, for GPUs and for dtypes that oneDNN does not pack."""

    def __init__(self, weight: Tensor, bias: Tensor | None) -> None:
        self._weight = weight
        self._bias = bias
        self._most = MOST_ROWS if weight.device.type == "cpu" else sys.maxsize

    def __call__(self, x: Tensor) -> Tensor:
        return in_pieces(self._multiply, self._most, x)

    def plus(self, x: Tensor, residual: Tensor) -> Tensor:
        return self(x).add_(residual)

    def _multiply(self, x: Tensor) -> Tensor:
        return F.linear(x, self._weight, self._bias)


class PackedLinear:
    """A `Linear` of the CPU whose weight oneDNN has packed once. Keeps no reference to the weight given."""

    def __init__(self, weight: Tensor, bias: Tensor | None) -> None:
        self._weight = _mkldnn._reorder_linear_weight(weight.contiguous(), _ROWS_HINT)
        self._bias = bias
        outputs, inputs = weight.shape
        splits = weight.dtype == torch.bfloat16 and _UNSPLIT_INPUTS < inputs <= _SPLIT_INPUTS
        self._splits = splits and inputs * outputs <= _SMALL_WEIGHTS

    def __call__(self, x: Tensor) -> Tensor:
        return in_pieces(self._multiply, self._most(x), x)

    def plus(self, x: Tensor, residual: Tensor) -> Tensor:
        return in_pieces(self._multiply_add, self._most(x), x, residual)

    def _most(self, x: Tensor) -> int:
        return _FEW_ROWS if self._splits and x.shape[0] < MOST_ROWS else MOST_ROWS

    def _multiply(self, x: Tensor) -> Tensor:
        y: Tensor = _mkldnn._linear_pointwise(x, self._weight, self._bias, "none", [], "")
        return y

    def _multiply_add(self, x: Tensor, residual: Tensor) -> Tensor:
        y: Tensor = _mkldnn._linear_pointwise.binary(x, residual, self._weight, self._bias, "add")
        return y


class Int8Linear:
    """Weights as int8 with one scale per output (symmetric, absolute maximum): half the memory of bfloat16.

    Decoding one or two streams reads half as many bytes and is up to 1.8x as fast; with many rows the weights are
    restored first, which is slower than not quantising at all.
    """

    def __init__(self, weight: Tensor, bias: Tensor | None) -> None:
        scale = weight.float().abs().amax(dim=1).clamp_min_(1e-12) / 127
        self._weight = (weight.float() / scale.unsqueeze(1)).round_().to(torch.int8)
        self._scale = scale.to(weight.dtype)
        self._bias = bias

    def __call__(self, x: Tensor) -> Tensor:
        return in_pieces(self._multiply, MOST_ROWS, x)

    def plus(self, x: Tensor, residual: Tensor) -> Tensor:
        return self(x).add_(residual)

    def _multiply(self, x: Tensor) -> Tensor:
        if x.dtype == torch.bfloat16 and x.shape[0] <= _INT8_ROWS:
            y = torch._weight_int8pack_mm(x.contiguous(), self._weight, self._scale)
        else:
            y = F.linear(x, self._weight.to(x.dtype)).mul_(self._scale)
        return y if self._bias is None else y.add_(self._bias)
