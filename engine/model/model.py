"""The decoder: Llama, Mistral, Qwen2 and Qwen3 in one file.

The families differ only in what `ModelConfig` says: biases, norms on q and k, rope settings, sliding windows.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from tandem.engine.model.attention import AttentionBackend
from tandem.engine.model.batch import ForwardBatch, KvPool
from tandem.engine.model.config import ModelConfig
from tandem.engine.model.linear import Linear, make_linear, padded_rows
from tandem.engine.model.native import NativeKernels
from tandem.engine.model.rope import RotaryTable, rotate
from tandem.engine.model.weights import Checkpoint

FIRST_POSITIONS = 4096
"""Sequences of so many tokens can be computed before `Decoder.reach` is told of longer ones."""


def expected_tensors(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Name and shape of every tensor that a checkpoint of this model holds."""
    hidden, inner = config.hidden_size, config.intermediate_size
    q_rows, kv_rows = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
    shapes: dict[str, tuple[int, ...]] = {
        "model.embed_tokens.weight": (config.vocab_size, hidden),
        "model.norm.weight": (hidden,),
    }
    if not config.tie_word_embeddings:
        shapes["lm_head.weight"] = (config.vocab_size, hidden)
    projections = (
        ("self_attn.q_proj", q_rows, hidden, config.qkv_bias),
        ("self_attn.k_proj", kv_rows, hidden, config.qkv_bias),
        ("self_attn.v_proj", kv_rows, hidden, config.qkv_bias),
        ("self_attn.o_proj", hidden, q_rows, config.o_bias),
        ("mlp.gate_proj", inner, hidden, config.mlp_bias),
        ("mlp.up_proj", inner, hidden, config.mlp_bias),
        ("mlp.down_proj", hidden, inner, config.mlp_bias),
    )
    norms = [("input_layernorm", hidden), ("post_attention_layernorm", hidden)]
    if config.qk_norm:
        norms += [("self_attn.q_norm", config.head_dim), ("self_attn.k_norm", config.head_dim)]
    for layer in range(config.num_layers):
        prefix = f"model.layers.{layer}."
        for name, rows, columns, bias in projections:
            shapes[f"{prefix}{name}.weight"] = (rows, columns)
            if bias:
                shapes[f"{prefix}{name}.bias"] = (rows,)
        for name, size in norms:
            shapes[f"{prefix}{name}.weight"] = (size,)
    return shapes


def num_parameters(config: ModelConfig) -> int:
    return sum(math.prod(shape) for shape in expected_tensors(config).values())


def weight_bytes(config: ModelConfig, dtype: torch.dtype, quantization: str | None) -> int:
    """Memory of the weights, about: scales and biases of quantised layers are left out."""
    size = num_parameters(config) * dtype.itemsize
    if quantization == "int8":
        shapes = expected_tensors(config)
        size -= sum(math.prod(shapes[n]) for n in shapes if n.endswith("_proj.weight")) * (dtype.itemsize - 1)
    return size


def _all_finite(weight: Tensor) -> bool:
    """A twentieth of the time that copying takes: both ends are NaN where any number is."""
    least, most = torch.aminmax(weight)
    return math.isfinite(least) and math.isfinite(most)


class RmsNorm:
    """x / sqrt(mean(x^2) + eps) * weight over the last dimension, computed in float32 (Zhang and Sennrich, 2019).

    On the CPU a few plain operations take two thirds of the time of torch's own for a handful of rows; they use
    sqrt(mean(x^2) + eps) = sqrt(|x|^2 + n eps) / sqrt(n). Each of them is rounded exactly, in vectors and in their
    remainder alike, so that the place of a row does not matter.
    """

    def __init__(
        self, weight: Tensor, eps: float, native: NativeKernels | None = None, fixed_sums: bool = False
    ) -> None:
        """weight [n] or, with one weight per head and without native kernels, [heads, n]. `fixed_sums`: see
        `Decoder`."""
        size = weight.shape[-1]
        self._native = native
        self._in_triton = fixed_sums and weight.device.type == "cuda"
        self._weight = weight.float()
        self._eps = eps
        self._scaled = weight.float() * size**0.5
        self._floor = size * eps

    def __call__(self, x: Tensor) -> Tensor:
        if self._native is not None:
            return self._native.rms_norm(x, self._weight, self._eps)
        if self._in_triton:
            from tandem.engine.model.kernels.rms_norm import rms_norm

            return rms_norm(x, self._weight, self._eps)
        length = torch.linalg.vector_norm(x, dim=-1, keepdim=True, dtype=torch.float32)
        return torch.mul(x, self._scaled).div_(length.square_().add_(self._floor).sqrt_()).to(x.dtype)


@dataclass(slots=True)
class _Layer:
    input_norm: RmsNorm
    qkv: Linear
    qk_norm: RmsNorm | None
    """Norm over the heads of q, then those of k."""
    native_qk_norm: tuple[Tensor, Tensor] | None
    """The same for native kernels: float32 weights [head_dim] of q and k."""
    output: Linear
    mlp_norm: RmsNorm
    gate_up: Linear
    down: Linear


class Decoder:
    """A model in memory. Not thread-safe: one engine thread calls `forward`."""

    def __init__(
        self,
        config: ModelConfig,
        checkpoint: Checkpoint,
        attention: AttentionBackend,
        *,
        dtype: torch.dtype,
        device: torch.device,
        quantization: str | None = None,
        native: NativeKernels | None = None,
        fixed_sums: bool = False,
    ) -> None:
        """Reads the weights. Raises ConfigError where they do not fit `config`. `native` is None or made for a model of
        these sizes (`native.supports_rows`). `fixed_sums`: linear layers and norms whose rows do not depend on each
        other, by construction; of norms on the CPU that takes `native`."""
        self.config = config
        self.dtype = dtype
        self.device = device
        self._attention = attention
        self.native = native
        self._pads = device.type == "cpu" and not fixed_sums
        checkpoint.check(expected_tensors(config), tolerated=("lm_head.weight",) if config.tie_word_embeddings else ())
        self._rotary = RotaryTable(config.rope, config.head_dim, device)
        self.reach(FIRST_POSITIONS)
        not_finite: list[str] = []

        def read(*names: str) -> Tensor:
            parts = [checkpoint.read(name).to(device, dtype) for name in names]
            not_finite.extend(name for name, part in zip(names, parts, strict=True) if not _all_finite(part))
            return parts[0] if len(parts) == 1 else torch.cat(parts)

        def linear(prefix: str, *names: str, bias: bool) -> Linear:
            weight = read(*(f"{prefix}{name}.weight" for name in names))
            biases = read(*(f"{prefix}{name}.bias" for name in names)) if bias else None
            return make_linear(weight, biases, quantization=quantization, fixed_sums=fixed_sums)

        def norm(name: str) -> RmsNorm:
            return RmsNorm(read(name), config.rms_norm_eps, native, fixed_sums)

        def qk_norms(prefix: str) -> tuple[Tensor, Tensor]:
            return read(f"{prefix}q_norm.weight"), read(f"{prefix}k_norm.weight")

        def qk_norm(prefix: str) -> RmsNorm:
            q, k = qk_norms(prefix)
            heads = torch.cat((q.expand(config.num_heads, -1), k.expand(config.num_kv_heads, -1)))
            return RmsNorm(heads, config.rms_norm_eps, fixed_sums=fixed_sums)

        def native_qk_norm(prefix: str) -> tuple[Tensor, Tensor]:
            q, k = qk_norms(prefix)
            return q.float(), k.float()

        def layers() -> Iterator[_Layer]:
            """The layers in order, with the weights that the checkpoint has for each."""
            for index in range(config.num_layers):
                prefix = f"model.layers.{index}."
                attention, mlp = prefix + "self_attn.", prefix + "mlp."
                yield _Layer(
                    input_norm=norm(prefix + "input_layernorm.weight"),
                    qkv=linear(attention, "q_proj", "k_proj", "v_proj", bias=config.qkv_bias),
                    qk_norm=qk_norm(attention) if config.qk_norm and native is None else None,
                    native_qk_norm=native_qk_norm(attention) if config.qk_norm and native is not None else None,
                    output=linear(attention, "o_proj", bias=config.o_bias),
                    mlp_norm=norm(prefix + "post_attention_layernorm.weight"),
                    gate_up=linear(mlp, "gate_proj", "up_proj", bias=config.mlp_bias),
                    down=linear(mlp, "down_proj", bias=config.mlp_bias),
                )

        self._embedding = read("model.embed_tokens.weight")
        self._layers = list(layers())
        self._used_layers: Sequence[int] = range(config.num_layers)
        self._final_norm = norm("model.norm.weight")
        head = self._embedding if config.tie_word_embeddings else read("lm_head.weight")
        self._head = make_linear(head, None, fixed_sums=fixed_sums)
        checkpoint.warn_of(not_finite, f"NaN or infinity as {str(dtype).removeprefix('torch.')}: what needs them fails")

    def reach(self, positions: int) -> None:
        """Makes ready for sequences of so many tokens, where the model is made for them; FIRST_POSITIONS always
        work."""
        self._rotary.reach(min(positions, self.config.max_position_embeddings))

    @property
    def kernels(self) -> str:
        """Which implementations were chosen."""
        layer = self._layers[0]
        parts = (self._attention, self.native, layer.qkv, layer.output, layer.gate_up, layer.down, self._head)
        return " ".join(type(part).__name__ for part in parts)

    @property
    def depends_on_torch(self) -> bool:
        """Whether torch's own kernels compute attention, norms or gates, not only linear layers."""
        return self.native is None or not self._attention.row_invariant_by_construction

    def with_layers(self, indices: Sequence[int]) -> Decoder:
        """The same decoder with the layers `indices` (ascending) alone, for measurements. They keep their index in the
        pool."""
        decoder = copy.copy(self)
        decoder._used_layers = indices
        return decoder

    @torch.inference_mode()
    def forward(
        self,
        batch: ForwardBatch,
        pool: KvPool,
        on_layer: Callable[[int], None] | None = None,
        before_attention: Callable[[int], None] | None = None,
    ) -> Tensor:
        """Runs the rows of `batch` through the model and writes their K and V into `pool` at `batch.slots`.

        `on_layer(l)` is called as soon as layer l of the pool holds them. `before_attention(l)` is called before
        anything reads layer l of the pool: it may wait for rows that others write there. Returns float32 logits
        [R - P, vocab_size] of `batch.logit_rows`; sets `batch.finite`, and `batch.pooled` if P is not 0.
        """
        num_rows, num_logits = batch.token_ids.shape[0], batch.logit_rows.shape[0]
        every_row = num_logits == num_rows and not batch.prefills
        finite = True
        angles = self._rotary.angles(batch.positions) if self.native else self._rotary.at(batch.positions, self.dtype)
        hidden = self._padded(self._embedding.index_select(0, batch.token_ids))
        for index in self._used_layers:
            layer = self._layers[index]
            qkv = layer.qkv(layer.input_norm(hidden))[:num_rows]
            q, all_finite = self._rotate_and_write(qkv, angles, index, batch.slots, pool)
            finite = finite and all_finite
            if before_attention is not None:
                before_attention(index)
            if on_layer is not None:
                on_layer(index)
            attended = self._attention.attend(index, q, batch, pool)
            if index == self._used_layers[-1] and not every_row:
                # Nobody attends to what the last layer makes of the other rows.
                attended = attended.index_select(0, batch.logit_rows)
                hidden = self._padded(hidden.index_select(0, batch.logit_rows))
            hidden = layer.output.plus(self._padded(attended), hidden)
            hidden = layer.down.plus(self._gated(layer.gate_up(layer.mlp_norm(hidden))), hidden)
        batch.finite = finite if self.native is not None else None
        hidden = self._final_norm(hidden)
        if batch.num_pooled:
            num_rows, num_logits = num_logits, num_logits - batch.num_pooled
            batch.pooled = hidden[num_logits:num_rows]
            hidden = self._padded(hidden[:num_logits])
        return self._head(hidden)[:num_logits].float()

    def _rotate_and_write(
        self, qkv: Tensor, angles: tuple[Tensor, Tensor], index: int, slots: Tensor, pool: KvPool
    ) -> tuple[Tensor, bool]:
        """Returns q [N, num_heads, head_dim] of qkv [N, ...], normed and rotated; k, so too, and v go to the pool. The
        second value is False where native kernels saw numbers among them that are not finite."""
        heads, rotated, layer = (
            self.config.num_heads,
            self.config.num_heads + self.config.num_kv_heads,
            self._layers[index],
        )
        qkv = qkv.view(qkv.shape[0], rotated + self.config.num_kv_heads, -1)
        if self.native is not None:
            eps = self.config.rms_norm_eps
            finite = self.native.rotate_and_write(qkv, layer.native_qk_norm, eps, angles, index, slots, pool)
            return qkv[:, :heads], finite
        qk, v = qkv[:, :rotated], qkv[:, rotated:]
        if layer.qk_norm is not None:
            qk = layer.qk_norm(qk)
        qk = rotate(qk, *angles)
        pool.write(index, slots, qk[:, heads:], v)
        return qk[:, :heads], True

    def _gated(self, gate_up: Tensor) -> Tensor:
        if self.native is not None:
            return self.native.silu_mul(gate_up)
        gate, up = gate_up.chunk(2, dim=-1)
        return F.silu(gate).mul_(up)

    def _padded(self, x: Tensor) -> Tensor:
        """x [n, size] with zero rows up to the next row count that linear layers are made ready for."""
        if not self._pads:
            return x
        spare = padded_rows(x.shape[0]) - x.shape[0]
        return F.pad(x, (0, 0, 0, spare)) if spare else x
