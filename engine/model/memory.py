"""How large the KV pool is, and so how long a request may be."""

from __future__ import annotations

import logging

import torch

from tandem.common.errors import ConfigError
from tandem.common.memory import readable_size, usable_memory
from tandem.engine.model.batch import KvPool
from tandem.engine.model.loader import LoadedModel
from tandem.engine.settings import CPU_POOL_BYTES, EngineConfig

logger = logging.getLogger(__name__)

GPU_POOL_SHARE = 0.8
"""Share of the memory that is free once the weights are loaded."""
CONTEXT_BYTES = 600 << 20
"""What CUDA and loaded kernels take of a GPU for a process, beside torch's allocations."""


def limit_gpu_memory(gpu_memory_bytes: int | None, device: torch.device) -> None:
    """Keeps this process from taking more, so that one which shares the GPU has what it was promised. Raises
    ConfigError."""
    if gpu_memory_bytes is None or device.type != "cuda":
        return
    total = torch.cuda.mem_get_info(device)[1]
    if not CONTEXT_BYTES < gpu_memory_bytes <= total:
        raise ConfigError(
            f"gpu_memory_bytes {gpu_memory_bytes}: must be more than CUDA itself takes ({readable_size(CONTEXT_BYTES)})"
            f" and at most what {device} has ({readable_size(total)})"
        )
    torch.cuda.set_per_process_memory_fraction((gpu_memory_bytes - CONTEXT_BYTES) / total, device)


def make_pool(config: EngineConfig, loaded: LoadedModel) -> tuple[KvPool, int]:
    """Returns the pool and max_model_len (tokens). Raises ConfigError if the pool cannot hold one such request."""
    model, device = loaded.config, loaded.device
    budget = config.kv_cache_bytes
    if budget is None and device.type == "cuda":
        budget = int(_free_on_gpu(config.gpu_memory_bytes, device) * GPU_POOL_SHARE)
    elif budget is None:
        budget = CPU_POOL_BYTES
    if device.type == "cpu" and budget > (usable := usable_memory()):
        raise ConfigError(
            f"kv_cache_bytes {budget}: more than the memory there is ({readable_size(usable)}); give less"
        )
    row_bytes = 2 * model.num_layers * model.num_kv_heads * model.head_dim * loaded.dtype.itemsize
    num_blocks, max_model_len = pool_size(
        budget, config.block_size * row_bytes, config.block_size, config.max_model_len, model.max_position_embeddings
    )
    if config.max_model_len is None and max_model_len < model.max_position_embeddings:
        logger.warning(
            "the KV pool of %d MiB limits requests to %d tokens, the model allows %d; raise kv_cache_bytes",
            budget >> 20,
            max_model_len,
            model.max_position_embeddings,
        )
    try:
        pool = KvPool(
            model.num_layers, num_blocks, config.block_size, model.num_kv_heads, model.head_dim, loaded.dtype, device
        )
    except (RuntimeError, MemoryError) as error:  # torch has one exception for all that an allocator says
        raise ConfigError(f"kv_cache_bytes {budget}: the memory cannot be had; give less") from error
    return pool, max_model_len


def _free_on_gpu(gpu_memory_bytes: int | None, device: torch.device) -> int:
    """Bytes that this process may still take. Raises ConfigError if there are none."""
    free = torch.cuda.mem_get_info(device)[0]
    if gpu_memory_bytes is None:
        return free
    weights = torch.cuda.memory_reserved(device)
    left = gpu_memory_bytes - CONTEXT_BYTES - weights
    if left <= 0:
        raise ConfigError(
            f"gpu_memory_bytes {gpu_memory_bytes}: the weights take {readable_size(weights)} and leave no room for KV; "
            "give more, or put fewer workers on the GPU"
        )
    return min(free, left)


def pool_size(
    budget: int, block_bytes: int, block_size: int, max_model_len: int | None, model_limit: int
) -> tuple[int, int]:
    """Returns (blocks, max_model_len) for `budget` bytes; one block is never handed out, padding points at it.

    Without a `max_model_len` it is what the model allows and the pool holds. Raises ConfigError if an explicit one
    exceeds the model's limit or the pool, or if the pool holds next to nothing.
    """
    if max_model_len is not None and max_model_len > model_limit:
        raise ConfigError(f"max_model_len {max_model_len}: the model was made for {model_limit} tokens at most")
    blocks = budget // block_bytes
    capacity = max(blocks - 1, 0) * block_size
    wanted = max_model_len or model_limit
    if capacity < (max_model_len or 2):
        needed = (-(-wanted // block_size) + 1) * block_bytes
        raise ConfigError(
            f"kv_cache_bytes {budget}: holds {capacity} tokens, one request of {wanted} tokens needs {needed} bytes; "
            "raise kv_cache_bytes or lower max_model_len"
        )
    return blocks, min(wanted, capacity)
