"""Arguments of `load_model`, and the choices it makes."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from tandem.common.errors import ConfigError
from tandem.engine.model.loader import load_model
from tests.engine.paged_model import PagedModel
from tests.models import tiny_model


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_model("qwen2", tmp_path_factory.mktemp("model") / "qwen2")


@pytest.mark.parametrize(
    ("argument", "value"),
    [("dtype", "float64"), ("device", "toaster"), ("device", "meta"), ("quantization", "int3"), ("attention", "eager")],
)
def test_an_unknown_choice_is_refused_by_name(folder: Path, argument: str, value: str) -> None:
    arguments = {"dtype": "float32", "device": "cpu", "quantization": None, "attention": "auto", argument: value}
    with pytest.raises(ConfigError, match=f"{argument}: '{value}'"):
        load_model(folder, **arguments)  # type: ignore[arg-type]


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_a_missing_gpu_is_named(folder: Path) -> None:
    with pytest.raises(ConfigError, match="'cuda' is not available"):
        load_model(folder, dtype="auto", device="cuda", quantization=None)


def test_triton_needs_a_gpu(folder: Path) -> None:
    with pytest.raises(ConfigError, match="triton needs a GPU"):
        load_model(folder, dtype="float32", device="cpu", quantization=None, attention="triton")


def test_the_dtype_that_is_asked_for_is_used(folder: Path) -> None:
    for name, dtype in (("float32", torch.float32), ("bfloat16", torch.bfloat16), ("float16", torch.float16)):
        assert load_model(folder, dtype=name, device="cpu", quantization=None).dtype == dtype
    assert load_model(folder, dtype="auto", device="cpu", quantization=None).dtype in (torch.float32, torch.bfloat16)


@pytest.mark.parametrize(("dtype", "quantization"), [("bfloat16", None), ("float16", None), ("float32", "int8"),
                                                     ("bfloat16", "int8")])  # fmt: skip
def test_less_precise_models_stay_close(folder: Path, dtype: str, quantization: str | None) -> None:
    tokens = [(7 * index) % 512 for index in range(60)]
    exact = load_model(folder, dtype="float32", device="cpu", quantization=None)
    rough = load_model(folder, dtype=dtype, device="cpu", quantization=quantization)
    expected, logits = (PagedModel(loaded, 1, 64).prefill(0, tokens, 50) for loaded in (exact, rough))
    error = (logits - expected).norm() / expected.norm()
    assert 0 < error < 0.05
    decoded = PagedModel(rough, 1, 64)
    decoded.prefill(0, tokens[:-1])
    error = (decoded.step([(0, tokens[-1])])[0][0] - expected[-1]).norm() / expected[-1].norm()
    assert 0 < error < 0.05


def test_layers_are_announced_once_their_kv_is_written(folder: Path) -> None:
    loaded = load_model(folder, dtype="float32", device="cpu", quantization=None)
    paged = PagedModel(loaded, 1, 32)
    before = paged.pool.storage.clone()
    seen: list[int] = []

    def announced(layer: int) -> None:
        changed = (paged.pool.storage != before).flatten(1).any(dim=1)
        assert changed.tolist() == [index <= layer for index in range(loaded.config.num_layers)]
        seen.append(layer)

    paged.step(prefills=[(0, [4, 5, 6])], on_layer=announced)
    assert seen == list(range(loaded.config.num_layers))
