"""What does not change a row's logits by a single bit: other rows in the batch, padding, and how a prompt is chunked.

It holds where `LoadedModel.row_invariant` says so: with `batch_invariant` by construction, else because it was measured
when the model was loaded (`row_probe.py`). Where nothing is promised there is nothing to test. It is what makes greedy
output the same whether a request ran alone, batched with others, handed over, preempted or recomputed.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from tandem.engine.model.loader import LoadedModel, load_model
from tests.engine.paged_model import PagedModel
from tests.models import VOCAB_SIZE, tiny_model

SIZES: dict[str, dict[str, Any]] = {
    "tiny": {},
    "small-model": {"hidden_size": 384, "intermediate_size": 960, "num_attention_heads": 6, "num_hidden_layers": 2},
    "sliding-window": {"family": "mistral", "sliding_window": 50, "hidden_size": 128},
    "qk-norm": {"family": "qwen3", "num_attention_heads": 8, "head_dim": 32},
    "wide-heads": {"head_dim": 128},
    "no-groups": {"num_key_value_heads": 4, "hidden_size": 512, "intermediate_size": 2048, "num_hidden_layers": 1},
    "odd-sizes": {"head_dim": 24, "intermediate_size": 100, "num_hidden_layers": 1},
}


@dataclass(frozen=True)
class Variant:
    dtype: str
    batch_invariant: bool = False
    quantization: str | None = None


CASES = [(size, Variant(dtype)) for size in SIZES for dtype in ("bfloat16", "float32")]
CASES += [(size, Variant("bfloat16", batch_invariant=True)) for size in ("tiny", "qk-norm")]
CASES += [("sliding-window", Variant("float32", batch_invariant=True))]
CASES += [("tiny", Variant("float32", quantization="int8"))]


@pytest.fixture(scope="module", params=CASES, ids=str)
def loaded(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> LoadedModel:
    size, variant = request.param
    overrides = dict(SIZES[size])
    folder = tmp_path_factory.mktemp("model") / size
    tiny_model(overrides.pop("family", "llama"), folder, **overrides)
    model = load_model(
        folder,
        dtype=variant.dtype,
        device="cpu",
        quantization=variant.quantization,
        batch_invariant=variant.batch_invariant,
    )
    assert model.row_invariant or not variant.batch_invariant
    if not model.row_invariant:
        pytest.skip(f"nothing is promised here: {model.rows.reason}")
    return model


def prompt(length: int, seed: int) -> list[int]:
    return torch.randint(0, VOCAB_SIZE, (length,), generator=torch.Generator().manual_seed(seed)).tolist()


@pytest.mark.parametrize("length", [5, 700])
def test_a_decode_row_does_not_depend_on_its_batch(loaded: LoadedModel, length: int) -> None:
    texts = [prompt(length, 1)] + [prompt(size, seed) for seed, size in enumerate((3, 64, 257, 600, 90, 31), start=2)]

    def decoded(requests: int, beside: int) -> torch.Tensor:
        paged = PagedModel(loaded, requests + 1, 1100, seed=requests)
        for request, text in enumerate(texts[:requests]):
            paged.prefill(request, text)
        rows = [(request, 7) for request in range(requests)]
        return paged.step(rows, [(requests, prompt(beside, 99))] if beside else [])[0][0]

    alone = decoded(1, 0)
    for requests, beside in ((2, 0), (7, 0), (1, 40), (7, 700)):
        assert torch.equal(decoded(requests, beside), alone), f"{requests} decode rows beside {beside} prompt tokens"


def test_a_prompt_row_does_not_depend_on_the_chunks(loaded: LoadedModel) -> None:
    tokens = prompt(700, 3)
    whole = PagedModel(loaded, 1, 1024).prefill(0, tokens)
    for chunk in (11, 33, 97, 256):
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


MOST_REQUESTS, MOST_TOKENS = 3, 800


@pytest.fixture(scope="module")
def whole(loaded: LoadedModel) -> torch.Tensor:
    """Logits of each request's prompt, computed alone and in one go."""
    return torch.stack(
        [PagedModel(loaded, 1, MOST_TOKENS).prefill(0, prompt(MOST_TOKENS, seed)) for seed in range(MOST_REQUESTS)]
    )


@st.composite
def steps(draw: st.DrawFn) -> list[list[tuple[int, int]]]:
    """Steps of some requests: (request, tokens it advances by), a request once per step."""
    request = st.integers(0, MOST_REQUESTS - 1)
    size = st.one_of(st.just(1), st.integers(2, 40), st.sampled_from((97, 127, 128, 129, 255, 257, 511, 512, 600)))
    step = st.lists(st.tuples(request, size), min_size=1, max_size=MOST_REQUESTS, unique_by=lambda part: part[0])
    return draw(st.lists(step, min_size=1, max_size=8))


@settings(max_examples=4, deadline=None, suppress_health_check=list(HealthCheck))
@example([[(0, 600)], [(0, 97)], [(0, 1), (1, 33)]])
@example([[(0, 512), (1, 11)], [(1, 1), (0, 1), (2, 40)], [(0, 33), (1, 1), (2, 1)]])
@given(plan=steps())
def test_any_way_to_compute_the_same_prompts_gives_the_same_bits(
    loaded: LoadedModel, whole: torch.Tensor, plan: list[list[tuple[int, int]]]
) -> None:
    texts = [prompt(MOST_TOKENS, seed) for seed in range(MOST_REQUESTS)]
    paged = PagedModel(loaded, MOST_REQUESTS, MOST_TOKENS, seed=len(plan))
    for step in plan:
        parts = [(r, min(size, MOST_TOKENS - paged.lengths[r])) for r, size in step if paged.lengths[r] < MOST_TOKENS]
        starts = dict(enumerate(paged.lengths))
        decodes = [(r, texts[r][starts[r]]) for r, size in parts if size == 1]
        prefills = [(r, texts[r][starts[r] : starts[r] + size]) for r, size in parts if size > 1]
        if not parts:
            continue
        rows, chunks = paged.step(decodes, prefills)
        for (request, _), row in zip(decodes, rows, strict=True):
            assert torch.equal(row, whole[request, starts[request]]), (request, starts[request])
        for (request, new), chunk in zip(prefills, chunks, strict=True):
            assert torch.equal(chunk, whole[request, starts[request] : starts[request] + len(new)]), (request, starts)
