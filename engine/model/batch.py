"""One forward step as tensors, made by the runner and read by the model; and the KV pool that all of them share."""

from __future__ import annotations

import ctypes
import math
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

_EXPONENTS = {torch.float32: 0x7F800000, torch.bfloat16: 0x7F80, torch.float16: 0x7C00}
_PIECE = 1 << 15


@dataclass(slots=True)
class PrefillSlice:
    """Rows of one request that computes more than one token in this step (or exactly one of a prompt).

    `ForwardBatch.positions` says where each of them stands: they ascend, and need not follow one another. A row sees
    the keys up to its own position. Keys between the rows are in the KV pool already.
    """

    row: int
    """First row in the batch."""
    num_tokens: int
    end: int
    """Position of the last row plus one."""
    block_ids: Tensor
    """int64 [ceil(end / block_size)], in order."""


@dataclass(slots=True)
class ForwardBatch:
    """N rows: first B decode rows (one token each), then the prefill slices."""

    token_ids: Tensor
    """int64 [N]"""
    positions: Tensor
    """int64 [N]: of each row in its request; for rotation and for the mask."""
    slots: Tensor
    """int64 [N]: block_id * block_size + offset, where the K and V of each row are written."""
    num_decode: int
    """B"""
    block_tables: Tensor
    """int64 [B, max_blocks_in_batch]; entries past a request's end point at block 0 and are masked."""
    context_lens: Tensor
    """int64 [B]: tokens attended to, the row itself included."""
    max_context_len: int
    """max(context_lens), 0 without decode rows: known on the host without a device sync."""
    prefills: list[PrefillSlice]
    logit_rows: Tensor
    """int64 [R]: rows whose logits are wanted; without prefill slices, R = N means all rows in order."""
    num_pooled: int = 0
    """P: of the last P of `logit_rows` the normalised hidden states are wanted instead of logits."""
    pooled: Tensor | None = None
    """Those, [P, hidden_size], written by the model."""
    finite: bool | None = None
    """Whether all K and V that the step has written are finite; None where the model did not look."""


class KvPool:
    """The paged KV cache of one worker: storage only (who owns which block is `block_manager.py`'s business).

    `storage` has shape [layer, K|V, block, offset, kv_head, dim]; `k[l]` and `v[l]` are views
    [num_blocks, block_size, num_kv_heads, head_dim]. Block 0 is never handed out: padding points at it.
    """

    def __init__(
        self,
        num_layers: int,
        num_blocks: int,
        block_size: int,
        num_kv_heads: int,
        head_dim: int,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        self.num_layers = num_layers
        self.num_blocks = num_blocks
        self.block_size = block_size
        self.num_kv_heads = num_kv_heads
        self.head_dim = head_dim
        shape = (num_layers, 2, num_blocks, block_size, num_kv_heads, head_dim)
        if device.type == "cpu":
            # numpy takes zero pages from the system, which cost nothing until they are written; torch writes zeros.
            raw = np.zeros(math.prod(shape) * dtype.itemsize, dtype=np.uint8)
            self.storage = torch.from_numpy(raw).view(dtype).view(shape)
            word = np.int64 if num_kv_heads * head_dim * dtype.itemsize % 8 == 0 else np.uint8
            self._words = raw.view(word).reshape(num_layers, 2, num_blocks * block_size, -1)
            """The same memory for copies of rows: numpy makes them in one thread, faster than torch and without its
            thread pool, which belongs to the engine thread. They let go of the GIL."""
        else:
            self.storage = torch.zeros(shape, dtype=dtype, device=device)
        self.k = [self.storage[layer, 0] for layer in range(num_layers)]
        self.v = [self.storage[layer, 1] for layer in range(num_layers)]
        row = num_kv_heads * head_dim
        self._rows = self.storage.view(num_layers, 2, num_blocks * block_size, row)

    @property
    def row_bytes(self) -> int:
        """Bytes of K and V of one token in one layer."""
        return 2 * self._rows.shape[-1] * self.storage.element_size()

    def write(self, layer: int, slots: Tensor, k: Tensor, v: Tensor) -> None:
        """Stores k, v [N, num_kv_heads, head_dim] at `slots` int64 [N]."""
        self._rows[layer, 0].index_copy_(0, slots, k.reshape(k.shape[0], -1))
        self._rows[layer, 1].index_copy_(0, slots, v.reshape(v.shape[0], -1))

    def finite(self, slots: Tensor) -> npt.NDArray[np.bool_]:
        """Which of `slots` int64 [N] hold finite numbers alone, in all layers: [N]."""
        rows = torch.isfinite(self._rows.index_select(2, slots)).all(dim=3).flatten(0, 1).all(dim=0)
        found: npt.NDArray[np.bool_] = rows.cpu().numpy()
        return found

    def read_rows(self, layer: int, slots: Tensor, out: memoryview) -> None:
        """Copies the KV of `slots` int64 [N] to `out` (N * row_bytes) in layout [K|V][token][kv_head][dim]."""
        for part in range(2):
            if self.storage.device.type == "cpu":
                target = np.frombuffer(out, self._words.dtype).reshape(2, slots.numel(), -1)[part]
                np.take(self._words[layer, part], slots.numpy(), axis=0, out=target, mode="clip")  # raise would buffer
            else:
                rows = torch.frombuffer(out, dtype=self.storage.dtype).view(2, slots.numel(), -1)
                rows[part].copy_(self._rows[layer, part].index_select(0, slots))

    def write_rows(self, layer: int, slots: Tensor, payload: memoryview, skip: int = 0) -> None:
        """The reverse of read_rows. `payload` may hold more tokens than `slots` int64 [N]: those from `skip` to
        skip + N are written. It may be read-only."""
        tokens, taken = payload.nbytes // self.row_bytes, slice(skip, skip + slots.numel())
        for part in range(2):
            if self.storage.device.type == "cpu":
                words = np.frombuffer(payload, self._words.dtype).reshape(2, tokens, -1)
                self._words[layer, part][slots.numpy()] = words[part, taken]
            else:
                rows = _tensor_over(payload).view(self.storage.dtype).view(2, tokens, -1)
                self._rows[layer, part].index_copy_(0, slots, rows[part, taken].to(self.storage.device))


def all_finite(payload: memoryview, dtype: torch.dtype) -> bool:
    """Whether all numbers in `payload`, of `dtype`, are finite: of none the exponent is all ones. About as fast as a
    checksum, in one thread and without torch's, which belong to the engine thread."""
    exponent = _EXPONENTS[dtype]
    words: npt.NDArray[np.uint32] = np.frombuffer(payload, f"u{dtype.itemsize}")
    pieces = (words[start : start + _PIECE] for start in range(0, len(words), _PIECE))
    return all((piece & exponent).max() != exponent for piece in pieces)


def _tensor_over(payload: memoryview) -> Tensor:
    """uint8 tensor that shares the memory of `payload` and is valid as long as it. torch warns of read-only memory, so
    it is given the bare address."""
    address = np.frombuffer(payload, dtype=np.uint8).ctypes.data
    return torch.frombuffer((ctypes.c_char * payload.nbytes).from_address(address), dtype=torch.uint8)
