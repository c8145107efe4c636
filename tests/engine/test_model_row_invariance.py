"""What does not change a row's logits by a single bit: other rows in the batch, padding, and how a prompt is chunked.

It holds where `LoadedModel.row_invariant` says so. It was measured on processors with AVX-512, in bfloat16 with
AVX512-BF16 or AMX; elsewhere it is not promised (with AVX2 it does not hold), so these tests run there only. It is what
makes greedy output the same whether a request ran alone, batched with others, handed over, preempted or recomputed.

Not row-invariant: bfloat16 models with a large layer of more than 448 inputs (`linear.py`); float32 models with a layer
of more than 1,024 inputs; int8 models; any model on a GPU; and without native kernels (`native_attention.py`) some head
sizes in bfloat16 (`cpu_attention.py`).
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

from tandem.engine.loader import LoadedModel, load_model
from tests.engine.paged_model import PagedModel
from tests.models import VOCAB_SIZE, tiny_model

pytestmark = pytest.mark.skipif(
    torch.backends.cpu.get_cpu_capability() != "AVX512", reason="row invariance was measured with AVX-512 only"
)
BFLOAT16 = torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()

SIZES: dict[str, dict[str, Any]] = {
    "tiny": {},
    "small-model": {"hidden_size": 384, "intermediate_size": 960, "num_attention_heads": 6, "num_hidden_layers": 2},
    "sliding-window": {"family": "mistral", "sliding_window": 50, "hidden_size": 128},
    "qk-norm": {"family": "qwen3", "num_attention_heads": 8, "head_dim": 32},
    "wide-heads": {"head_dim": 128},
}


@dataclass(frozen=True)
class Variant:
    dtype: str
    attention: str
    """auto: with native kernels where they can be had, and the model is bfloat16; torch: without."""


VARIANTS = (Variant("bfloat16", "auto"), Variant("bfloat16", "torch"), Variant("float32", "auto"))


@pytest.fixture(scope="module", params=[(size, variant) for size in SIZES for variant in VARIANTS], ids=str)
def loaded(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> LoadedModel:
    size, variant = request.param
    dtype = variant.dtype
    if dtype == "bfloat16" and not BFLOAT16:
        pytest.skip("this processor does not compute in bfloat16")
    overrides = dict(SIZES[size])
    folder = tmp_path_factory.mktemp("model") / size
    tiny_model(overrides.pop("family", "llama"), folder, **overrides)
    return load_model(folder, dtype=dtype, device="cpu", quantization=None, attention=variant.attention)


def prompt(length: int, seed: int) -> list[int]:
    return torch.randint(0, VOCAB_SIZE, (length,), generator=torch.Generator().manual_seed(seed)).tolist()


def test_these_models_promise_it(loaded: LoadedModel) -> None:
    assert loaded.row_invariant


@pytest.mark.parametrize(
    ("dtype", "quantization", "overrides"),
    [
        ("bfloat16", None, {"hidden_size": 512, "intermediate_size": 2048}),
        ("float32", None, {"intermediate_size": 1040}),
        ("float32", "int8", {}),
    ],
)
def test_models_for_which_it_does_not_hold_do_not_promise_it(
    tmp_path: Path, dtype: str, quantization: str | None, overrides: dict[str, Any]
) -> None:
    folder = tiny_model("llama", tmp_path / "model", num_hidden_layers=1, **overrides)
    assert not load_model(folder, dtype=dtype, device="cpu", quantization=quantization).row_invariant


@pytest.mark.parametrize("length", [5, 130, 700])
def test_a_decode_row_does_not_depend_on_its_batch(loaded: LoadedModel, length: int) -> None:
    texts = [prompt(length, 1)] + [prompt(size, seed) for seed, size in enumerate((3, 64, 257, 600, 90, 31), start=2)]

    def decoded(requests: int, beside: int) -> torch.Tensor:
        paged = PagedModel(loaded, requests + 1, 1100, seed=requests)
        for request, text in enumerate(texts[:requests]):
            paged.prefill(request, text)
        rows = [(request, 7) for request in range(requests)]
        return paged.step(rows, [(requests, prompt(beside, 99))] if beside else [])[0][0]

    alone = decoded(1, 0)
    for requests, beside in ((2, 0), (7, 0), (1, 40), (7, 450), (7, 1000)):
        assert torch.equal(decoded(requests, beside), alone), f"{requests} decode rows beside {beside} prompt tokens"


def test_a_prompt_row_does_not_depend_on_the_chunks(loaded: LoadedModel) -> None:
    tokens = prompt(700, 3)
    whole = PagedModel(loaded, 1, 1024).prefill(0, tokens)
    for chunk in (11, 16, 33, 97, 256, 512):
        chunked = PagedModel(loaded, 1, 1024, seed=chunk).prefill(0, tokens, chunk)
        assert torch.equal(chunked, whole), f"chunks of {chunk}"


def test_a_row_is_the_same_decoded_or_recomputed_as_a_prompt(loaded: LoadedModel) -> None:
    tokens = prompt(560, 4)
    whole = PagedModel(loaded, 1, 1024).prefill(0, tokens)
    paged = PagedModel(loaded, 1, 1024, seed=5)
    paged.prefill(0, tokens[:500])
    decoded = torch.stack([paged.step([(0, token)])[0][0] for token in tokens[500:]])
    assert torch.equal(decoded, whole[500:])


def test_the_hand_over_of_a_prefix_does_not_change_what_follows(loaded: LoadedModel) -> None:
    tokens = prompt(200, 6)
    sender, receiver = (PagedModel(loaded, 1, 512, seed=seed) for seed in (1, 2))
    expected = sender.prefill(0, tokens)
    place = torch.arange(160)
    slots = [paged.tables[0, place // 16] * 16 + place % 16 for paged in (sender, receiver)]
    for layer in range(loaded.config.num_layers):
        payload = memoryview(bytearray(160 * sender.pool.row_bytes))
        sender.pool.read_rows(layer, slots[0], payload)
        receiver.pool.write_rows(layer, slots[1], payload)
    receiver.lengths[0] = 160
    assert torch.equal(receiver.prefill(0, tokens[160:]), expected[160:])
