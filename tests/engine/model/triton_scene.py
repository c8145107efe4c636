"""What the tests of Triton kernels share: where they run, paged KV pools, and a reference that can be checked by eye.

Importing this skips the module that does, where there is neither a GPU nor Triton's interpreter.
"""

from __future__ import annotations

import os
from collections.abc import Sequence as Seq

import pytest
import torch
from torch import Tensor

from tandem.engine.model.batch import ForwardBatch, KvPool, PrefillSlice

pytest.importorskip("triton", reason="triton is not installed: install the extra `gpu` or `dev`")
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
if not INTERPRETED and not torch.cuda.is_available():
    pytest.skip("needs a CUDA device; test_triton_interpreter.py runs these tests", allow_module_level=True)

from tandem.engine.model.kernels.paged_decode import paged_decode  # noqa: E402
from tandem.engine.model.kernels.paged_prefill import paged_prefill  # noqa: E402

DEVICE = torch.device("cpu" if INTERPRETED else "cuda")
# The interpreter's tl.dot is wrong in bfloat16.
DTYPES = [torch.float32, torch.float16] if INTERPRETED else [torch.float32, torch.float16, torch.bfloat16]
HALF = torch.float16 if INTERPRETED else torch.bfloat16
TOLERANCE = {torch.float32: 1e-5, torch.float16: 3e-3, torch.bfloat16: 2e-2}


def reference(q: Tensor, k: Tensor, v: Tensor, positions: Seq[int], window: int | None) -> tuple[Tensor, Tensor]:
    """q [n, heads, dim] at `positions`, k and v [keys, kv_heads, dim] from position 0: float32 o and lse."""
    n, heads, dim = q.shape
    group = heads // k.shape[1]
    o, lse = torch.zeros(n, heads, dim), torch.zeros(n, heads)
    for i, position in enumerate(positions):
        start = 0 if window is None else max(0, position - window + 1)
        for head in range(heads):
            keys, values = k[start : position + 1, head // group], v[start : position + 1, head // group]
            scores = keys.float().cpu() @ q[i, head].float().cpu() * dim**-0.5
            o[i, head] = scores.softmax(0) @ values.float().cpu()
            lse[i, head] = scores.logsumexp(0)
    return o, lse


class Scene:
    """A pool whose unused rows are NaN, requests with shuffled blocks, and their queries."""

    def __init__(
        self,
        decode: list[int],
        prefill: list[tuple[int, int]],
        *,
        scattered: Seq[Seq[int]] = (),
        group: int = 2,
        head_dim: int = 32,
        block_size: int = 16,
        dtype: torch.dtype = torch.float32,
        num_layers: int = 1,
    ) -> None:
        """decode: context lengths. prefill: (new tokens, context) of each slice. scattered: the positions of each
        further slice, ascending."""
        places = [range(context, context + n) for n, context in prefill] + list(scattered)
        generator = torch.Generator().manual_seed(len(decode) * 1000 + sum(decode) + sum(n for n, _ in prefill))
        kv_heads = 2
        totals = [*decode, *(place[-1] + 1 for place in places)]
        counts = [-(-total // block_size) for total in totals]
        num_blocks = sum(counts) + 3
        shuffled = torch.randperm(num_blocks - 1, generator=generator) + 1
        free = torch.split(shuffled, [*counts, num_blocks - 1 - sum(counts)])
        self.pool = KvPool(num_layers, num_blocks, block_size, kv_heads, head_dim, dtype, DEVICE)
        self.pool.storage.fill_(torch.nan)
        self.kv: list[tuple[Tensor, Tensor]] = []
        for blocks, total in zip(free, totals, strict=False):
            slots = (blocks[:, None] * block_size + torch.arange(block_size)).flatten()[:total].to(DEVICE)
            k, v = torch.randn(2, total, kv_heads, head_dim, generator=generator).to(DEVICE, dtype)
            for layer in range(num_layers):
                self.pool.write(layer, slots, k, v)
            self.kv.append((k, v))
        tables = torch.zeros(len(decode), max(counts[: len(decode)], default=0), dtype=torch.int64)
        for row, blocks in enumerate(free[: len(decode)]):
            tables[row, : len(blocks)] = blocks
        slices, row = [], len(decode)
        for place, blocks in zip(places, free[len(decode) :], strict=False):
            slices.append(PrefillSlice(row, len(place), place[-1] + 1, blocks.to(DEVICE)))
            row += len(place)
        positions = [length - 1 for length in decode] + [position for place in places for position in place]
        unused = torch.empty(0, dtype=torch.int64, device=DEVICE)
        self.batch = ForwardBatch(
            token_ids=unused,
            positions=torch.tensor(positions, dtype=torch.int64, device=DEVICE),
            slots=unused,
            num_decode=len(decode),
            block_tables=tables.to(DEVICE),
            context_lens=torch.tensor(decode, dtype=torch.int64, device=DEVICE),
            max_context_len=max(decode, default=0),
            prefills=slices,
            logit_rows=unused,
        )
        self.q = torch.randn(row, kv_heads * group, head_dim, generator=generator).to(DEVICE, dtype)

    def expected(self, window: int | None) -> tuple[Tensor, Tensor]:
        rows = [slice(row, row + 1) for row in range(self.batch.num_decode)]
        rows += [slice(s.row, s.row + s.num_tokens) for s in self.batch.prefills]
        positions = self.batch.positions.tolist()
        parts = [
            reference(self.q[own], k, v, positions[own], window) for own, (k, v) in zip(rows, self.kv, strict=True)
        ]
        return torch.cat([o for o, _ in parts]), torch.cat([lse for _, lse in parts])

    def decode(self, window: int | None = None, max_context_len: int | None = None) -> tuple[Tensor, Tensor]:
        batch = self.batch
        return paged_decode(
            self.q[: batch.num_decode],
            self.pool.k[0],
            self.pool.v[0],
            batch.block_tables,
            batch.context_lens,
            max_context_len=max_context_len or batch.max_context_len,
            scale=self.q.shape[-1] ** -0.5,
            window=window,
        )

    def prefill(self, window: int | None = None) -> tuple[Tensor, Tensor]:
        tables: list[Tensor] = []
        rows: list[tuple[int, int, int]] = []
        for piece in self.batch.prefills:
            rows.append((piece.row, piece.num_tokens, sum(len(table) for table in tables)))
            tables.append(piece.block_ids)
        return paged_prefill(
            self.q,
            self.pool.k[0],
            self.pool.v[0],
            torch.cat(tables),
            torch.tensor(rows, dtype=torch.int32, device=DEVICE),
            self.batch.positions,
            max_tokens=max(piece.num_tokens for piece in self.batch.prefills),
            scale=self.q.shape[-1] ** -0.5,
            window=window,
        )


def assert_agree(found: tuple[Tensor, ...], expected: tuple[Tensor, ...], dtype: torch.dtype) -> None:
    for got, want in zip(found, expected, strict=True):
        torch.testing.assert_close(got.float().cpu(), want, atol=TOLERANCE[dtype], rtol=TOLERANCE[dtype])
