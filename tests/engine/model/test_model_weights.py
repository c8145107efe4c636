"""Strict reading of weights: one file or sharded, nothing missing, nothing unexpected, nothing executed."""

from __future__ import annotations

import json
import resource
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from tandem.common.errors import ConfigError
from tandem.engine.model.loader import LoadedModel, load_model
from tests.engine.paged_model import PagedModel
from tests.models import tiny_model

Edit = Callable[[dict[str, Tensor]], object]
TOKENS = list(range(3, 40))


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_model("llama", tmp_path_factory.mktemp("model") / "llama")


@pytest.fixture
def folder(made: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(made, tmp_path / "copy"))


def load(folder: Path) -> LoadedModel:
    return load_model(folder, dtype="float32", device="cpu", quantization=None)


def logits(folder: Path) -> Tensor:
    return PagedModel(load(folder), 1, 64).prefill(0, TOKENS)


def edit(folder: Path, change: Edit) -> None:
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors")


def test_sharded_weights_give_the_same_model(made: Path, tmp_path: Path) -> None:
    sharded = tiny_model("llama", tmp_path / "sharded", shard_size="100KB")
    assert len(list(sharded.glob("model-*.safetensors"))) > 2
    assert not (sharded / "model.safetensors").exists()
    assert torch.equal(logits(sharded), logits(made))


def test_missing_unexpected_and_misshapen_weights_are_listed_at_once(folder: Path) -> None:
    def change(tensors: dict[str, Tensor]) -> None:
        del tensors["model.layers.1.mlp.up_proj.weight"]
        tensors["model.layers.7.surprise"] = torch.zeros(1)
        tensors["model.norm.weight"] = torch.zeros(63)

    edit(folder, change)
    with pytest.raises(ConfigError) as caught:
        load(folder)
    message = str(caught.value)
    assert "missing: model.layers.1.mlp.up_proj.weight" in message
    assert "unexpected: model.layers.7.surprise" in message
    assert "wrong shape: model.norm.weight is [63] instead of [64]" in message


def test_many_wrong_names_are_cut_short(folder: Path) -> None:
    edit(folder, lambda tensors: tensors.update({f"extra.{index}": torch.zeros(1) for index in range(20)}))
    with pytest.raises(ConfigError, match="and 12 more"):
        load(folder)


def test_buffers_of_old_checkpoints_are_tolerated(folder: Path, made: Path) -> None:
    name = "model.layers.0.self_attn.rotary_emb.inv_freq"
    edit(folder, lambda tensors: tensors.update({name: torch.zeros(8)}))
    assert torch.equal(logits(folder), logits(made))


def test_a_copy_of_tied_embeddings_is_tolerated_and_ignored(tmp_path: Path) -> None:
    plain = tiny_model("llama", tmp_path / "tied", tie_word_embeddings=True)
    expected = logits(plain)
    edit(plain, lambda tensors: tensors.update({"lm_head.weight": torch.zeros(512, 64)}))
    assert torch.equal(logits(plain), expected)


def test_an_untied_model_needs_its_head(folder: Path) -> None:
    edit(folder, lambda tensors: tensors.pop("lm_head.weight"))
    with pytest.raises(ConfigError, match=r"missing: lm_head\.weight"):
        load(folder)


def test_integer_weights_are_refused(folder: Path) -> None:
    edit(folder, lambda tensors: tensors.update({"model.norm.weight": torch.ones(64, dtype=torch.int8)}))
    with pytest.raises(ConfigError, match=r"model\.norm\.weight holds torch\.int8"):
        load(folder)


def test_pickled_weights_are_never_opened(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    with pytest.raises(ConfigError, match="only pickled weights"):
        load(folder)


def test_a_folder_without_weights_is_refused(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    with pytest.raises(ConfigError, match=r"neither model\.safetensors nor"):
        load(folder)


def test_a_truncated_file_is_refused(folder: Path) -> None:
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(ConfigError, match="not a usable safetensors file"):
        load(folder)


@pytest.mark.parametrize(
    ("index", "problem"),
    [
        ("{", "weight_map"),
        ({"metadata": {}}, "weight_map"),
        ({"weight_map": {"a": "gone.safetensors"}}, "gone.safetensors is missing"),
        ({"weight_map": {"a": "../model.safetensors"}}, "is not a file name"),
    ],
)
def test_a_broken_index_is_refused(folder: Path, index: object, problem: str) -> None:
    text = index if isinstance(index, str) else json.dumps(index)
    (folder / "model.safetensors.index.json").write_text(text)
    with pytest.raises(ConfigError, match=problem):
        load(folder)


def test_the_namespace_follows_everything_that_shapes_the_kv(folder: Path, made: Path) -> None:
    base = load(made)
    assert load(folder).namespace == base.namespace
    assert load(folder).compatibility == base.compatibility
    assert len(base.compatibility) == 32
    others = [load_model(made, dtype="bfloat16", device="cpu", quantization=None).namespace]
    others.append(load_model(made, dtype="float32", device="cpu", quantization="int8").namespace)

    def changed(name: str, value: object) -> bytes:
        original = (folder / "config.json").read_text()
        fields = json.loads(original)
        fields[name] = value
        (folder / "config.json").write_text(json.dumps(fields))
        namespace = load(folder).namespace
        (folder / "config.json").write_text(original)
        return namespace

    others.append(changed("rope_parameters", {"rope_theta": 2e4, "rope_type": "default"}))
    others.append(changed("rms_norm_eps", 1e-5))
    edit(folder, lambda tensors: tensors["model.norm.weight"].add_(1e-3))
    others.append(load(folder).namespace)
    assert len({base.namespace, *others}) == len(others) + 1


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_weights_that_are_no_numbers_are_warned_of_by_name(
    folder: Path, value: float, caplog: pytest.LogCaptureFixture
) -> None:
    load(folder)
    assert "NaN" not in caplog.text
    edit(folder, lambda tensors: tensors["model.layers.1.mlp.up_proj.weight"][5].fill_(value))
    load(folder)
    [warning] = [record.getMessage() for record in caplog.records if "NaN" in record.getMessage()]
    assert str(folder) in warning
    assert "model.safetensors" in warning
    assert "model.layers.1.mlp.up_proj.weight" in warning


def test_weights_too_large_for_the_dtype_are_warned_of(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    edit(folder, lambda tensors: tensors["model.norm.weight"].fill_(1e6))
    load_model(folder, dtype="float16", device="cpu", quantization=None, attention="torch")
    assert "model.norm.weight hold NaN or infinity as float16" in caplog.text


@pytest.mark.parametrize(
    "changes",
    [
        {"head_dim": 1 << 24},
        {"hidden_size": 1 << 24},
        {"num_hidden_layers": 4096},
        {"vocab_size": 1 << 24},
        {"num_attention_heads": 1 << 20, "num_key_value_heads": 1 << 20, "head_dim": 1 << 20},
    ],
)
def test_sizes_are_held_against_the_weights_before_memory_is_taken(folder: Path, changes: dict[str, int]) -> None:
    change_config(folder, **changes)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(ConfigError, match="do not fit config"):
        load(folder)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 200_000  # KiB


def test_positions_that_nobody_uses_take_no_memory(folder: Path) -> None:
    change_config(folder, max_position_embeddings=2**31 - 1)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    load(folder)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 200_000  # KiB


def change_config(folder: Path, **changes: int) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | changes))
