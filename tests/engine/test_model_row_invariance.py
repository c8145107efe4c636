"""What does not change a row's logits by a single bit: other rows in the batch, padding, and how a prompt is chunked.

It holds where `Decoder.row_invariant` says so, and was measured on processors with AMX; elsewhere nothing is promised,
so these tests run there only. It is what makes greedy output the same whether a request ran alone, batched with
others, handed over, preempted or recomputed.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch

from tandem.engine.loader import LoadedModel, load_model
from tests.engine.paged_model import PagedModel
from tests.models import VOCAB_SIZE, tiny_model

pytestmark = pytest.mark.skipif(
    not torch.cpu._is_amx_tile_supported(), reason="row invariance is promised on processors with AMX only"
)

SIZES: dict[str, dict[str, Any]] = {
    "tiny": {},
    "small-model": {"hidden_size": 384, "intermediate_size": 960, "num_attention_heads": 6, "num_hidden_layers": 2},
    "sliding-window": {"family": "mistral", "sliding_window": 50, "hidden_size": 128},
    "qk-norm": {"family": "qwen3", "num_attention_heads": 8, "head_dim": 32},
}


@pytest.fixture(scope="module", params=[(size, dtype) for size in SIZES for dtype in ("bfloat16", "float32")])
def loaded(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> LoadedModel:
    size, dtype = request.param
    overrides = dict(SIZES[size])
    folder = tmp_path_factory.mktemp("model") / size
    tiny_model(overrides.pop("family", "llama"), folder, **overrides)
    return load_model(folder, dtype=dtype, device="cpu", quantization=None)


def prompt(length: int, seed: int) -> list[int]:
    return torch.randint(0, VOCAB_SIZE, (length,), generator=torch.Generator().manual_seed(seed)).tolist()


def test_these_models_promise_it(loaded: LoadedModel) -> None:
    assert loaded.decoder.row_invariant


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
