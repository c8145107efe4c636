"""Optional C kernels for the CPU: norms, rotation, gating and attention, in float32 and bfloat16.

Why: while a layer's weights stream through the second-level cache they push everything else out, so each of the ten or
more small torch operations of a layer finds its own code cold and takes 20-40 us instead of 5; and torch's attention
wants the pages gathered first, and adds in another order for another number of rows. Five calls of a few kilobytes of
code halve the time of a decode step.

The kernels (`native.c`) are compiled for this machine (`native_build.py`). Without a compiler torch does the same work:
nothing depends on them. A row's result has the same bits whatever the other rows.
"""

from __future__ import annotations

import ctypes
import functools
from pathlib import Path

import torch
from torch import Tensor

from tandem.engine.model.batch import KvPool
from tandem.engine.model.native_build import compiled

SOURCE = Path(__file__).with_name("native.c")
MACROS: dict[torch.dtype, tuple[str, ...]] = {torch.float32: (), torch.bfloat16: ("BFLOAT16",)}
_MOST_DIM = 256
"""MOST_DIM in native.c."""
_MOST_THREADS = 4
"""The row kernels run on one thread. With more than this many, torch's parallel ones are faster."""
_POINTER, _INT, _FLOAT = ctypes.c_void_p, ctypes.c_int64, ctypes.c_float


class NativeKernels:
    """All tensors are on the CPU, of the dtype that the kernels were compiled for where nothing else is said, and dense
    except where noted; sizes must satisfy `supports_rows` or `supports_attention`."""

    def __init__(self, path: Path) -> None:
        # The row kernels take microseconds: giving up the interpreter lock around them would cost more.
        quick, long = ctypes.PyDLL(str(path)), ctypes.CDLL(str(path))
        self._rms_norm = quick.rms_norm
        self._rms_norm.argtypes = [*[_POINTER] * 3, *[_INT] * 2, _FLOAT]
        self._silu_mul = quick.silu_mul
        self._silu_mul.argtypes = [*[_POINTER] * 2, *[_INT] * 2]
        self._rotate_and_write = quick.rotate_and_write
        self._rotate_and_write.argtypes = [*[_POINTER] * 3, _FLOAT, *[_POINTER] * 5, *[_INT] * 4]
        self._attend = long.attend
        self._attend.argtypes = [
            _POINTER,
            _INT,
            *[_POINTER] * 2,
            _INT,
            *[_POINTER] * 3,
            *[_INT] * 5,
            _FLOAT,
            *[_INT] * 2,
        ]
        for function in (self._rms_norm, self._silu_mul, self._attend):
            function.restype = None
        self._rotate_and_write.restype = _INT

    def rms_norm(self, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        """x [N, n] -> [N, n]; weight float32 [n]."""
        out = torch.empty_like(x)
        self._rms_norm(x.data_ptr(), weight.data_ptr(), out.data_ptr(), x.shape[0], x.shape[1], eps)
        return out

    def silu_mul(self, gate_up: Tensor) -> Tensor:
        """silu(gate) * up of gate_up [N, 2n] -> [N, n]."""
        rows, size = gate_up.shape[0], gate_up.shape[1] // 2
        out = torch.empty(rows, size, dtype=gate_up.dtype)
        self._silu_mul(gate_up.data_ptr(), out.data_ptr(), rows, size)
        return out

    def rotate_and_write(
        self,
        qkv: Tensor,
        norms: tuple[Tensor, Tensor] | None,
        eps: float,
        angles: tuple[Tensor, Tensor],
        layer: int,
        slots: Tensor,
        pool: KvPool,
    ) -> bool:
        """Norms (with float32 weights [head_dim] for q and k, unless None) and rotates q and k of
        qkv [N, heads + 2 * kv_heads, head_dim] in place and writes k and v to `slots` of `pool`. `angles` are cos and
        sin, float32 [N, head_dim / 2]. Returns whether all k and v are finite."""
        q_norm, k_norm = (None, None) if norms is None else (norms[0].data_ptr(), norms[1].data_ptr())
        rows, heads, head_dim = qkv.shape
        finite = self._rotate_and_write(
            qkv.data_ptr(),
            q_norm,
            k_norm,
            eps,
            angles[0].data_ptr(),
            angles[1].data_ptr(),
            pool.k[layer].data_ptr(),
            pool.v[layer].data_ptr(),
            slots.data_ptr(),
            rows,
            heads - 2 * pool.num_kv_heads,
            pool.num_kv_heads,
            head_dim,
        )
        return bool(finite)

    def attend(
        self,
        slices: Tensor,
        positions: Tensor,
        q: Tensor,
        layer: int,
        window: int | None,
        pool: KvPool,
        out: Tensor,
        part: int = 0,
        parts: int = 1,
    ) -> None:
        """Attention of q [N, heads, head_dim] (rows may be strided) into `out` [N, heads * head_dim]. `slices` int64
        [S, 3] are first row, rows, and address of the request's int64 block ids; `positions` int64 [N] ascend in each.
        The work is split into pieces; every `parts`th from `part` is done."""
        dense = slices.is_contiguous() and positions.is_contiguous() and out.is_contiguous()
        if not (dense and q.stride()[1:] == (q.shape[2], 1)):
            raise ValueError("slices, positions, heads and out must be dense")
        self._attend(
            slices.data_ptr(),
            slices.shape[0],
            positions.data_ptr(),
            q.data_ptr(),
            q.stride(0),
            pool.k[layer].data_ptr(),
            pool.v[layer].data_ptr(),
            out.data_ptr(),
            q.shape[1],
            pool.num_kv_heads,
            q.shape[2],
            pool.block_size,
            window or 0,
            q.shape[2] ** -0.5,
            part,
            parts,
        )


def supports_rows(hidden_size: int, intermediate_size: int, head_dim: int) -> bool:
    """Whether a model of these sizes, supported by the attention kernel, can use the other kernels, and gains from them
    with the threads torch has now."""
    sizes = hidden_size % 16 == 0 and intermediate_size % 16 == 0 and head_dim % 16 == 0
    return sizes and torch.get_num_threads() <= _MOST_THREADS


def supports_attention(dtype: torch.dtype, device: torch.device, head_dim: int) -> bool:
    """Whether the attention kernel can be used."""
    return dtype in MACROS and device.type == "cpu" and head_dim % 16 == 0 and head_dim <= _MOST_DIM


@functools.cache
def load_kernels(dtype: torch.dtype) -> NativeKernels | None:
    """The kernels of float32 or bfloat16. None where they cannot be compiled."""
    path = compiled(SOURCE, *MACROS[dtype])
    return None if path is None else NativeKernels(path)
