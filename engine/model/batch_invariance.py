"""What `batch_invariant` takes: a row's bits depend on nothing but its own tokens, by construction, or the start is
refused. The kernels are `fixed_linear`, `native` and `native_attention` on the CPU, those in `kernels/` on a GPU."""

from __future__ import annotations

import functools
from pathlib import Path

import torch
from blake3 import blake3

from tandem.common.errors import ConfigError
from tandem.engine.model import fixed_linear, native
from tandem.engine.model.config import ModelConfig
from tandem.engine.model.native_build import compiled

_ROOM = Path(__file__).parent


def check_batch_invariant(
    config: ModelConfig, dtype: torch.dtype, device: torch.device, quantization: str | None, attention: str
) -> None:
    """Raises ConfigError with the remedy where the settings, or this machine, rule it out."""
    if quantization is not None:
        raise ConfigError(f"batch_invariant: cannot be had with quantization {quantization}; leave one of them out")
    if attention == "torch":
        raise ConfigError("batch_invariant: cannot be had with attention torch; leave one of them out")
    if device.type == "cuda":
        return
    if dtype not in fixed_linear.MACROS:
        raise ConfigError("batch_invariant: needs dtype float32 or bfloat16 on the CPU")
    sizes = (config.hidden_size, config.intermediate_size, config.head_dim)
    if any(size % 16 for size in sizes) or not native.supports_attention(dtype, device, config.head_dim):
        raise ConfigError(
            "batch_invariant: needs hidden_size, intermediate_size and head_dim that are multiples of 16 on the CPU, "
            f"and a head_dim of at most 256, not {sizes}"
        )
    if fixed_linear.fixed_kernels(dtype) is None or native.load_kernels(dtype) is None:
        raise ConfigError("batch_invariant: needs a C compiler on the CPU (see the log); install gcc or clang")


@functools.cache
def arithmetic(dtype: torch.dtype, device: torch.device) -> str:
    """Names everything that decides on the bits of KV computed with `batch_invariant`, besides the model."""
    if device.type == "cuda":
        import triton

        digest = blake3(b"".join(path.read_bytes() for path in sorted((_ROOM / "kernels").glob("*.py"))))
        versions = (torch.__version__, triton.__version__, torch.cuda.get_device_name(device))
        return " ".join((*versions, digest.hexdigest()[:32]))
    libraries = (compiled(module.SOURCE, *module.MACROS[dtype]) for module in (fixed_linear, native))
    names = (path.stem for path in libraries if path is not None)
    return " ".join((torch.__version__, torch.backends.cpu.get_cpu_capability(), *names))
