"""A worker takes of a GPU what it was given and no more. The device is a stand-in: only its figures are asked for."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from tandem.common.errors import ConfigError
from tandem.engine.model import memory
from tandem.engine.model.loader import device_of
from tandem.engine.model.memory import CONTEXT_BYTES, GPU_POOL_SHARE, limit_gpu_memory, make_pool
from tandem.engine.settings import EngineConfig

GIB = 1 << 30
GPU = torch.device("cuda:1")
MODEL = SimpleNamespace(num_layers=32, num_kv_heads=8, head_dim=128, max_position_embeddings=4096)
LOADED = SimpleNamespace(config=MODEL, device=GPU, dtype=torch.bfloat16)
BLOCK_BYTES = 16 * 2 * 32 * 8 * 128 * 2


@pytest.fixture(autouse=True)
def gpu(monkeypatch: pytest.MonkeyPatch) -> dict[str, float]:
    """80 GiB, 60 of them free; 15 GiB of weights are loaded. Gives the shares that were set as limits."""
    limits: dict[str, float] = {}
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (60 * GIB, 80 * GIB))
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda device: 15 * GIB)
    monkeypatch.setattr(
        torch.cuda, "set_per_process_memory_fraction", lambda share, device: limits.update({str(device): share})
    )
    monkeypatch.setattr(memory, "KvPool", lambda layers, blocks, *rest: blocks)
    return limits


def pool_bytes(**settings: int) -> int:
    blocks, _ = make_pool(EngineConfig(model="m", **settings), LOADED)  # type: ignore[arg-type]
    return int(blocks) * BLOCK_BYTES  # type: ignore[call-overload]


def about(size: float) -> object:
    return pytest.approx(size, abs=BLOCK_BYTES)


def test_the_pool_is_made_of_what_the_weights_leave_of_the_workers_part() -> None:
    assert pool_bytes() == about(60 * GIB * GPU_POOL_SHARE)
    assert pool_bytes(gpu_memory_bytes=40 * GIB) == about((25 * GIB - CONTEXT_BYTES) * GPU_POOL_SHARE)
    assert pool_bytes(gpu_memory_bytes=80 * GIB) == about(60 * GIB * GPU_POOL_SHARE)
    assert pool_bytes(gpu_memory_bytes=40 * GIB, kv_cache_bytes=GIB) == about(GIB)


def test_a_part_that_the_weights_fill_is_refused() -> None:
    with pytest.raises(ConfigError, match="the weights take 15 GiB and leave no room for KV"):
        pool_bytes(gpu_memory_bytes=15 * GIB)


def test_more_than_the_part_cannot_be_taken(gpu: dict[str, float]) -> None:
    limit_gpu_memory(None, GPU)
    limit_gpu_memory(GIB, torch.device("cpu"))
    assert not gpu
    limit_gpu_memory(40 * GIB, GPU)
    assert gpu == {"cuda:1": (40 * GIB - CONTEXT_BYTES) / (80 * GIB)}


@pytest.mark.parametrize("size", [CONTEXT_BYTES, 81 * GIB])
def test_a_part_that_cannot_be_is_refused(size: int) -> None:
    with pytest.raises(ConfigError, match=f"gpu_memory_bytes {size}: must be"):
        limit_gpu_memory(size, GPU)


def test_a_gpu_that_is_not_there_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert device_of("cuda:1") == GPU
    with pytest.raises(ConfigError, match="'cuda:2' is not available: torch sees 2 CUDA devices"):
        device_of("cuda:2")
