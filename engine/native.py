"""Optional C kernels for the CPU: norms, rotation, gating and decode attention in bfloat16.

Why: while a layer's weights stream through the second-level cache they push everything else out, so each of the ten or
more small torch operations of a layer finds its own code cold and takes 20-40 us instead of 5, and gathering pages for
torch's attention kernel reads the KV twice. Five calls of a few kilobytes of code halve the time of a decode step.

The kernels (`native.c`) are compiled once per machine, in about two seconds, by the C compiler that is there, and kept
in the user's cache folder. Without a compiler, or without AVX512-BF16, torch does the same work: nothing depends on
them. A row's result never depends on the other rows.
"""

from __future__ import annotations

import ctypes
import functools
from pathlib import Path

import torch
from torch import Tensor

from tandem.engine.batch import ForwardBatch, KvPool
from tandem.engine.native_build import compiled, instruction_flags

HEAD_DIMS = (32, 64, 96, 128)
_SOURCE = Path(__file__).with_name("native.c")
_GROUP = 4
"""GROUP in native.c."""
_MOST_THREADS = 4
"""The kernels run on one thread. With more than this many, torch's parallel ones are faster."""
_POINTER, _INT, _FLOAT = ctypes.c_void_p, ctypes.c_int64, ctypes.c_float
_PAGES = (_POINTER, _INT, *(_POINTER,) * 3, _INT, *(_POINTER,) * 3)
"""The first arguments of paged_decode."""


class NativeKernels:
    """All tensors are bfloat16 on the CPU, and dense except where noted; sizes must satisfy `supports`."""

    def __init__(self, path: Path) -> None:
        # The row kernels take microseconds: giving up the interpreter lock around them would cost more.
        quick, long = ctypes.PyDLL(str(path)), ctypes.CDLL(str(path))
        self._rms_norm = quick.rms_norm
        self._rms_norm.argtypes = [*[_POINTER] * 3, *[_INT] * 2, _FLOAT]
        self._silu_mul = quick.silu_mul
        self._silu_mul.argtypes = [*[_POINTER] * 2, *[_INT] * 2]
        self._rotate_and_write = quick.rotate_and_write
        self._rotate_and_write.argtypes = [*[_POINTER] * 3, _FLOAT, *[_POINTER] * 5, *[_INT] * 4]
        self._paged_decode = long.paged_decode
        self._paged_decode.argtypes = [*_PAGES, *[_INT] * 6, _FLOAT]
        for function in (self._rms_norm, self._silu_mul, self._rotate_and_write, self._paged_decode):
            function.restype = None
        self._scores = torch.empty(0)

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
    ) -> None:
        """Norms (with float32 weights [head_dim] for q and k, unless None) and rotates q and k of
        qkv [N, heads + 2 * kv_heads, head_dim] in place and writes k and v to `slots` of `pool`. `angles` are cos and
        sin, float32 [N, head_dim / 2]."""
        q_norm, k_norm = (None, None) if norms is None else (norms[0].data_ptr(), norms[1].data_ptr())
        rows, heads, head_dim = qkv.shape
        self._rotate_and_write(
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

    def paged_decode(
        self, q: Tensor, layer: int, window: int | None, batch: ForwardBatch, pool: KvPool, out: Tensor
    ) -> None:
        """Attention of the decode rows, the first of q [N, heads, head_dim] (rows may be strided), into the first rows
        of `out` [N, heads * head_dim]."""
        if not (batch.block_tables.is_contiguous() and q.stride()[1:] == (q.shape[2], 1)):
            raise ValueError("block tables and heads must be dense")
        room = _GROUP * (batch.max_context_len + 16)
        if self._scores.numel() < room:
            self._scores = torch.empty(2 * room)
        self._paged_decode(
            q.data_ptr(),
            q.stride(0),
            pool.k[layer].data_ptr(),
            pool.v[layer].data_ptr(),
            batch.block_tables.data_ptr(),
            batch.block_tables.shape[1],
            batch.context_lens.data_ptr(),
            out.data_ptr(),
            self._scores.data_ptr(),
            batch.num_decode,
            q.shape[1],
            pool.num_kv_heads,
            q.shape[2],
            pool.block_size,
            window or 0,
            q.shape[2] ** -0.5,
        )


def supports(dtype: torch.dtype, device: torch.device, hidden_size: int, intermediate_size: int, head_dim: int) -> bool:
    """Whether a model of these sizes can use the kernels, with the threads torch has now."""
    sizes = hidden_size % 16 == 0 and intermediate_size % 16 == 0 and head_dim in HEAD_DIMS
    here = dtype == torch.bfloat16 and device.type == "cpu" and torch.get_num_threads() <= _MOST_THREADS
    return sizes and here and "-mavx512bf16" in instruction_flags()


@functools.cache
def load_kernels() -> NativeKernels | None:
    """None where they cannot be compiled."""
    path = compiled(_SOURCE)
    return None if path is None else NativeKernels(path)
