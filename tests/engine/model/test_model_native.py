"""The optional C kernels against plain torch, and what happens where they cannot be compiled."""

from __future__ import annotations

import logging
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from tandem.engine.model import native_build
from tandem.engine.model.batch import KvPool
from tandem.engine.model.config import RopeConfig
from tandem.engine.model.loader import load_model
from tandem.engine.model.native import NativeKernels, load_kernels
from tandem.engine.model.rope import RotaryTable, rotate
from tests.engine.paged_model import PagedModel
from tests.models import tiny_model

CPU = torch.device("cpu")
ROUNDING = {torch.float32: 2e-6, torch.bfloat16: 2**-8}
NEAR_ZERO = {torch.float32: 1e-6, torch.bfloat16: 1e-3}


@pytest.fixture(scope="module", params=[torch.float32, torch.bfloat16], ids=str)
def dtype(request: pytest.FixtureRequest) -> torch.dtype:
    chosen: torch.dtype = request.param
    return chosen


@pytest.fixture(scope="module")
def kernels(dtype: torch.dtype) -> NativeKernels:
    loaded = load_kernels(dtype)
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
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def assert_close(ours: Tensor, exact: Tensor, dtype: torch.dtype) -> None:
    """Within the rounding of the result."""
    assert ours.dtype == dtype
    torch.testing.assert_close(
        ours.float(), exact, rtol=ROUNDING[dtype], atol=1e-3 if dtype == torch.bfloat16 else 1e-6
    )


@pytest.mark.parametrize(("rows", "size"), [(1, 16), (3, 384), (17, 1008)])
def test_norms_agree(kernels: NativeKernels, dtype: torch.dtype, rows: int, size: int) -> None:
    x, weight = (random(rows, size) * 3).to(dtype), torch.rand(size) + 0.5
    assert_close(kernels.rms_norm(x, weight, 1e-5), F.rms_norm(x.float(), (size,), weight, 1e-5), dtype)
    zeros = torch.zeros(rows, size, dtype=dtype)
    assert kernels.rms_norm(zeros, weight, 1e-5).eq(0).all()


def test_gates_agree_over_the_whole_range(kernels: NativeKernels, dtype: torch.dtype) -> None:
    gate = torch.cat((torch.linspace(-20, 20, 4064), torch.tensor([-1e4, -200, -90, -88, -87, 87, 88, 89] * 4)))
    gate_up = torch.cat((gate, random(4096, seed=1))).to(dtype).view(1, -1)
    exact = F.silu(gate_up[:, :4096].float()) * gate_up[:, 4096:].float()
    assert_close(kernels.silu_mul(gate_up), exact, dtype)


def test_what_is_not_a_number_stays_so(kernels: NativeKernels, dtype: torch.dtype) -> None:
    x = torch.ones(2, 64, dtype=dtype)
    x[0, 3] = torch.nan
    assert kernels.silu_mul(x)[:, 3].isnan().tolist() == [True, False]
    assert kernels.rms_norm(x, torch.ones(64), 1e-5).isnan().any(dim=1).tolist() == [True, False]


@pytest.mark.parametrize("norms", [False, True])
@pytest.mark.parametrize(("heads", "kv_heads", "head_dim"), [(6, 2, 64), (3, 3, 48), (8, 1, 128), (2, 1, 80)])
def test_rotation_and_writing_agree(
    kernels: NativeKernels, dtype: torch.dtype, heads: int, kv_heads: int, head_dim: int, norms: bool
) -> None:
    rows = 5
    pool = KvPool(2, 4, 16, kv_heads, head_dim, dtype, CPU)
    slots = torch.tensor([17, 63, 16, 40, 21])
    qkv = random(rows, heads + 2 * kv_heads, head_dim).to(dtype)
    weights = (torch.rand(head_dim) + 0.5, torch.rand(head_dim) + 0.5) if norms else None
    table, positions = RotaryTable(RopeConfig(), head_dim, CPU), torch.tensor([0, 1, 77, 2047, 5])
    table.reach(2048)
    q, k = qkv[:, :heads].float(), qkv[:, heads:-kv_heads].float()
    v = qkv[:, -kv_heads:].clone()
    if weights is not None:
        q, k = (F.rms_norm(x, (head_dim,), weight, 1e-6) for x, weight in zip((q, k), weights, strict=True))
    q, k = (rotate(x, *table.at(positions, torch.float32)) for x in (q, k))
    kernels.rotate_and_write(qkv, weights, 1e-6, table.angles(positions), 1, slots, pool)
    atol = NEAR_ZERO[dtype] * (20 if norms else 1)
    for ours, exact in ((qkv[:, :heads], q), (pool.k[1].flatten(0, 1)[slots], k)):
        torch.testing.assert_close(ours.float(), exact, rtol=2 * ROUNDING[dtype], atol=atol)
    assert torch.equal(pool.v[1].flatten(0, 1)[slots], v)
    written = torch.zeros(64, dtype=torch.bool)
    written[slots] = True
    assert pool.storage[0].eq(0).all()
    assert pool.storage[1].flatten(1, 2)[:, ~written].eq(0).all()


@pytest.mark.parametrize("family", ["llama", "qwen3"])
def test_a_model_with_them_is_as_exact_as_one_without(
    kernels: NativeKernels, dtype: torch.dtype, family: str, tmp_path: Path
) -> None:
    folder = tiny_model(family, tmp_path / family, head_dim=32, num_attention_heads=6, hidden_size=192)
    tokens = [(11 * index) % 512 for index in range(150)]

    def logits(dtype: torch.dtype, attention: str) -> Tensor:
        name = str(dtype).removeprefix("torch.")
        loaded = load_model(folder, dtype=name, device="cpu", quantization=None, attention=attention)
        assert (loaded.decoder.native is not None) == (attention == "auto")
        paged = PagedModel(loaded, 1, 256)
        first = paged.prefill(0, tokens[:100])
        return torch.cat([first, *(paged.step([(0, token)])[0] for token in tokens[100:])])

    exact = logits(torch.float32, "torch")
    ours = logits(dtype, "auto")
    if dtype == torch.float32:
        torch.testing.assert_close(ours, exact, rtol=1e-4, atol=1e-4)
    else:
        assert (ours - exact).norm() < 1.1 * (logits(dtype, "torch") - exact).norm()


@pytest.mark.usefixtures("fresh_cache")
def test_without_a_compiler_torch_is_used(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(native_build.shutil, "which", lambda name: None)
    assert load_kernels(torch.float32) is None
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
        assert load_kernels(torch.float32) is None
    assert "no such option" in caplog.text
    assert list((tmp_path / "cache" / "tandem").iterdir()) == []


@pytest.mark.usefixtures("fresh_cache")
@pytest.mark.skipif(shutil.which("cc") is None, reason="no C compiler")
def test_they_are_compiled_once_per_machine(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    native_build.compiled.cache_clear()
    assert load_kernels(torch.float32) is not None
    (built,) = (tmp_path / "tandem").iterdir()
    before = built.stat()
    load_kernels.cache_clear()
    native_build.compiled.cache_clear()
    assert load_kernels(torch.float32) is not None
    assert built.stat() == before
