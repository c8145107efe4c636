"""Loads a model folder: config, weights, attention backend and the identity of the KV it will compute."""

from __future__ import annotations

import json
import logging
import platform
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from blake3 import blake3

from tandem.common.checkpoint import MAX_LONG_BYTES
from tandem.common.errors import ConfigError
from tandem.common.fingerprint import fingerprint, shown
from tandem.engine.model.attention import AttentionBackend, ReferenceAttention
from tandem.engine.model.batch_invariance import arithmetic, check_batch_invariant
from tandem.engine.model.config import ModelConfig
from tandem.engine.model.cpu_attention import CpuAttention
from tandem.engine.model.fixed_linear import faster_than_library
from tandem.engine.model.model import Decoder
from tandem.engine.model.native import NativeKernels, load_kernels, supports_attention, supports_rows
from tandem.engine.model.native_attention import NativeAttention
from tandem.engine.model.row_probe import RowPromise, row_promise
from tandem.engine.model.weights import Checkpoint
from tandem.kvstore.identity import KvIdentity, Namespace, namespace

logger = logging.getLogger(__name__)

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
QUANTIZATIONS = ("int8",)
ATTENTIONS = ("auto", "torch", "triton")
KV_LAYOUT = "[K|V][token][kv_head][dim]"
_COMPATIBILITY_KEY = blake3(b"tandem kv compatibility v1").digest()


@dataclass(frozen=True, slots=True)
class LoadedModel:
    """A model ready to run."""

    decoder: Decoder
    config: ModelConfig
    dtype: torch.dtype
    """Dtype of the weights, activations and the KV pool."""
    device: torch.device
    namespace: Namespace
    """Identity of its KV, without a tenant's salt."""
    compatibility: bytes
    """32 bytes; workers whose values are equal may exchange KV."""
    rows: RowPromise
    fingerprint: bytes
    """Of `common/fingerprint.py`."""

    @property
    def row_invariant(self) -> bool:
        """Whether a row's logits and KV depend on its own tokens only, bit for bit, however it is batched or
        chunked."""
        return self.rows.holds


def load_model(
    folder: Path,
    *,
    dtype: str,
    device: str,
    quantization: str | None,
    attention: str = "auto",
    batch_invariant: bool = False,
) -> LoadedModel:
    """Loads `folder` (Hugging Face format) for inference.

    `dtype` is auto, float32, bfloat16 or float16; `device` is auto, cpu, cuda or cuda:N; `quantization` is None or
    int8 (weights only, CPU); `attention` is auto, torch or triton: auto is triton on a GPU, and on the CPU torch with
    native kernels where they can be had (`native.py`; set torch's thread count before). `batch_invariant`: a row's bits
    depend on nothing but its own tokens, by construction. Raises ConfigError for anything unusable.
    """
    target = device_of(device)
    config = ModelConfig.from_folder(folder)
    kind = _dtype(dtype, target)
    if quantization is not None and quantization not in QUANTIZATIONS:
        raise ConfigError(f"quantization: {quantization!r} is not supported; supported: {', '.join(QUANTIZATIONS)}")
    if quantization is not None and target.type != "cpu":
        raise ConfigError(f"quantization: {quantization} is supported on the CPU only, not on {target}")
    if batch_invariant:
        check_batch_invariant(config, kind, target, quantization, attention)
    native = None
    if attention == "auto" and supports_attention(kind, target, config.head_dim):
        native = load_kernels(kind)
    backend = _attention(attention, config, target, native, batch_invariant)
    if not batch_invariant and not supports_rows(config.hidden_size, config.intermediate_size, config.head_dim):
        native = None
    fixed_sums = batch_invariant or (native is not None and quantization is None and faster_than_library(kind))
    with Checkpoint(folder) as checkpoint:
        decoder = Decoder(
            config,
            checkpoint,
            backend,
            dtype=kind,
            device=target,
            quantization=quantization,
            native=native,
            fixed_sums=fixed_sums,
        )
        weights_digest = checkpoint.digest()
    known_by = fingerprint(folder)
    logger.info("the model's fingerprint is %s", shown(known_by))
    identity = namespace(
        KvIdentity(
            weights_digest=weights_digest,
            tokenizer_digest=_file_digest(folder / "tokenizer.json"),
            kv_dtype=str(kind).removeprefix("torch."),
            layout=KV_LAYOUT,
            rope=json.dumps(asdict(config.rope), sort_keys=True),
            attention=json.dumps(
                {
                    "num_heads": config.num_heads,
                    "num_kv_heads": config.num_kv_heads,
                    "head_dim": config.head_dim,
                    "sliding_windows": config.sliding_windows,
                    "rms_norm_eps": config.rms_norm_eps,
                    "quantization": quantization,
                }
                | ({"batch_invariant": arithmetic(kind, target)} if batch_invariant else {}),
                sort_keys=True,
            ),
            num_layers=config.num_layers,
        )
    )
    compatibility = blake3(identity, key=_COMPATIBILITY_KEY).digest()
    rows = RowPromise(True, "batch_invariant") if batch_invariant else row_promise(decoder, identity)
    logger.info(
        "a row's bits %s on its own tokens alone: %s", "depend" if rows.holds else "may not depend", rows.reason
    )
    return LoadedModel(decoder, config, kind, target, identity, compatibility, rows, known_by)


def device_of(name: str) -> torch.device:
    """auto: cuda where there is one, else cpu. Raises ConfigError if it is not there."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise ConfigError(f"device: {name!r} is not a device; use auto, cpu or cuda") from error
    if device.type not in ("cpu", "cuda"):
        raise ConfigError(f"device: {name!r} is not supported; use auto, cpu or cuda")
    if device.type == "cuda" and not torch.cuda.is_available():
        raise ConfigError(f"device: {name!r} is not available: torch sees no CUDA device")
    if device.index is not None and device.type == "cuda" and device.index >= torch.cuda.device_count():
        raise ConfigError(f"device: {name!r} is not available: torch sees {torch.cuda.device_count()} CUDA devices")
    return device


def _dtype(name: str, device: torch.device) -> torch.dtype:
    """auto: bfloat16 where the device computes in it, else float32."""
    if name == "auto":
        return torch.bfloat16 if device.type == "cuda" or _cpu_computes_bfloat16() else torch.float32
    if name not in DTYPES:
        raise ConfigError(f"dtype: {name!r} is not supported; use auto, {', '.join(DTYPES)}")
    return DTYPES[name]


def _cpu_computes_bfloat16() -> bool:
    """Not merely emulated: oneDNN also accepts bfloat16 on processors with AVX-512 only, where it is slow."""
    if platform.machine() in ("x86_64", "AMD64"):
        return torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())


def _attention(
    name: str, config: ModelConfig, device: torch.device, native: NativeKernels | None, batch_invariant: bool
) -> AttentionBackend:
    """auto: triton on a GPU. torch on a GPU is the slow reference."""
    if name not in ATTENTIONS:
        raise ConfigError(f"attention: {name!r} is not supported; use {', '.join(ATTENTIONS)}")
    on_gpu = device.type == "cuda"
    if name == "triton" or (name == "auto" and on_gpu):
        if not on_gpu:
            raise ConfigError("attention: triton needs a GPU; use auto or torch")
        try:
            from tandem.engine.model.kernels.backend import TritonAttention
        except ImportError as error:
            raise ConfigError("attention: triton is not installed; install tandem-llm[gpu]") from error
        return TritonAttention(config.sliding_windows, batch_invariant=batch_invariant)
    if on_gpu:
        return ReferenceAttention(config.sliding_windows)
    return CpuAttention(config.sliding_windows) if native is None else NativeAttention(config.sliding_windows, native)


def _file_digest(path: Path) -> bytes:
    """Empty where there is no such file. Raises ConfigError where it is too large."""
    if not path.is_file():
        return b""
    if path.stat().st_size > MAX_LONG_BYTES:
        raise ConfigError(f"{path}: has more than {MAX_LONG_BYTES} bytes; no model needs that")
    return blake3(path.read_bytes()).digest()
