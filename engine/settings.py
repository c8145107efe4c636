"""Settings of one engine. Prefill and decode workers embed this class in theirs."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar, Literal

from tandem.common.errors import ConfigError
from tandem.common.settings import Group

MAX_WAITING = 1024
"""Requests in an engine's queue, which routers keep short; more are refused with `overloaded`."""
CPU_POOL_BYTES = 256 << 20
"""The KV pool on a CPU, unless settings say otherwise."""
STEP_SIZES = {"cpu": (64, 512), "cuda": (256, 8192)}
"""max_num_seqs and max_num_batched_tokens by device, unless settings say otherwise. A GPU reads its weights once per
step, however many tokens share it; a CPU computes for as long as there are tokens."""
EXPORT_LEASE_S = 30.0
"""How long a prefilled request may hold its blocks for a hand-over that is never confirmed."""


@dataclass(frozen=True, slots=True)
class EngineConfig:
    """Which model is served, and how much memory and work a step may take."""

    basics: ClassVar[Group]
    """Basics"""
    model: str
    """A folder in Hugging Face format, or a hub id (OWNER/NAME)."""
    served_model_name: str | None = None
    """The name clients use. None: the last part of `model`."""

    memory: ClassVar[Group]
    """Memory and batches: how much a worker may hold and compute at once."""
    kv_cache_bytes: int | None = None
    """The bound of the KV pool. None: 256 MiB on a CPU (touched only as it fills), 80 % of what the weights leave on
    a GPU."""
    gpu_memory_bytes: int | None = None
    """What a worker may take of its GPU, weights and KV pool and all. None: what is free; `tandem serve` gives workers
    on one GPU equal parts of it."""
    max_model_len: int | None = None
    """Tokens of prompt and output together. None: the model's limit, or what the KV pool can hold if that is less."""
    max_num_seqs: int = 0
    """Requests that are computed, or wait for KV with blocks reserved, at one time. 0: 64 on a CPU, 256 on a GPU."""
    max_num_batched_tokens: int = 0
    """Tokens computed in one step. 0: 512 on a CPU, 8192 on a GPU. Decodes come first; prompts share the rest in
    chunks, so this bounds how long a long prompt can delay the next token of everybody else. On a CPU, where a step's
    time grows with its tokens, prompts get a quarter of it while others decode."""
    enable_prefix_caching: bool = True
    """Keep the KV of finished requests until its memory is needed, and reuse equal prefixes of the same tenant."""
    block_size: int = 16
    """Tokens per KV block, a multiple of 16. Both ends of a hand-over may differ in it; rows travel, not blocks."""

    engine: ClassVar[Group]
    """Engine: how a worker computes."""
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """Number format of weights and KV. auto: bfloat16 on a GPU and on processors that compute in it, else float32."""
    quantization: Literal["int8"] | None = None
    """int8: weights only, quantised while loading."""
    device: str = "auto"
    """auto: cuda where there is one, else cpu."""
    num_threads: int = 1
    """CPU threads of one forward step."""
    attention: Literal["auto", "torch", "triton"] = "auto"
    """auto: triton on a GPU, on a CPU C kernels where they can be compiled. torch: plain torch."""
    batch_invariant: bool = False
    """A request's output depends on nothing else, to the bit: not on other requests, the chunks of its prompt, or what
    is computed again. On a CPU in float32 and bfloat16, where there is a C compiler; the start is refused where it
    cannot be had. Workers that share KV need the same value. docs/architecture.md says what it costs."""

    def __post_init__(self) -> None:
        if self.block_size <= 0 or self.block_size % 16:
            raise ConfigError(f"block_size {self.block_size}: must be a positive multiple of 16")
        for name, least in (("max_num_seqs", 0), ("max_num_batched_tokens", 0), ("num_threads", 1)):
            if getattr(self, name) < least:
                raise ConfigError(f"{name} {getattr(self, name)}: must be at least {least}")
        if 0 < self.max_num_batched_tokens < self.max_num_seqs + self.block_size:
            raise ConfigError(
                f"max_num_batched_tokens {self.max_num_batched_tokens}: must be at least max_num_seqs + block_size "
                f"({self.max_num_seqs} + {self.block_size}), so that prompts advance while every other slot decodes"
            )
        if self.max_model_len is not None and self.max_model_len < 2:
            raise ConfigError(f"max_model_len {self.max_model_len}: must be at least 2, a prompt token and an output")

    def sized_for(self, device: str) -> EngineConfig:
        """The settings with the steps of `device` (cpu or cuda) where none are given. Raises ConfigError where what is
        given does not go with them."""
        seqs, tokens = STEP_SIZES[device]
        return replace(
            self,
            max_num_seqs=self.max_num_seqs or seqs,
            max_num_batched_tokens=self.max_num_batched_tokens or tokens,
        )
