"""Linear layers on the CPU with fixed sums: a row's result has the same bits whatever rows are computed with it.

Library products choose by the number of rows how they cut the sum over the inputs. Here it is written down
(`fixed_linear.c`): each output is one sum over all inputs in their order. For the few rows of a decode step that is
also faster than oneDNN, and as fast for many, except where oneDNN has the matrix instructions (AMX): so it is the
default elsewhere.
"""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch
from torch import Tensor

from tandem.engine.model.native_build import compiled, instruction_flags

SOURCE = Path(__file__).with_name("fixed_linear.c")
MACROS: dict[torch.dtype, tuple[str, ...]] = {torch.float32: (), torch.bfloat16: ("BFLOAT16",)}
"""Macros for the compiler, by each dtype that there is a kernel for."""
_PARALLEL_WORK = 1 << 22
"""Products that a thread should have to do: fewer take less time than waking it."""
_POINTER, _INT = ctypes.c_void_p, ctypes.c_int64


class FixedKernels:
    """The compiled functions for one dtype."""

    def __init__(self, library: Path, dtype: torch.dtype) -> None:
        self.dtype = dtype
        functions = ctypes.CDLL(str(library))

        def function(name: str, arguments: tuple[type, ...], result: type | None) -> Callable[..., int]:
            found = functions[name]
            found.argtypes, found.restype = arguments, result
            return found

        self.packed_bytes = function("packed_bytes", (_INT, _INT), _INT)
        self.scratch_bytes = function("scratch_bytes", (_INT, _INT), _INT)
        self.panel_outputs = function("panel_outputs", (), _INT)()
        self.pack = function("pack", (_POINTER, _POINTER, _INT, _INT), None)
        self.spread = function("spread", (_POINTER, _POINTER, _INT, _INT), None)
        self.linear = function("linear", (*(_POINTER,) * 5, *(_INT,) * 5), None)


@functools.cache
def fixed_kernels(dtype: torch.dtype) -> FixedKernels | None:
    """None where the dtype has no kernel or there is no C compiler."""
    if dtype not in MACROS:
        return None
    library = compiled(SOURCE, *MACROS[dtype])
    return None if library is None else FixedKernels(library, dtype)


def faster_than_library(dtype: torch.dtype) -> bool:
    """Measured with torch 2.13 on AVX2, AVX-512 and AVX512-BF16; without those the kernel has no fused products."""
    has_amx = dtype == torch.bfloat16 and torch.cpu._is_amx_tile_supported()
    return dtype in MACROS and bool(instruction_flags()) and not has_amx


class FixedLinear:
    """y = x W^T + b (see `linear.Linear`), with the weights packed into panels of outputs."""

    def __init__(self, weight: Tensor, bias: Tensor | None, kernels: FixedKernels) -> None:
        """weight [out, in], bias [out] or None, both of the kernels' dtype. Keeps no reference to `weight`."""
        self._kernels = kernels
        self._outputs, self._inputs = weight.shape
        self._bias = None if bias is None else bias.contiguous()
        weight = weight.contiguous()
        size = kernels.packed_bytes(self._outputs, self._inputs)
        self._packed = torch.empty(size // weight.element_size(), dtype=weight.dtype)
        kernels.pack(weight.data_ptr(), self._packed.data_ptr(), self._outputs, self._inputs)

    def __call__(self, x: Tensor) -> Tensor:
        return self._compute(x, None)

    def plus(self, x: Tensor, residual: Tensor) -> Tensor:
        return self._compute(x, residual.contiguous())

    def _compute(self, x: Tensor, residual: Tensor | None) -> Tensor:
        kernels, rows, x = self._kernels, x.shape[0], x.contiguous()
        out = torch.empty(rows, self._outputs, dtype=x.dtype)
        operand = x
        if scratch := kernels.scratch_bytes(rows, self._inputs):
            operand = torch.empty(scratch, dtype=torch.uint8)
            kernels.spread(x.data_ptr(), operand.data_ptr(), rows, self._inputs)

        def compute(first: int, last: int) -> None:
            """Computes panels `first` to `last`, without the interpreter lock; several threads share the panels."""
            kernels.linear(
                operand.data_ptr(),
                self._packed.data_ptr(),
                None if self._bias is None else self._bias.data_ptr(),
                None if residual is None else residual.data_ptr(),
                out.data_ptr(),
                rows,
                self._inputs,
                self._outputs,
                first,
                last,
            )

        panels = -(-self._outputs // kernels.panel_outputs)
        shares = min(torch.get_num_threads(), panels, max(1, rows * self._inputs * self._outputs // _PARALLEL_WORK))
        if shares == 1:
            compute(0, panels)
        else:
            bounds = [panels * share // shares for share in range(shares + 1)]
            list(_threads(shares - 1).map(compute, bounds[1:-1], bounds[2:]))
            compute(bounds[0], bounds[1])
        return out


@functools.cache
def _threads(count: int) -> ThreadPoolExecutor:
    """Which thread computes an output does not change it: the calls let go of the interpreter lock."""
    return ThreadPoolExecutor(count, thread_name_prefix="linear")
