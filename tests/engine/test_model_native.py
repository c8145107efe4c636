"""The optional C kernels against plain torch, and what happens where they cannot be compiled."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from tandem.engine import native, native_build
from tandem.engine.attention import ReferenceAttention
from tandem.engine.batch import ForwardBatch, KvPool
from tandem.engine.config import RopeConfig
from tandem.engine.loader import load_model
from tandem.engine.native import NativeKernels, load_kernels
from tandem.engine.rope import RotaryTable, rotate
from tests.engine.paged_model import PagedModel
from tests.models import tiny_model

CPU = torch.device("cpu")
ROUNDING = 2**-8


@pytest.fixture(scope="module")
def kernels() -> NativeKernels:
    if "-mavx512bf16" not in native_build.instruction_flags():
        pytest.skip("this processor has no AVX512-BF16")
    loaded = load_kernels()
    if loaded is None:
        pytest.skip("no C compiler")
    return loaded


@pytest.fixture
def fresh_cache() -> Iterator[None]:
    for cached in (load_kernels, native_build.compiled):
        cached.cache_clear()
    yield
    for cached in (load_kernels, native_build.compiled):
        cached.cache_clear()


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).bfloat16()


def assert_close(ours: Tensor, exact: Tensor) -> None:
    """Within the rounding of the result to bfloat16."""
    assert ours.dtype == torch.bfloat16
    torch.testing.assert_close(ours.float(), exact, rtol=ROUNDING, atol=1e-3)


@pytest.mark.parametrize(("rows", "size"), [(1, 16), (3, 384), (17, 1008)])
def test_norms_agree(kernels: NativeKernels, rows: int, size: int) -> None:
    x, weight = random(rows, size) * 3, torch.rand(size) + 0.5
    assert_close(kernels.rms_norm(x, weight, 1e-5), F.rms_norm(x.float(), (size,), weight, 1e-5))
    zeros = torch.zeros(rows, size).bfloat16()
    assert kernels.rms_norm(zeros, weight, 1e-5).eq(0).all()


def test_gates_agree_over_the_whole_range(kernels: NativeKernels) -> None:
    gate = torch.cat((torch.linspace(-20, 20, 4064), torch.tensor([-1e4, -200, -90, -88, -87, 87, 88, 89] * 4)))
    gate_up = torch.cat((gate, random(4096, seed=1).float())).bfloat16().view(1, -1)
    exact = F.silu(gate_up[:, :4096].float()) * gate_up[:, 4096:].float()
    assert_close(kernels.silu_mul(gate_up), exact)


@pytest.mark.parametrize("norms", [False, True])
@pytest.mark.parametrize(("heads", "kv_heads", "head_dim"), [(6, 2, 64), (3, 3, 32), (8, 1, 128), (2, 1, 96)])
def test_rotation_and_writing_agree(
    kernels: NativeKernels, heads: int, kv_heads: int, head_dim: int, norms: bool
) -> None:
    rows = 5
    pool = KvPool(2, 4, 16, kv_heads, head_dim, torch.bfloat16, CPU)
    slots = torch.tensor([17, 63, 16, 40, 21])
    qkv = random(rows, heads + 2 * kv_heads, head_dim)
    weights = (torch.rand(head_dim) + 0.5, torch.rand(head_dim) + 0.5) if norms else None
    table, positions = RotaryTable(RopeConfig(), head_dim, 2048, CPU), torch.tensor([0, 1, 77, 2047, 5])
    q, k = qkv[:, :heads].float(), qkv[:, heads:-kv_heads].float()
    v = qkv[:, -kv_heads:].clone()
    if weights is not None:
        q, k = (F.rms_norm(x, (head_dim,), weight, 1e-6) for x, weight in zip((q, k), weights, strict=True))
    q, k = (rotate(x, *table.at(positions, torch.float32)) for x in (q, k))
    kernels.rotate_and_write(qkv, weights, 1e-6, table.angles(positions), 1, slots, pool)
    tolerance = {"rtol": 2 * ROUNDING, "atol": 2e-2} if norms else {"rtol": ROUNDING, "atol": 1e-3}
    torch.testing.assert_close(qkv[:, :heads].float(), q, **tolerance)
    torch.testing.assert_close(pool.k[1].flatten(0, 1)[slots].float(), k, **tolerance)
    assert torch.equal(pool.v[1].flatten(0, 1)[slots], v)
    written = torch.zeros(64, dtype=torch.bool)
    written[slots] = True
    assert pool.storage[0].eq(0).all()
    assert pool.storage[1].flatten(1, 2)[:, ~written].eq(0).all()


@pytest.mark.parametrize("window", [None, 1, 30, 200])
@pytest.mark.parametrize("group", [1, 2, 3, 4, 5, 7, 9])
@pytest.mark.parametrize("head_dim", native.HEAD_DIMS)
def test_decode_attention_agrees(kernels: NativeKernels, head_dim: int, group: int, window: int | None) -> None:
    lengths, block_size, kv_heads = [1, 16, 17, 250, 33], 32, 2
    pool = KvPool(1, 60, block_size, kv_heads, head_dim, torch.bfloat16, CPU)
    pool.storage.copy_(random(*pool.storage.shape, seed=3))
    order = torch.randperm(59, generator=torch.Generator().manual_seed(4)) + 1
    tables = torch.zeros(len(lengths), 8, dtype=torch.int64)
    for row, length in enumerate(lengths):
        blocks = -(-length // block_size)
        tables[row, :blocks] = order[row * 9 : row * 9 + blocks]
    nothing = torch.zeros(len(lengths), dtype=torch.int64)
    batch = ForwardBatch(
        nothing, nothing, nothing, len(lengths), tables, torch.tensor(lengths), max(lengths), [], nothing
    )
    strided = random(len(lengths), kv_heads * group + 3, head_dim, seed=5) * 2
    q = strided[:, : kv_heads * group]
    out = torch.full((len(lengths) + 1, q.shape[1] * head_dim), 7.0, dtype=torch.bfloat16)
    kernels.paged_decode(q, 0, window, batch, pool, out)
    expected = ReferenceAttention((window,)).attend(0, q.float(), batch, pool)
    torch.testing.assert_close(out[:-1].float(), expected, rtol=ROUNDING, atol=2e-3)
    assert out[-1].eq(7).all()


@pytest.mark.parametrize("family", ["llama", "qwen3"])
def test_a_model_with_them_is_as_exact_as_one_without(kernels: NativeKernels, family: str, tmp_path: Path) -> None:
    folder = tiny_model(family, tmp_path / family, head_dim=32, num_attention_heads=6, hidden_size=192)
    tokens = [(11 * index) % 512 for index in range(150)]

    def logits(dtype: str, attention: str) -> Tensor:
        loaded = load_model(folder, dtype=dtype, device="cpu", quantization=None, attention=attention)
        assert (loaded.decoder.native is not None) == (dtype == "bfloat16" and attention == "auto")
        paged = PagedModel(loaded, 1, 256)
        first = paged.prefill(0, tokens[:100])
        return torch.cat([first, *(paged.step([(0, token)])[0] for token in tokens[100:])])

    exact = logits("float32", "auto")
    errors = [(logits("bfloat16", attention) - exact).norm().item() for attention in ("auto", "torch")]
    assert errors[0] < 1.1 * errors[1]


@pytest.mark.usefixtures("fresh_cache")
def test_without_a_compiler_torch_is_used(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(native_build.shutil, "which", lambda name: None)
    assert load_kernels() is None
    folder = tiny_model("llama", tmp_path / "model", head_dim=32)
    loaded = load_model(folder, dtype="bfloat16", device="cpu", quantization=None)
    assert loaded.decoder.native is None
    assert PagedModel(loaded, 1, 64).prefill(0, [3, 4, 5]).isfinite().all()


@pytest.mark.usefixtures("fresh_cache")
def test_a_compiler_that_fails_is_reported(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    compiler = tmp_path / "cc"
    compiler.write_text("#!/bin/sh\necho no such option >&2\nexit 3\n")
    compiler.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    with caplog.at_level(logging.WARNING):
        assert load_kernels() is None
    assert "no such option" in caplog.text
    assert list((tmp_path / "cache" / "tandem").iterdir()) == []


@pytest.mark.usefixtures("fresh_cache", "kernels")
def test_they_are_compiled_once_per_machine(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    native_build.compiled.cache_clear()
    assert load_kernels() is not None
    (built,) = (tmp_path / "tandem").iterdir()
    before = built.stat()
    load_kernels.cache_clear()
    native_build.compiled.cache_clear()
    assert load_kernels() is not None
    assert built.stat() == before
