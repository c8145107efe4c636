"""What `config.json` and `generation_config.json` say about a model, validated: no other file of the engine reads them.

Names, defaults and their precedence follow `transformers`, so that a folder means the same model in both.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from tandem.common.checkpoint import MAX_LONG_BYTES, read_json, shown, special_tokens
from tandem.common.errors import ConfigError

RopeKind = Literal["default", "linear", "llama3", "yarn"]
ROPE_KINDS: tuple[RopeKind, ...] = ("default", "linear", "llama3", "yarn")


@dataclass(frozen=True, slots=True)
class _Family:
    """What an architecture fixes without a field in `config.json`."""

    model_type: str
    qkv_bias: bool | None
    """None: the field `attention_bias` decides."""
    o_bias: bool | None
    mlp_bias: bool | None
    """None: the field `mlp_bias` decides."""
    qk_norm: bool = False
    default_head_dim: int | None = None


_FAMILIES = {
    "LlamaForCausalLM": _Family("llama", qkv_bias=None, o_bias=None, mlp_bias=None),
    "MistralForCausalLM": _Family("mistral", qkv_bias=False, o_bias=False, mlp_bias=False),
    "Qwen2ForCausalLM": _Family("qwen2", qkv_bias=True, o_bias=False, mlp_bias=False),
    "Qwen3ForCausalLM": _Family(
        "qwen3", qkv_bias=None, o_bias=None, mlp_bias=False, qk_norm=True, default_head_dim=128
    ),
}
SUPPORTED_ARCHITECTURES = tuple(_FAMILIES)

MAX_SIZE = 1 << 24
"""The most of whatever a field counts, unless it says otherwise: more is a mistake."""
MAX_LAYERS = 4096
MAX_POSITIONS = (1 << 31) - 1
LEAST_NUMBER, MOST_NUMBER = 1e-30, 1e30
"""A positive number between them is finite in float32, and so are its reciprocal and its products with positions."""
LEAST_EPS, MOST_EPS = 1e-20, 0.1
"""Range of a norm's epsilon. Models have 1e-5 to 1e-12; with more, the norm would be most of what a token is."""


@dataclass(frozen=True, slots=True)
class RopeConfig:
    """Rotary position embedding. Fields of other kinds keep their neutral defaults."""

    kind: RopeKind = "default"
    theta: float = 10_000.0
    factor: float = 1.0
    """linear, llama3, yarn: how many times longer the context is than in pre-training."""
    original_max_position_embeddings: int = 0
    """llama3, yarn: the context in pre-training."""
    low_freq_factor: float = 1.0
    """llama3."""
    high_freq_factor: float = 4.0
    """llama3."""
    beta_fast: float = 32.0
    """yarn."""
    beta_slow: float = 1.0
    """yarn."""
    truncate: bool = True
    """yarn: round the bounds of the ramp to whole dimensions."""
    attention_factor: float = 1.0
    """yarn: cos and sin are multiplied by it."""


@dataclass(frozen=True, slots=True)
class ModelConfig:
    """One decoder-only transformer."""

    name: str
    """Name of the model folder."""
    architecture: str
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    vocab_size: int
    max_position_embeddings: int
    rms_norm_eps: float
    tie_word_embeddings: bool
    qkv_bias: bool
    o_bias: bool
    mlp_bias: bool
    qk_norm: bool
    """RMS norm over each head of q and k before the rotation (Qwen3)."""
    rope: RopeConfig
    sliding_windows: tuple[int | None, ...]
    """Per layer: a query at position p sees keys at positions > p - window; None: all before it."""
    eos_token_ids: tuple[int, ...]
    """Ids from `generation_config.json`, else `config.json`, and the tokenizer's own, as in vLLM; may be empty."""

    @classmethod
    def from_folder(cls, folder: Path) -> ModelConfig:
        """Reads and validates. Raises ConfigError naming the file and field at fault."""
        fields = _Fields.read(folder / "config.json")
        architecture = _architecture(fields)
        family = _FAMILIES[architecture]
        _refuse_unsupported(fields, family)
        num_layers = fields.positive_int("num_hidden_layers", most=MAX_LAYERS)
        num_heads = fields.positive_int("num_attention_heads")
        kv_default = num_heads if family.model_type == "llama" else None
        num_kv_heads = fields.positive_int("num_key_value_heads", kv_default, null=num_heads)
        if num_heads % num_kv_heads:
            raise fields.error("num_key_value_heads", f"{num_kv_heads} does not divide num_attention_heads {num_heads}")
        hidden_size = fields.positive_int("hidden_size")
        vocab_size = fields.positive_int("vocab_size")
        max_position_embeddings = fields.positive_int("max_position_embeddings", most=MAX_POSITIONS)
        attention_bias = fields.boolean("attention_bias", False)
        mlp_bias = fields.boolean("mlp_bias", False)
        return cls(
            name=folder.name,
            architecture=architecture,
            hidden_size=hidden_size,
            intermediate_size=fields.positive_int("intermediate_size"),
            num_layers=num_layers,
            num_heads=num_heads,
            num_kv_heads=num_kv_heads,
            head_dim=_head_dim(fields, family, hidden_size, num_heads),
            vocab_size=vocab_size,
            max_position_embeddings=max_position_embeddings,
            rms_norm_eps=fields.positive_float("rms_norm_eps", 1e-6, least=LEAST_EPS, most=MOST_EPS),
            tie_word_embeddings=fields.boolean("tie_word_embeddings", False),
            qkv_bias=attention_bias if family.qkv_bias is None else family.qkv_bias,
            o_bias=attention_bias if family.o_bias is None else family.o_bias,
            mlp_bias=mlp_bias if family.mlp_bias is None else family.mlp_bias,
            qk_norm=family.qk_norm,
            rope=_rope(fields, max_position_embeddings),
            sliding_windows=_sliding_windows(fields, family, num_layers),
            eos_token_ids=_eos_token_ids(folder, fields, vocab_size),
        )


class _Fields:
    """A JSON object whose fields are read with their types checked; every error names the file and the field."""

    def __init__(self, values: dict[str, Any], source: str) -> None:
        self.values = values
        self.source = source

    @classmethod
    def read(cls, path: Path) -> _Fields:
        if not path.is_file():
            raise ConfigError(f"{path}: cannot be read (no such file)")
        return cls(read_json(path), str(path))

    def error(self, name: str, problem: str) -> ConfigError:
        return ConfigError(f"{self.source}: {name}: {problem}")

    def get(self, name: str) -> Any:
        return self.values.get(name)

    def positive_int(
        self, name: str, default: int | None = None, *, null: int | None = None, most: int = MAX_SIZE
    ) -> int:
        """`default` stands for a missing field, `null` for an explicit null."""
        value = self.values.get(name, default)
        if value is None:
            value = null if name in self.values else default
        if value is None:
            raise self.error(name, "missing")
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise self.error(name, f"must be a positive integer, not {shown(value)}")
        if value > most:
            raise self.error(name, f"must be at most {most}, not {shown(value)}")
        return value

    def positive_float(
        self, name: str, default: float | None = None, *, least: float = LEAST_NUMBER, most: float = MOST_NUMBER
    ) -> float:
        """A number above 0 from `least` to `most`. Raises ConfigError naming the field for anything else, and where it
        is missing without a default."""
        value = self.values.get(name)
        if value is None:
            value = default
        if value is None:
            raise self.error(name, "missing")
        if isinstance(value, bool) or not isinstance(value, int | float) or not value > 0:
            raise self.error(name, f"must be a positive number, not {shown(value)}")
        if not least <= value <= most:
            raise self.error(name, f"must be {least:g} to {most:g}, not {shown(value)}")
        return float(value)

    def boolean(self, name: str, default: bool) -> bool:
        """True or false; `default` where the field is absent or null. Raises ConfigError for anything else."""
        value = self.values.get(name)
        if value is None:
            return default
        if not isinstance(value, bool):
            raise self.error(name, f"must be true or false, not {shown(value)}")
        return value

    def section(self, name: str) -> _Fields | None:
        """The fields of an object inside this one; None where it is absent or empty. Raises ConfigError where it is no
        object."""
        value = self.values.get(name)
        if not value:
            return None
        if not isinstance(value, dict):
            raise self.error(name, f"must be an object, not {shown(value)}")
        return _Fields(value, f"{self.source}: {name}")


_ENCODER_ENDINGS = ("ForMaskedLM", "ForSequenceClassification", "ForTokenClassification", "ForQuestionAnswering")
_ENCODERS = ("albert", "bert", "deberta", "distilbert", "electra", "modernbert", "mpnet", "nomic_bert", "roberta")
_EXPERT_FIELDS = ("num_experts", "num_local_experts", "n_routed_experts")


def _other_kind(fields: _Fields, name: str) -> str:
    """What else a model of an architecture that is not supported is, in words; empty where it is not known."""
    given = fields.get("model_type")
    model_type = given.removeprefix("xlm-").removeprefix("xlm_") if isinstance(given, str) else ""
    if name.endswith(_ENCODER_ENDINGS) or model_type.startswith(_ENCODERS):
        return ", an encoder like BERT, which writes no text"
    if fields.get("vision_config") or fields.get("audio_config"):
        return ", a model of images or audio"
    if fields.get("is_encoder_decoder"):
        return ", an encoder with a decoder"
    if any(fields.get(field) for field in _EXPERT_FIELDS):
        return ", a mixture of experts"
    return ""


def _architecture(fields: _Fields) -> str:
    names = fields.get("architectures")
    if not isinstance(names, list) or len(names) != 1 or not isinstance(names[0], str):
        raise fields.error("architectures", f"must name exactly one architecture, not {shown(names)}")
    name: str = names[0]
    if name not in _FAMILIES:
        supported = ", ".join(SUPPORTED_ARCHITECTURES)
        kind = _other_kind(fields, name)
        raise fields.error("architectures", f"{name[:80]}{kind}, is not supported; supported are {supported}")
    model_type = fields.get("model_type")
    if model_type is not None and model_type != _FAMILIES[name].model_type:
        raise fields.error("model_type", f"{shown(model_type)} contradicts architectures [{name}]")
    return name


def _refuse_unsupported(fields: _Fields, family: _Family) -> None:
    act = fields.get("hidden_act")
    if act not in (None, "silu", "swish"):
        raise fields.error("hidden_act", f"{shown(act)} is not supported; only silu is")
    if fields.get("quantization_config"):
        raise fields.error(
            "quantization_config", "quantised checkpoints are not supported; give the original weights (--quantization)"
        )
    if fields.positive_float("partial_rotary_factor", 1.0) != 1.0:
        raise fields.error("partial_rotary_factor", "only 1.0 is supported")
    if family.mlp_bias is False and fields.boolean("mlp_bias", False):
        raise fields.error("mlp_bias", f"true is not supported for {family.model_type}")
    if family.qkv_bias is False and fields.boolean("attention_bias", False):
        raise fields.error("attention_bias", f"true is not supported for {family.model_type}")


def _head_dim(fields: _Fields, family: _Family, hidden_size: int, num_heads: int) -> int:
    if fields.get("head_dim") is not None:
        head_dim = fields.positive_int("head_dim")
    elif family.default_head_dim is not None and "head_dim" not in fields.values:
        head_dim = family.default_head_dim
    elif hidden_size % num_heads:
        raise fields.error("hidden_size", f"{hidden_size} is not a multiple of num_attention_heads {num_heads}")
    else:
        head_dim = hidden_size // num_heads
    if head_dim % 2:
        raise fields.error("head_dim", f"{head_dim} is odd; rotary embeddings need an even one")
    return head_dim


def _sliding_windows(fields: _Fields, family: _Family, num_layers: int) -> tuple[int | None, ...]:
    everywhere: tuple[int | None, ...] = (None,) * num_layers
    if family.model_type == "llama":
        return everywhere
    if family.model_type == "mistral":
        if "sliding_window" in fields.values and fields.get("sliding_window") is None:
            return everywhere
        return (fields.positive_int("sliding_window", 4096, most=MAX_POSITIONS),) * num_layers
    if not fields.boolean("use_sliding_window", False) or fields.get("sliding_window") is None:
        layer_types = fields.get("layer_types")
        if isinstance(layer_types, list) and "sliding_attention" in layer_types:
            raise fields.error("layer_types", "has sliding_attention, but use_sliding_window or sliding_window is off")
        return everywhere
    window = fields.positive_int("sliding_window", most=MAX_POSITIONS)
    layer_types = fields.get("layer_types")
    if layer_types is None:
        first = fields.get("max_window_layers")
        if isinstance(first, bool) or not isinstance(first, int) or first < 0:
            raise fields.error(
                "max_window_layers", f"must be an integer >= 0 with use_sliding_window, not {shown(first)}"
            )
        return tuple(window if layer >= first else None for layer in range(num_layers))
    windows: dict[Any, int | None] = {"full_attention": None, "sliding_attention": window}
    if (
        not isinstance(layer_types, list)
        or len(layer_types) != num_layers
        or any(not isinstance(kind, str) or kind not in windows for kind in layer_types)
    ):
        raise fields.error("layer_types", f"must list full_attention or sliding_attention for {num_layers} layers")
    return tuple(windows[kind] for kind in layer_types)


def _rope(fields: _Fields, max_position_embeddings: int) -> RopeConfig:
    """Both forms: `rope_scaling` + `rope_theta`, and `rope_parameters` of transformers 5; the former wins as there."""
    section = fields.section("rope_scaling") or fields.section("rope_parameters") or _Fields({}, fields.source)
    if any(isinstance(value, dict) for value in section.values.values()):
        raise ConfigError(f"{section.source}: settings per layer type are not supported")
    theta = fields.positive_float("rope_theta", section.positive_float("rope_theta", 10_000.0))
    if section.positive_float("rope_theta", theta) != theta:
        raise section.error("rope_theta", f"contradicts the top-level rope_theta {theta}")
    if section.positive_float("partial_rotary_factor", 1.0) != 1.0:
        raise section.error("partial_rotary_factor", "only 1.0 is supported")
    kind = section.get("rope_type") or section.get("type") or "default"
    if kind == "default":
        return RopeConfig(theta=theta)
    if kind not in ROPE_KINDS:
        raise section.error("rope_type", f"{shown(kind)} is not supported; supported are {', '.join(ROPE_KINDS)}")
    factor = section.positive_float("factor")
    if kind == "linear":
        return RopeConfig("linear", theta, factor)
    original = fields if fields.get("original_max_position_embeddings") is not None else section
    original_max = original.positive_int(
        "original_max_position_embeddings", max_position_embeddings, most=MAX_POSITIONS
    )
    if kind == "llama3":
        low, high = section.positive_float("low_freq_factor"), section.positive_float("high_freq_factor")
        if high <= low:
            raise section.error("high_freq_factor", f"{high} must be greater than low_freq_factor {low}")
        return RopeConfig("llama3", theta, factor, original_max, low_freq_factor=low, high_freq_factor=high)
    beta_fast, beta_slow = section.positive_float("beta_fast", 32.0), section.positive_float("beta_slow", 1.0)
    if beta_fast < beta_slow:
        raise section.error("beta_fast", f"{beta_fast} must not be less than beta_slow {beta_slow}")
    return RopeConfig(
        "yarn",
        theta,
        factor,
        original_max,
        beta_fast=beta_fast,
        beta_slow=beta_slow,
        truncate=section.boolean("truncate", True),
        attention_factor=_yarn_attention_factor(section, factor),
    )


def _yarn_attention_factor(section: _Fields, factor: float) -> float:
    """YaRN (Peng et al. 2023), section 3.4: 0.1 ln(factor) + 1 unless given; `mscale` as DeepSeek defines it."""
    if section.get("attention_factor") is not None:
        return section.positive_float("attention_factor")

    def mscale(weight: float) -> float:
        return 1.0 if factor <= 1 else 0.1 * weight * math.log(factor) + 1.0

    if section.get("mscale") and section.get("mscale_all_dim"):
        return mscale(section.positive_float("mscale")) / mscale(section.positive_float("mscale_all_dim"))
    return mscale(1.0)


def _eos_token_ids(folder: Path, fields: _Fields, vocab_size: int) -> tuple[int, ...]:
    """Many chat models end their turns with the tokenizer's end token, and their configuration names another."""
    source = fields
    path = folder / "generation_config.json"
    if path.is_file():
        generation = _Fields.read(path)
        if generation.get("eos_token_id") is not None:
            source = generation
    value = source.get("eos_token_id")
    ids = [] if value is None else value if isinstance(value, list) else [value]
    for token in ids:
        if isinstance(token, bool) or not isinstance(token, int) or not 0 <= token < vocab_size:
            raise source.error("eos_token_id", f"{shown(token)} is not a token id below vocab_size {vocab_size}")
    return tuple(dict.fromkeys([*ids, *_tokenizer_eos(folder, vocab_size)]))


def _tokenizer_eos(folder: Path, vocab_size: int) -> list[int]:
    name = special_tokens(folder).get("eos_token")
    if name is None:
        return []
    added = read_json(folder / "tokenizer.json", MAX_LONG_BYTES).get("added_tokens")
    known = added if isinstance(added, list) else []
    ids = [token.get("id") for token in known if isinstance(token, dict) and token.get("content") == name]
    return [token for token in ids if isinstance(token, int) and 0 <= token < vocab_size]
