"""What `config.json` may say, and how a folder that cannot be used is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tandem.common.errors import ConfigError
from tandem.engine.model.config import ModelConfig, RopeConfig

BASE: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 512,
    "max_position_embeddings": 1024,
    "rms_norm_eps": 1e-5,
    "eos_token_id": 2,
}
MISTRAL = {"architectures": ["MistralForCausalLM"], "model_type": "mistral"}
QWEN2 = {"architectures": ["Qwen2ForCausalLM"], "model_type": "qwen2"}
QWEN3 = {"architectures": ["Qwen3ForCausalLM"], "model_type": "qwen3"}
REMOVED = object()


DEEP: Any = []
for _ in range(600):
    DEEP = [DEEP]


def read(folder: Path, generation: dict[str, Any] | None = None, **changes: Any) -> ModelConfig:
    fields = {name: value for name, value in {**BASE, **changes}.items() if value is not REMOVED}
    (folder / "config.json").write_text(json.dumps(fields))
    if generation is not None:
        (folder / "generation_config.json").write_text(json.dumps(generation))
    return ModelConfig.from_folder(folder)


def test_a_plain_llama_is_read(tmp_path: Path) -> None:
    config = read(tmp_path)
    assert (config.num_layers, config.num_heads, config.num_kv_heads, config.head_dim) == (4, 4, 2, 16)
    assert config.rope == RopeConfig(theta=10_000.0)
    assert config.sliding_windows == (None,) * 4
    assert (config.qkv_bias, config.o_bias, config.mlp_bias, config.qk_norm) == (False, False, False, False)
    assert config.name == tmp_path.name


def test_families_differ_in_biases_norms_and_head_size(tmp_path: Path) -> None:
    llama = read(tmp_path, attention_bias=True, mlp_bias=True)
    assert (llama.qkv_bias, llama.o_bias, llama.mlp_bias) == (True, True, True)
    qwen2 = read(tmp_path, **QWEN2)
    assert (qwen2.qkv_bias, qwen2.o_bias, qwen2.qk_norm) == (True, False, False)
    qwen3 = read(tmp_path, **QWEN3)
    assert (qwen3.qkv_bias, qwen3.qk_norm, qwen3.head_dim) == (False, True, 128)


def test_an_explicit_head_size_wins_over_the_quotient(tmp_path: Path) -> None:
    assert read(tmp_path, head_dim=24).head_dim == 24
    assert read(tmp_path, head_dim=None).head_dim == 16


def test_llama_without_kv_heads_has_one_per_head(tmp_path: Path) -> None:
    assert read(tmp_path, num_key_value_heads=REMOVED).num_kv_heads == 4


@pytest.mark.parametrize(
    ("changes", "windows"),
    [
        ({**MISTRAL, "sliding_window": 7}, (7, 7, 7, 7)),
        ({**MISTRAL, "sliding_window": None}, (None,) * 4),
        ({**MISTRAL}, (4096,) * 4),
        ({**QWEN2, "sliding_window": 7}, (None,) * 4),
        ({**QWEN2, "sliding_window": 7, "use_sliding_window": True, "max_window_layers": 3}, (None, None, None, 7)),
        ({**QWEN3, "sliding_window": 7, "use_sliding_window": True, "layer_types":
            ["sliding_attention", "full_attention"] * 2}, (7, None, 7, None)),
        ({"sliding_window": 7}, (None,) * 4),
    ],
)  # fmt: skip
def test_sliding_windows_follow_the_family(
    tmp_path: Path, changes: dict[str, Any], windows: tuple[int | None, ...]
) -> None:
    assert read(tmp_path, **changes).sliding_windows == windows


def test_both_forms_of_rope_settings_mean_the_same(tmp_path: Path) -> None:
    llama3 = {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 64}
    old = read(tmp_path, rope_theta=5e5, rope_scaling={"rope_type": "llama3", **llama3})
    new = read(tmp_path, rope_parameters={"rope_type": "llama3", "rope_theta": 5e5, **llama3})
    assert old.rope == new.rope
    assert old.rope.kind == "llama3"
    assert read(tmp_path, rope_scaling={"type": "linear", "factor": 2}).rope == RopeConfig("linear", factor=2.0)


def test_yarn_takes_its_context_from_the_model_and_its_temperature_from_the_factor(tmp_path: Path) -> None:
    rope = read(tmp_path, rope_scaling={"type": "yarn", "factor": 4.0}).rope
    assert rope.original_max_position_embeddings == 1024
    assert rope.attention_factor == pytest.approx(1.1386294)
    given = read(tmp_path, rope_scaling={"type": "yarn", "factor": 4.0, "attention_factor": 1.5})
    assert given.rope.attention_factor == 1.5


def test_end_tokens_come_from_the_generation_config_first(tmp_path: Path) -> None:
    assert read(tmp_path).eos_token_ids == (2,)
    assert read(tmp_path, {"eos_token_id": [5, 2, 5]}).eos_token_ids == (5, 2)
    assert read(tmp_path, {"temperature": 0.7}).eos_token_ids == (2,)
    assert read(tmp_path, {}, eos_token_id=None).eos_token_ids == ()


def test_the_tokenizers_end_token_ends_too(tmp_path: Path) -> None:
    added = [{"id": 5, "content": "</s>"}, {"id": 9, "content": "<|im_end|>"}, {"id": 600, "content": "<|far|>"}]
    (tmp_path / "tokenizer.json").write_text(json.dumps({"added_tokens": added}))
    path = tmp_path / "special_tokens_map.json"
    for name, ids in (("<|im_end|>", (2, 9)), ("<|far|>", (2,)), ("<|unknown|>", (2,))):
        path.write_text(json.dumps({"eos_token": {"content": name}}))
        assert read(tmp_path).eos_token_ids == ids
    (tmp_path / "tokenizer_config.json").write_text('{"eos_token": "</s>", "added_tokens_decoder": {}}')
    assert read(tmp_path, {"eos_token_id": [7, 5]}).eos_token_ids == (7, 5)
    assert read(tmp_path, {}, eos_token_id=None).eos_token_ids == (5,)


@pytest.mark.parametrize(
    ("name", "fields", "kind"),
    [
        ("BertForMaskedLM", {"model_type": "bert"}, "an encoder like BERT"),
        ("XLMRobertaModel", {"model_type": "xlm-roberta"}, "an encoder like BERT"),
        ("Qwen2ForSequenceClassification", {"model_type": "qwen2"}, "an encoder like BERT"),
        ("T5ForConditionalGeneration", {"is_encoder_decoder": True}, "an encoder with a decoder"),
        ("LlavaForConditionalGeneration", {"vision_config": {"a": 1}}, "a model of images or audio"),
        ("MixtralForCausalLM", {"num_local_experts": 8}, "a mixture of experts"),
    ],
)
def test_a_model_of_another_kind_is_named_as_such(tmp_path: Path, name: str, fields: dict[str, Any], kind: str) -> None:
    with pytest.raises(ConfigError, match=rf"{name}, {kind}.* is not supported; supported are LlamaForCausalLM"):
        read(tmp_path, architectures=[name], **fields)


def test_an_unknown_architecture_is_refused_with_the_supported_ones(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"GPT2LMHeadModel.*LlamaForCausalLM, Mistral.*, Qwen2.*, Qwen3ForCausalLM"):
        read(tmp_path, architectures=["GPT2LMHeadModel"])


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"architectures": REMOVED}, "architectures"),
        ({"architectures": "LlamaForCausalLM"}, "architectures"),
        ({"model_type": "qwen2"}, "model_type"),
        ({"hidden_size": REMOVED}, "hidden_size: missing"),
        ({"hidden_size": "64"}, "hidden_size: must be a positive integer, not '64'"),
        ({"hidden_size": 66}, "hidden_size: 66 is not a multiple of num_attention_heads"),
        ({"num_hidden_layers": 0}, "num_hidden_layers"),
        ({"num_hidden_layers": True}, "num_hidden_layers"),
        ({"num_key_value_heads": 3}, "num_key_value_heads"),
        ({"num_key_value_heads": REMOVED, **QWEN2}, "num_key_value_heads: missing"),
        ({"head_dim": 15}, "head_dim"),
        ({"vocab_size": -1}, "vocab_size"),
        ({"max_position_embeddings": 1e3}, "max_position_embeddings"),
        ({"rms_norm_eps": 0}, "rms_norm_eps"),
        ({"rms_norm_eps": 1e30}, "rms_norm_eps: must be 1e-20 to 0.1"),
        ({"rms_norm_eps": 10**400}, "rms_norm_eps"),
        ({"rope_theta": float("nan")}, "rope_theta"),
        ({"rope_theta": 1e300}, "rope_theta"),
        ({"num_hidden_layers": 10**9}, "num_hidden_layers: must be at most 4096"),
        ({"head_dim": 10**9}, "head_dim"),
        ({"vocab_size": 10**400}, "vocab_size"),
        ({"max_position_embeddings": 10**12}, "max_position_embeddings"),
        ({"hidden_size": DEEP}, "hidden_size"),
        ({"hidden_size": "x" * 10**6}, "hidden_size"),
        ({"model_type": DEEP}, "model_type"),
        ({"architectures": DEEP}, "architectures"),
        ({**QWEN3, "use_sliding_window": True, "sliding_window": 8, "layer_types": [[]] * 4}, "layer_types"),
        ({"hidden_act": "gelu"}, "hidden_act: 'gelu' is not supported; only silu"),
        ({"tie_word_embeddings": "yes"}, "tie_word_embeddings"),
        ({"quantization_config": {"quant_method": "awq"}}, "quantization_config"),
        ({"attention_bias": True, **MISTRAL}, "attention_bias"),
        ({"mlp_bias": True, **QWEN3}, "mlp_bias"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor"),
        ({"rope_theta": "big"}, "rope_theta"),
        ({"rope_theta": 5.0, "rope_parameters": {"rope_theta": 6.0}}, "rope_theta: contradicts"),
        ({"rope_scaling": "linear"}, "rope_scaling"),
        ({"rope_scaling": {"type": "dynamic", "factor": 2}}, "rope_type: 'dynamic' is not supported; supported are"),
        ({"rope_scaling": {"type": "linear"}}, "rope_scaling: factor: missing"),
        ({"rope_scaling": {"type": "llama3", "factor": 8, "low_freq_factor": 4, "high_freq_factor": 1}},
         "high_freq_factor"),
        ({"rope_scaling": {"type": "yarn", "factor": 0}}, "factor"),
        ({"rope_parameters": {"full_attention": {"rope_theta": 1e4}}}, "rope_parameters"),
        ({"eos_token_id": 512}, "eos_token_id: 512"),
        ({"eos_token_id": [2, "x"]}, "eos_token_id: 'x'"),
        ({**MISTRAL, "sliding_window": 0}, "sliding_window"),
        ({**QWEN2, "use_sliding_window": True, "sliding_window": 8}, "max_window_layers"),
        ({**QWEN3, "use_sliding_window": True, "sliding_window": 8, "layer_types": ["full_attention"]}, "layer_types"),
        ({**QWEN3, "layer_types": ["sliding_attention"] * 4}, "layer_types"),
    ],
)  # fmt: skip
def test_a_wrong_field_is_refused_by_name(tmp_path: Path, changes: dict[str, Any], named: str) -> None:
    with pytest.raises(ConfigError) as caught:
        read(tmp_path, **changes)
    assert named in str(caught.value)
    assert "config.json" in str(caught.value)
    assert len(str(caught.value)) < 500


def test_unreadable_files_are_refused_by_name(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"config\.json: cannot be read"):
        ModelConfig.from_folder(tmp_path)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(ConfigError, match="not valid JSON"):
        ModelConfig.from_folder(tmp_path)
    (tmp_path / "config.json").write_text("[]")
    with pytest.raises(ConfigError, match="must hold a JSON object"):
        ModelConfig.from_folder(tmp_path)
    with pytest.raises(ConfigError, match=r"generation_config\.json: eos_token_id: 9999"):
        read(tmp_path, {"eos_token_id": 9999})


def test_files_of_any_size_depth_or_kind_are_refused_by_name(tmp_path: Path) -> None:
    path = tmp_path / "config.json"
    path.write_text('{"a":' + "[" * 100_000 + "]" * 100_000 + "}")
    with pytest.raises(ConfigError, match=r"config\.json: not valid JSON"):
        ModelConfig.from_folder(tmp_path)
    path.write_bytes(b'{"model_type": "\xff"}')
    with pytest.raises(ConfigError, match=r"config\.json: is not UTF-8"):
        ModelConfig.from_folder(tmp_path)
    with path.open("wb") as file:
        file.truncate(1 << 40)
    with pytest.raises(ConfigError, match=r"config\.json: has more than"):
        ModelConfig.from_folder(tmp_path)
