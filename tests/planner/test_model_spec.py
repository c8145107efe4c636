"""What a config.json says a model costs; and what is wrong with one, by name."""

from __future__ import annotations

from typing import Any

import pytest

from tandem.common.errors import ConfigError
from tandem.planner.model_spec import ModelSpec
from tests.planner import known_models as known


@pytest.mark.parametrize(
    ("config", "billions", "active", "kv_bytes"),
    [
        (known.LLAMA_8B, 8.03, 7.5, 131_072),
        (known.LLAMA_70B, 70.55, 69.5, 327_680),
        (known.QWEN3_32B, 32.76, 32.0, 262_144),
        (known.QWEN3_235B, 235.1, 21.6, 192_512),
        (known.DEEPSEEK_V3, 671.0, 36.8, 70_272),
        (known.GPT_OSS_120B, 116.8, 5.1, 73_728),
        (known.OPT_13B, 12.85, 12.85, 819_200),
    ],
)
def test_sizes_are_those_that_the_models_authors_give(
    config: dict[str, Any], billions: float, active: float, kv_bytes: int
) -> None:
    spec = ModelSpec.from_config(config)
    assert spec.parameters == pytest.approx(billions * 1e9, rel=0.01)
    assert spec.active_parameters == pytest.approx(active * 1e9, rel=0.03)
    assert spec.kv_bytes_per_token == kv_bytes


def test_weights_are_as_wide_as_the_config_or_the_caller_says() -> None:
    half = ModelSpec.from_config(known.LLAMA_8B)
    assert half.weight_bytes == 2.0 * half.parameters
    eight = ModelSpec.from_config(known.LLAMA_8B, weights="fp8", kv="fp8")
    embeddings = 2 * 128256 * 4096
    assert eight.weight_bytes == half.parameters + embeddings
    assert eight.kv_bytes_per_token == half.kv_bytes_per_token / 2
    assert ModelSpec.from_config(known.GPT_OSS_120B).weight_bytes == pytest.approx(65e9, rel=0.05)
    awq = ModelSpec.from_config(known.LLAMA_8B | {"quantization_config": {"quant_method": "awq", "bits": 4}})
    assert awq.weights == awq.expert_weights == "int4"


def test_windows_are_those_of_the_layers_that_have_one() -> None:
    assert ModelSpec.from_config(known.GPT_OSS_120B).window_groups() == ((128, 18), (None, 18))
    assert ModelSpec.from_config(known.LLAMA_8B | {"sliding_window": 4096}).window_groups() == ((4096, 32),)
    unused = known.LLAMA_8B | {"sliding_window": 4096, "use_sliding_window": False}
    assert ModelSpec.from_config(unused).window_groups() == ((None, 32),)


def test_fields_of_a_text_config_go_before_the_others() -> None:
    outer = {"model_type": "gemma3", "hidden_size": 1, "text_config": known.LLAMA_8B}
    assert ModelSpec.from_config(outer) == ModelSpec.from_config(known.LLAMA_8B)


@pytest.mark.parametrize(
    ("change", "names"),
    [
        ({"hidden_size": None}, "hidden_size: is missing"),
        ({"hidden_size": "many"}, "hidden_size: 'many' is not a number"),
        ({"hidden_size": float("nan")}, "hidden_size: 'nan' is not a number"),
        ({"num_hidden_layers": 0}, "num_hidden_layers: 0 must be a whole number from 1"),
        ({"num_hidden_layers": 10**6}, "num_hidden_layers: 1000000 must"),
        ({"vocab_size": 1.5}, "vocab_size: 1.5 must"),
        ({"vocab_size": True}, "vocab_size: 'True' is not a number"),
        ({"num_key_value_heads": 5}, "num_key_value_heads: 5 does not divide"),
        ({"num_attention_heads": 30, "num_key_value_heads": 30}, "num_attention_heads: 30 does not divide"),
        ({"torch_dtype": "float8"}, "torch_dtype: 'float8' is not known; one of float32"),
        ({"quantization_config": {"quant_method": "magic"}}, "quant_method: 'magic' is not known"),
        ({"num_experts": 8, "num_experts_per_tok": 9}, "num_experts_per_tok: 9 is more than the 8"),
        ({"num_experts": 8}, "num_experts_per_tok: is missing"),
        ({"sliding_window": 8, "layer_types": ["full_attention"]}, "layer_types: has 1 entries for 32 layers"),
        ({"tie_word_embeddings": "no"}, "tie_word_embeddings: 'no' must be true or false"),
    ],
)
def test_a_mistake_names_the_field(change: dict[str, Any], names: str) -> None:
    with pytest.raises(ConfigError, match=names):
        ModelSpec.from_config(known.LLAMA_8B | change, "a/model")
