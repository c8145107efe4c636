"""What a model costs: sizes, from the fields of its Hugging Face `config.json`.

Covers dense and mixture-of-experts decoders with grouped heads or a latent KV (MLA), sliding windows and quantised
weights. The engine serves fewer of them; a planner is asked about models that somebody else serves.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

from tandem.common.errors import ConfigError

MAX_SIZE = 1 << 24
MAX_LAYERS = 4096

BYTES: Mapping[str, float] = {
    "float32": 4.0,
    "float16": 2.0,
    "bfloat16": 2.0,
    "fp8": 1.0,
    "int8": 1.0,
    "fp4": 0.53125,
    "int4": 0.53125,
}
"""Bytes of a number. Four bits come with an 8-bit scale for each 32 of them."""

_UNGATED = frozenset({"opt", "bloom", "gpt2", "gpt_neox", "gptj", "falcon", "phi", "starcoder2", "mpt"})
"""Model types whose MLP has two matrices, not three."""


@dataclass(frozen=True, slots=True)
class Attention:
    """Sizes of an attention layer."""

    heads: int
    kv_heads: int
    head_dim: int
    kv_rank: int = 0
    """MLA: values of the latent that stand for a token's keys and values; 0: keys and values are kept."""
    q_rank: int = 0
    rope_dim: int = 0
    """MLA: values of the key that all heads share."""
    value_dim: int = 0
    """MLA: values of a head's output."""


@dataclass(frozen=True, slots=True)
class Experts:
    """Mixture of experts, in the layers that have one."""

    count: int
    active: int
    """For each token."""
    intermediate: int
    shared_intermediate: int
    """Size of the experts that every token goes to, together."""
    layers: int


@dataclass(frozen=True, slots=True)
class ModelSpec:
    """Sizes of a decoder-only transformer, and what its numbers are kept in."""

    name: str
    layers: int
    hidden: int
    intermediate: int
    vocab: int
    attention: Attention
    gated: bool = True
    tied: bool = False
    experts: Experts | None = None
    windows: tuple[int | None, ...] = ()
    """Sliding window of each layer; empty: none has one."""
    weights: str = "bfloat16"
    """Key of `BYTES`."""
    expert_weights: str = "bfloat16"
    kv: str = "bfloat16"
    max_context: int = 0
    """0: unknown."""

    @classmethod
    def from_config(
        cls, config: Mapping[str, object], name: str = "", weights: str = "", expert_weights: str = "", kv: str = ""
    ) -> ModelSpec:
        """Reads the fields of a `config.json`.

        Args:
            config: its fields; those of a `text_config` go before them.
            weights: key of `BYTES`, where the weights are served in another type than the config says.
            expert_weights: likewise for experts; as `weights` by default.
            kv: likewise for KV; half precision by default.
        Raises:
            ConfigError: names the field that is missing, impossible or unknown.
        """
        inner = config.get("text_config")
        fields = _Fields({**config, **inner} if isinstance(inner, Mapping) else config, name or "config.json")
        hidden = fields.size("hidden_size", "n_embd", "n_embed")
        heads = fields.size("num_attention_heads", "n_head")
        layers = fields.size("num_hidden_layers", "n_layer", "num_layers", most=MAX_LAYERS)
        kind = str(fields.get("model_type") or "")
        dense, routed = fields.quantised()
        own = fields.dtype("weights", weights) if weights else dense
        return cls(
            name=name or str(fields.get("_name_or_path") or kind or "model"),
            layers=layers,
            hidden=hidden,
            intermediate=fields.size("intermediate_size", "ffn_dim", "n_inner", default=4 * hidden),
            vocab=fields.size("vocab_size"),
            attention=_attention(fields, hidden, heads),
            gated=kind not in _UNGATED,
            tied=fields.flag("tie_word_embeddings", kind in ("opt", "bloom", "gpt2")),
            experts=_experts(fields, layers),
            windows=_windows(fields, layers),
            weights=own,
            expert_weights=fields.dtype("expert_weights", expert_weights or weights or routed),
            kv=fields.dtype("kv", kv or "bfloat16"),
            max_context=fields.size("max_position_embeddings", "seq_length", "n_positions", default=0, least=0),
        )

    @property
    def attention_parameters(self) -> int:
        """Parameters of one layer's projections."""
        a = self.attention
        if not a.kv_rank:
            return self.hidden * a.head_dim * 2 * (a.heads + a.kv_heads)
        queries = a.heads * (a.head_dim + a.rope_dim)
        q = self.hidden * a.q_rank + a.q_rank * queries if a.q_rank else self.hidden * queries
        kv = self.hidden * (a.kv_rank + a.rope_dim) + a.kv_rank * a.heads * (a.head_dim + a.value_dim)
        return q + kv + a.heads * a.value_dim * self.hidden

    @property
    def mlp_matrices(self) -> int:
        return 3 if self.gated else 2

    @property
    def dense_mlp_layers(self) -> int:
        return self.layers - (self.experts.layers if self.experts else 0)

    def expert_parameters(self, experts: float) -> float:
        """Parameters of so many routed experts of one layer, with what every token goes through: shared experts and
        router."""
        if self.experts is None:
            return 0.0
        e = self.experts
        return 3 * self.hidden * (experts * e.intermediate + e.shared_intermediate) + self.hidden * e.count

    @property
    def parameters(self) -> int:
        mlp = self.mlp_matrices * self.hidden * self.intermediate
        experts = self.experts.layers * self.expert_parameters(self.experts.count) if self.experts else 0.0
        embeddings = self.vocab * self.hidden * (1 if self.tied else 2)
        return int(self.layers * self.attention_parameters + self.dense_mlp_layers * mlp + experts + embeddings)

    @property
    def active_parameters(self) -> int:
        """Those that one token goes through; with the head, without the embedding."""
        mlp = self.mlp_matrices * self.hidden * self.intermediate
        experts = self.experts.layers * self.expert_parameters(self.experts.active) if self.experts else 0.0
        return int(
            self.layers * self.attention_parameters + self.dense_mlp_layers * mlp + experts + self.vocab * self.hidden
        )

    @property
    def weight_bytes(self) -> float:
        """Embeddings and head are in half precision, whatever the other weights are in."""
        embeddings = self.vocab * self.hidden * (1 if self.tied else 2)
        experts = self.experts.layers * self.expert_parameters(self.experts.count) if self.experts else 0.0
        rest = self.parameters - embeddings - experts
        half = max(BYTES[self.weights], 2.0)
        return embeddings * half + rest * BYTES[self.weights] + experts * BYTES[self.expert_weights]

    @property
    def kv_values(self) -> int:
        """Values that a layer keeps for a token."""
        a = self.attention
        return a.kv_rank + a.rope_dim if a.kv_rank else 2 * a.kv_heads * a.head_dim

    @property
    def kv_bytes_per_token(self) -> float:
        """Over all layers, as long as no window drops any."""
        return self.layers * self.kv_values * BYTES[self.kv]

    def window_groups(self) -> tuple[tuple[int | None, int], ...]:
        """(window, layers that have it)."""
        if not self.windows:
            return ((None, self.layers),)
        return tuple((window, self.windows.count(window)) for window in dict.fromkeys(self.windows))


def _attention(fields: _Fields, hidden: int, heads: int) -> Attention:
    rank = fields.size("kv_lora_rank", default=0, least=0)
    if rank:
        return Attention(
            heads,
            heads,
            fields.size("qk_nope_head_dim"),
            rank,
            fields.size("q_lora_rank", default=0, least=0),
            fields.size("qk_rope_head_dim"),
            fields.size("v_head_dim"),
        )
    kv_heads = fields.size("num_key_value_heads", "num_kv_heads", default=heads)
    if heads % kv_heads:
        raise fields.error("num_key_value_heads", f"{kv_heads} does not divide num_attention_heads {heads}")
    if fields.get("head_dim") is None and hidden % heads:
        raise fields.error("num_attention_heads", f"{heads} does not divide hidden_size {hidden}; give head_dim")
    return Attention(heads, kv_heads, fields.size("head_dim", default=hidden // heads))


def _experts(fields: _Fields, layers: int) -> Experts | None:
    count = fields.size("n_routed_experts", "num_local_experts", "num_experts", default=0, least=0)
    if not count:
        return None
    active = fields.size("num_experts_per_tok", "num_experts_per_token", "experts_per_token")
    if active > count:
        raise fields.error("num_experts_per_tok", f"{active} is more than the {count} experts that there are")
    each = fields.size("moe_intermediate_size", "intermediate_size")
    shared = fields.size("n_shared_experts", default=0, least=0) * each
    shared = fields.size("shared_expert_intermediate_size", default=shared, least=0)
    dense = fields.size("first_k_dense_replace", default=0, least=0)
    if dense > layers:
        raise fields.error("first_k_dense_replace", f"{dense} is more than the {layers} layers that there are")
    return Experts(count, active, each, shared, layers - dense)


def _windows(fields: _Fields, layers: int) -> tuple[int | None, ...]:
    window = fields.size("sliding_window", default=0, least=0)
    if not window or not fields.flag("use_sliding_window", True):
        return ()
    kinds = fields.get("layer_types")
    if not isinstance(kinds, list):
        return (window,) * layers
    if len(kinds) != layers:
        raise fields.error("layer_types", f"has {len(kinds)} entries for {layers} layers")
    return tuple(window if kind == "sliding_attention" else None for kind in kinds)


class _Fields:
    """Fields of a config, each under any of its names."""

    def __init__(self, fields: Mapping[str, object], where: str) -> None:
        self._fields = fields
        self._where = where

    def get(self, name: str) -> object:
        return self._fields.get(name)

    def error(self, name: str, text: str) -> ConfigError:
        return ConfigError(f"{self._where}: {name}: {text}")

    def size(self, *names: str, default: int | None = None, least: int = 1, most: int = MAX_SIZE) -> int:
        for name in names:
            value = self._fields.get(name)
            if value is None:
                continue
            if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
                raise self.error(name, f"{str(value)[:40]!r} is not a number")
            if value != int(value) or not least <= value <= most:
                raise self.error(name, f"{value} must be a whole number from {least} to {most}")
            return int(value)
        if default is None:
            raise self.error(names[0], "is missing; the model's config.json has to have it")
        return default

    def flag(self, name: str, default: bool) -> bool:
        value = self._fields.get(name)
        if value is None:
            return default
        if not isinstance(value, bool):
            raise self.error(name, f"{str(value)[:40]!r} must be true or false")
        return value

    def dtype(self, name: str, value: object) -> str:
        if not isinstance(value, str) or value not in BYTES:
            raise self.error(name, f"{str(value)[:40]!r} is not known; one of {', '.join(BYTES)}")
        return value

    def quantised(self) -> tuple[str, str]:
        """Types of the weights, and of the experts'."""
        plain = self._fields.get("dtype") or self._fields.get("torch_dtype") or "bfloat16"
        quantisation = self._fields.get("quantization_config")
        if not isinstance(quantisation, Mapping):
            kept = self.dtype("torch_dtype", str(plain).removeprefix("torch."))
            return kept, kept
        method = str(quantisation.get("quant_method") or "")
        if method == "mxfp4":
            return "bfloat16", "fp4"
        if method in ("fp8", "fbgemm_fp8"):
            return "fp8", "fp8"
        bits = quantisation.get("bits", 4 if quantisation.get("load_in_4bit") else 8)
        if method in ("awq", "gptq", "bitsandbytes") and bits in (4, 8):
            return (kept := "int4" if bits == 4 else "int8"), kept
        raise self.error("quantization_config.quant_method", f"{method[:40]!r} is not known; say the weights' type")
