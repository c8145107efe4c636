"""Settings of one engine. Prefill and decode workers embed this class in theirs."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from tandem.common.errors import ConfigError


@dataclass(frozen=True, slots=True)
class EngineConfig:
    """Which model is served, and how much memory and work a step may take."""

    model: str
    """A folder in Hugging Face format, or a hub id (OWNER/NAME)."""
    served_model_name: str | None = None
    """The name clients use. None: the last part of `model`."""
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """Of weights and KV. auto: bfloat16 on a GPU and on processors that compute in it, else float32."""
    device: str = "auto"
    """auto: cuda where there is one, else cpu."""
    quantization: Literal["int8"] | None = None
    """int8: weights only, quantised while loading."""
    attention: Literal["auto", "torch", "triton"] = "auto"
    """auto: triton on a GPU, on a CPU torch with C kernels where they can be compiled. torch: plain torch, with which a
    decoded row has the same bits as the same row of a prompt."""
    block_size: int = 16
    """Tokens per KV block, a multiple of 16. Both ends of a hand-over may differ in it; rows travel, not blocks."""
    kv_cache_bytes: int | None = None
    """The bound of the KV pool. None: 256 MiB on a CPU (touched only as it fills), 80 % of the free memory on a GPU."""
    max_model_len: int | None = None
    """Tokens of prompt and output together. None: the model's limit, or what the KV pool can hold if that is less."""
    max_num_seqs: int = 64
    """Requests that are computed, or wait for KV with blocks reserved, at one time."""
    max_num_batched_tokens: int = 512
    """Tokens computed in one step. Decodes come first; prompts share the rest in chunks, so this bounds how long a
    long prompt can delay the next token of everybody else."""
    max_waiting: int = 1024
    """Requests in the queue; more are refused with `overloaded`."""
    enable_prefix_caching: bool = True
    """Keep the KV of finished requests until its memory is needed, and reuse equal prefixes of the same tenant."""
    export_lease_s: float = 30.0
    """How long a prefilled request may hold its blocks for a hand-over that is never confirmed."""
    num_threads: int = 1
    """CPU threads of one forward step."""

    def __post_init__(self) -> None:
        if self.block_size <= 0 or self.block_size % 16:
            raise ConfigError(f"block_size {self.block_size}: must be a positive multiple of 16")
        for name in ("max_num_seqs", "max_waiting", "num_threads"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name} {getattr(self, name)}: must be at least 1")
        if self.max_num_batched_tokens < self.max_num_seqs + self.block_size:
            raise ConfigError(
                f"max_num_batched_tokens {self.max_num_batched_tokens}: must be at least max_num_seqs + block_size "
                f"({self.max_num_seqs} + {self.block_size}), so that prompts advance while every other slot decodes"
            )
        if self.max_model_len is not None and self.max_model_len < 2:
            raise ConfigError(f"max_model_len {self.max_model_len}: must be at least 2, a prompt token and an output")
        if self.export_lease_s <= 0:
            raise ConfigError(f"export_lease_s {self.export_lease_s}: must be positive")
