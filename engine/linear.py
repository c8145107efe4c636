"""Linear layers of the decoder: packed for the CPU, int8 weight-only, or plain (a GPU).

On the CPU oneDNN reorders a weight once into the blocked layout that its kernels want; with few rows that is twice as
fast as `F.linear`, and the residual addition is fused.

**Row invariance.** A row of a packed layer's result has the same bits whatever other rows are computed with it, where
`row_invariant` is True. Measured with torch 2.13 (oneDNN 3.x) on a processor with AMX: in float32 every layer with up
to 1,024 inputs; in bfloat16 every layer with up to 448 inputs, and with more (up to 1,024) for at most 32 rows or at
least 512. Between those oneDNN splits the sum over the inputs, so small layers are computed 32 rows at a time there;
for large ones that would cost too much, and no promise is made. Int8 layers make none.
"""

from __future__ import annotations

from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

_mkldnn: Any = torch.ops.mkldnn

_ROWS_HINT = 16
"""Row count that oneDNN chooses the packed layout for. In float32 only this one gave row-invariant results."""
_UNSPLIT_INPUTS = 448
_SPLIT_INPUTS = 1024
_SMALL_WEIGHTS = 1 << 19
"""Weights of a layer that stay in the second-level cache while it is computed in pieces."""
_FEW_ROWS, _MANY_ROWS = 32, 512
_INT8_ROWS = 8
"""Up to here the int8 kernel, which reads the weights once per row, beats restoring them to bfloat16."""


class Linear(Protocol):
    """y = x W^T + b with W [out, in], b [out] or none."""

    row_invariant: bool

    def __call__(self, x: Tensor) -> Tensor:
        """x [m, in] -> [m, out], of x's dtype."""

    def plus(self, x: Tensor, residual: Tensor) -> Tensor:
        """y + residual [m, out]."""


def make_linear(weight: Tensor, bias: Tensor | None, *, quantization: str | None = None) -> Linear:
    """Picks the implementation by device and dtype. `quantization` is None or int8 (the CPU only). The packed and
    the int8 layer keep no reference to `weight`."""
    if quantization == "int8":
        return Int8Linear(weight, bias)
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


class PlainLinear:
    row_invariant = False

    def __init__(self, weight: Tensor, bias: Tensor | None) -> None:
        self._weight = weight
        self._bias = bias

    def __call__(self, x: Tensor) -> Tensor:
        return F.linear(x, self._weight, self._bias)

    def plus(self, x: Tensor, residual: Tensor) -> Tensor:
        return self(x).add_(residual)


class PackedLinear:
    def __init__(self, weight: Tensor, bias: Tensor | None) -> None:
        self._weight = _mkldnn._reorder_linear_weight(weight.contiguous(), _ROWS_HINT)
        self._bias = bias
        outputs, inputs = weight.shape
        splits = weight.dtype == torch.bfloat16 and inputs > _UNSPLIT_INPUTS
        self._in_pieces = splits and inputs <= _SPLIT_INPUTS and inputs * outputs <= _SMALL_WEIGHTS
        self.row_invariant = inputs <= _SPLIT_INPUTS and (self._in_pieces or not splits)

    def __call__(self, x: Tensor) -> Tensor:
        if self._in_pieces and _FEW_ROWS < x.shape[0] < _MANY_ROWS:
            return torch.cat([self._multiply(piece) for piece in torch.split(x, _FEW_ROWS)])
        return self._multiply(x)

    def plus(self, x: Tensor, residual: Tensor) -> Tensor:
        if self._in_pieces and _FEW_ROWS < x.shape[0] < _MANY_ROWS:
            pairs = zip(torch.split(x, _FEW_ROWS), torch.split(residual, _FEW_ROWS), strict=True)
            return torch.cat([self._multiply_add(piece, rest) for piece, rest in pairs])
        return self._multiply_add(x, residual)

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

    row_invariant = False

    def __init__(self, weight: Tensor, bias: Tensor | None) -> None:
        scale = weight.float().abs().amax(dim=1).clamp_min_(1e-12) / 127
        self._weight = (weight.float() / scale.unsqueeze(1)).round_().to(torch.int8)
        self._scale = scale.to(weight.dtype)
        self._bias = bias

    def __call__(self, x: Tensor) -> Tensor:
        if x.dtype == torch.bfloat16 and x.shape[0] <= _INT8_ROWS:
            y = torch._weight_int8pack_mm(x.contiguous(), self._weight, self._scale)
        else:
            y = F.linear(x, self._weight.to(x.dtype)).mul_(self._scale)
        return y if self._bias is None else y.add_(self._bias)

    def plus(self, x: Tensor, residual: Tensor) -> Tensor:
        return self(x).add_(residual)
