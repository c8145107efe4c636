"""The oracle: `transformers` on the same weights, in float32, for every family and variant the engine claims."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from tandem.engine.model.loader import LoadedModel, load_model
from tests.engine.paged_model import PagedModel
from tests.models import VOCAB_SIZE, tiny_model

TOLERANCE = 1e-4
LLAMA3 = {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 64}
VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", {}),
    "llama-tied": ("llama", {"tie_word_embeddings": True}),
    "llama-biases": ("llama", {"attention_bias": True, "mlp_bias": True}),
    "llama-head-dim": ("llama", {"head_dim": 24}),
    "llama-one-kv-head-each": ("llama", {"num_key_value_heads": 4}),
    "llama-odd-group": ("llama", {"num_attention_heads": 6, "hidden_size": 96}),
    "llama-odd-sizes": ("llama", {"hidden_size": 68, "head_dim": 18, "intermediate_size": 83}),
    "llama-linear-rope": ("llama", {"rope_parameters": {"rope_type": "linear", "factor": 3.0, "rope_theta": 5e3}}),
    "llama-llama3-rope": ("llama", {"rope_parameters": {"rope_type": "llama3", "rope_theta": 5e5, **LLAMA3}}),
    "llama-yarn-rope": ("llama", {"rope_parameters": {"rope_type": "yarn", "factor": 4.0, "rope_theta": 1e4,
                                                      "original_max_position_embeddings": 256}}),
    "llama-yarn-mscale": ("llama", {"rope_parameters": {"rope_type": "yarn", "factor": 8.0, "rope_theta": 1e4,
                                                        "mscale": 1.2, "mscale_all_dim": 0.7, "beta_fast": 16.0,
                                                        "truncate": False, "original_max_position_embeddings": 128}}),
    "mistral": ("mistral", {}),
    "mistral-window": ("mistral", {"sliding_window": 11}),
    "mistral-window-of-blocks": ("mistral", {"sliding_window": 32, "head_dim": 32}),
    "qwen2": ("qwen2", {}),
    "qwen2-window-in-upper-layers": ("qwen2", {"use_sliding_window": True, "sliding_window": 21,
                                               "max_window_layers": 1}),
    "qwen3": ("qwen3", {}),
    "qwen3-biases-head-dim": ("qwen3", {"attention_bias": True, "head_dim": 32, "tie_word_embeddings": True}),
    "qwen3-window-by-layer-types": ("qwen3", {
        "use_sliding_window": True, "sliding_window": 9,
        "layer_types": ["sliding_attention", "full_attention", "sliding_attention"]}),
}  # fmt: skip


class Oracle:
    """One variant in both implementations."""

    def __init__(self, folder: Path) -> None:
        from transformers import AutoModelForCausalLM

        self.reference = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
        self.loaded: LoadedModel = load_model(folder, dtype="float32", device="cpu", quantization=None)

    def logits(self, tokens: list[int]) -> Tensor:
        with torch.inference_mode():
            logits: Tensor = self.reference(torch.tensor([tokens])).logits[0]
        return logits

    def paged(self, requests: int = 1) -> PagedModel:
        return PagedModel(self.loaded, requests, 512)


@pytest.fixture(scope="module", params=VARIANTS)
def oracle(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Oracle:
    family, overrides = VARIANTS[request.param]
    return Oracle(tiny_model(family, tmp_path_factory.mktemp("model") / request.param, **overrides))


def prompt(length: int, seed: int = 1) -> list[int]:
    return torch.randint(0, VOCAB_SIZE, (length,), generator=torch.Generator().manual_seed(seed)).tolist()


def assert_close(ours: Tensor, reference: Tensor) -> None:
    assert ours.dtype == torch.float32
    assert (ours - reference).abs().max().item() <= TOLERANCE


def test_logits_agree_at_every_position_of_a_prompt(oracle: Oracle) -> None:
    tokens = prompt(300)
    assert_close(oracle.paged().prefill(0, tokens), oracle.logits(tokens))


@pytest.mark.parametrize("chunk", [1, 7, 64])
def test_logits_agree_when_a_prompt_is_computed_in_chunks(oracle: Oracle, chunk: int) -> None:
    tokens = prompt(90)
    assert_close(oracle.paged().prefill(0, tokens, chunk), oracle.logits(tokens))


def test_logits_agree_when_requests_of_different_lengths_decode_beside_a_prompt(oracle: Oracle) -> None:
    texts = [prompt(length, seed) for seed, length in enumerate((40, 75, 18, 300), start=2)]
    fresh = prompt(50, 9)
    paged = oracle.paged(len(texts) + 1)
    for request, text in enumerate(texts):
        paged.prefill(request, text[:-8], 33)
    decoded = []
    for back in range(8, 0, -1):
        new = [(len(texts), fresh[(8 - back) * 6 : (9 - back) * 6])]
        decoded.append(paged.step([(request, text[-back]) for request, text in enumerate(texts)], new)[0])
    for request, text in enumerate(texts):
        assert_close(torch.stack([step[request] for step in decoded]), oracle.logits(text)[-8:])


def test_greedy_continuation_of_64_tokens_is_identical(oracle: Oracle) -> None:
    tokens = prompt(30)
    expected = oracle.reference.generate(
        torch.tensor([tokens]), max_new_tokens=64, do_sample=False, eos_token_id=-1, pad_token_id=0
    )[0, 30:].tolist()
    paged = oracle.paged()
    logits = paged.prefill(0, tokens, 16)[-1]
    produced: list[int] = []
    while len(produced) < 64:
        produced.append(int(logits.argmax()))
        logits = paged.step([(0, produced[-1])])[0][0]
    assert produced == expected
