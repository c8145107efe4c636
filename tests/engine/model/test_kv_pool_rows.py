"""Rows in and out of the KV pool: any slots, any part of a payload, read-only or unaligned."""

from __future__ import annotations

import random

import pytest
import torch

from tandem.engine.model.batch import KvPool, _tensor_over

BLOCK = 16


def make_pool(dtype: torch.dtype, kv_heads: int = 2, head_dim: int = 16) -> KvPool:
    return KvPool(3, 8, BLOCK, kv_heads, head_dim, dtype, torch.device("cpu"))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("kv_heads", "head_dim"), [(2, 16), (1, 6)])
@pytest.mark.parametrize("unaligned", [0, 1, 8])
def test_rows_come_back_as_they_were_written(dtype: torch.dtype, kv_heads: int, head_dim: int, unaligned: int) -> None:
    rng = random.Random(1)
    pool = make_pool(dtype, kv_heads, head_dim)
    slots = torch.tensor(rng.sample(range(BLOCK, 8 * BLOCK), 40))
    raw = rng.randbytes(unaligned + 40 * pool.row_bytes)
    payload = memoryview(raw)[unaligned:]
    assert payload.readonly
    pool.write_rows(1, slots, payload)
    out = bytearray(payload.nbytes)
    pool.read_rows(1, slots, memoryview(out))
    assert out == payload
    assert not pool.storage[0].any()
    assert not pool.storage[2].any()
    # The layout is [K|V][token][kv_head][dim], and storage is what the model reads.
    k = torch.frombuffer(bytearray(payload), dtype=dtype).view(2, 40, kv_heads, head_dim)[0]
    rows = pool.k[1].reshape(8 * BLOCK, kv_heads, head_dim)[slots]
    assert torch.equal(rows.view(torch.uint8), k.contiguous().view(torch.uint8))


def test_a_part_of_the_tokens_of_a_payload() -> None:
    pool = make_pool(torch.float32)
    payload = torch.arange(2 * 10 * 32, dtype=torch.float32)
    slots = torch.arange(BLOCK, BLOCK + 4)
    pool.write_rows(0, slots, memoryview(payload.numpy()).cast("B"), skip=3)
    whole = payload.view(2, 10, 2, 16)
    assert torch.equal(pool.k[0][1, :4], whole[0, 3:7])
    assert torch.equal(pool.v[0][1, :4], whole[1, 3:7])
    assert not pool.k[0][1, 4:].any()


def test_a_tensor_over_read_only_bytes_shares_them() -> None:
    raw = bytes(range(64))
    assert _tensor_over(memoryview(raw)).tolist() == list(raw)
