"""The CPU backend against the reference, over random batches with blocks scattered in the pool."""

from __future__ import annotations

from collections.abc import Sequence as Seq

import pytest
import torch

from tandem.engine.model.attention import ReferenceAttention
from tandem.engine.model.batch import ForwardBatch, KvPool, PrefillSlice
from tandem.engine.model.cpu_attention import CpuAttention, _group_rows

TOLERANCE = {torch.float32: 2e-6, torch.bfloat16: 2e-2}


def make_pool(block_size: int, kv_heads: int, head_dim: int, dtype: torch.dtype) -> KvPool:
    pool = KvPool(1, 1200 * 16 // block_size, block_size, kv_heads, head_dim, dtype, torch.device("cpu"))
    pool.storage[:, :, 1:].normal_(generator=torch.Generator().manual_seed(1))
    return pool


def make_batch(
    pool: KvPool, decodes: list[int], prefills: list[tuple[int, int]], scattered: Seq[Seq[int]] = ()
) -> ForwardBatch:
    """`decodes` are context lengths, `prefills` (context, tokens), `scattered` the positions of further slices. Only
    what attention reads is filled in."""
    free = (torch.randperm(pool.num_blocks - 1, generator=torch.Generator().manual_seed(2)) + 1).tolist()

    def blocks(tokens: int) -> list[int]:
        return [free.pop() for _ in range(-(-tokens // pool.block_size))]

    longest = max(decodes, default=0)
    tables = torch.zeros(len(decodes), -(-longest // pool.block_size), dtype=torch.int64)
    for table, length in zip(tables, decodes, strict=True):
        own = torch.tensor(blocks(length))
        table[: len(own)] = own
    slices, row = [], len(decodes)
    positions = [length - 1 for length in decodes]
    for place in (*(range(context, context + tokens) for context, tokens in prefills), *scattered):
        slices.append(PrefillSlice(row, len(place), place[-1] + 1, torch.tensor(blocks(place[-1] + 1))))
        positions += place
        row += len(place)
    nothing = torch.zeros(row, dtype=torch.int64)
    return ForwardBatch(
        nothing, torch.tensor(positions), nothing, len(decodes), tables, torch.tensor(decodes, dtype=torch.int64),
        longest, slices, nothing,
    )  # fmt: skip


BATCHES: dict[str, tuple[list[int], list[tuple[int, int]]]] = {
    "one decode": ([37], []),
    "decodes of like length": ([64, 65, 60, 79, 71], []),
    "decodes of very different lengths": ([1, 900, 17, 512, 513, 2, 300, 1023], []),
    "a prompt": ([], [(0, 300)]),
    "a prompt of one token": ([], [(0, 1)]),
    "chunks with context": ([], [(16, 5), (700, 131), (511, 2)]),
    "everything": ([5, 640, 33], [(0, 43), (100, 1), (257, 200)]),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("window", [None, 3, 64, 600])
@pytest.mark.parametrize("name", BATCHES)
def test_it_agrees_with_the_reference(name: str, window: int | None, dtype: torch.dtype) -> None:
    for kv_heads, group, head_dim, block_size in ((2, 3, 16, 16), (1, 1, 64, 16), (2, 7, 24, 48)):
        pool = make_pool(block_size, kv_heads, head_dim, dtype)
        batch = make_batch(pool, *BATCHES[name])
        q = torch.randn(len(batch.token_ids), kv_heads * group, head_dim, generator=torch.Generator().manual_seed(3))
        q = q.to(dtype)
        ours = CpuAttention((window,)).attend(0, q, batch, pool)
        reference = ReferenceAttention((window,)).attend(0, q, batch, pool)
        assert ours.shape == (q.shape[0], q.shape[1] * q.shape[2])
        assert (ours.float() - reference.float()).abs().max().item() <= TOLERANCE[dtype]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("window", [None, 3, 64])
def test_rows_that_do_not_follow_one_another_see_what_is_before_each(window: int | None, dtype: torch.dtype) -> None:
    pool = make_pool(16, 2, 16, dtype)
    places = ([0, 1, 2, 60, 61, 64, 65, 700], [*range(5, 145), *range(400, 690)], [199], [3, 5])
    batch = make_batch(pool, [37], [(16, 5)], places)
    q = torch.randn(len(batch.token_ids), 6, 16, generator=torch.Generator().manual_seed(3)).to(dtype)
    ours = CpuAttention((window,)).attend(0, q, batch, pool)
    reference = ReferenceAttention((window,)).attend(0, q, batch, pool)
    assert (ours.float() - reference.float()).abs().max().item() <= TOLERANCE[dtype]


def test_layers_with_and_without_a_window_share_a_step() -> None:
    pool = KvPool(3, 200, 16, 2, 16, torch.float32, torch.device("cpu"))
    pool.storage[:, :, 1:].normal_()
    batch = make_batch(pool, [100, 5], [(30, 40)])
    q = torch.randn(42, 4, 16)
    windows = (None, 9, None)
    backend, reference = CpuAttention(windows), ReferenceAttention(windows)
    for _ in range(2):
        for layer in range(3):
            expected = reference.attend(layer, q, batch, pool)
            torch.testing.assert_close(backend.attend(layer, q, batch, pool), expected, atol=2e-6, rtol=0)
        batch = make_batch(pool, [64, 17, 300], [(16, 39)])


def test_a_longer_context_than_before_widens_the_masks() -> None:
    pool = make_pool(16, 2, 16, torch.float32)
    backend, reference = CpuAttention((None,)), ReferenceAttention((None,))
    for context, tokens in ((0, 5), (90, 3), (2000, 33), (40, 300), (5000, 4)):
        batch = make_batch(pool, [], [(context, tokens)])
        q = torch.randn(tokens, 6, 16)
        expected = reference.attend(0, q, batch, pool)
        torch.testing.assert_close(backend.attend(0, q, batch, pool), expected, atol=2e-6, rtol=0)


def test_groups_of_decode_rows_bound_padding_and_memory() -> None:
    assert _group_rows([], 100, 10) == []
    assert _group_rows([5, 5, 4], 100, 10) == [[0, 1, 2]]
    spans = [1, 60, 2, 55, 33, 30, 1, 1, 200]
    groups = _group_rows(spans, 100, 10)
    assert sorted(row for group in groups for row in group) == list(range(len(spans)))
    for group in groups:
        longest = max(spans[row] for row in group)
        assert len(group) * longest <= 100 or len(group) == 1
        assert sum(longest - spans[row] for row in group) <= 10
