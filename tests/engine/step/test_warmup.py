"""Warm-up runs every row count once and leaves nothing behind that a request could see."""

from pathlib import Path

import pytest
import torch

from tandem.engine.model.batch import ForwardBatch, KvPool
from tandem.engine.model.linear import padded_rows
from tandem.engine.model.loader import LoadedModel, load_model
from tandem.engine.step import drawing, warmup
from tandem.engine.step.warmup import LONG_CONTEXT, row_counts, warm_up
from tests.models import tiny_model


@pytest.fixture
def loaded(tmp_path: Path) -> LoadedModel:
    return load_model(tiny_model("llama", tmp_path), dtype="float32", device="cpu", quantization=None)


def make_pool(loaded: LoadedModel) -> KvPool:
    config = loaded.config
    return KvPool(config.num_layers, 8, 16, config.num_kv_heads, config.head_dim, torch.float32, loaded.device)


def test_row_counts_cover_whatever_a_step_is_padded_to() -> None:
    assert {padded_rows(rows) for rows in range(1, 201)} == set(row_counts(200))


def test_every_row_count_is_run_and_only_block_zero_written(
    loaded: LoadedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    pool, seen = make_pool(loaded), []
    forward = loaded.decoder.forward

    def spy(batch: ForwardBatch, pool: KvPool) -> torch.Tensor:
        seen.append((batch.num_decode, len(batch.token_ids)))
        return forward(batch, pool)

    monkeypatch.setattr(loaded.decoder, "forward", spy)
    assert warm_up(loaded, pool, max_num_seqs=16, max_num_batched_tokens=100) > 0
    assert [rows for decodes, rows in seen if decodes] == row_counts(16)
    assert [rows for decodes, rows in seen if not decodes] == row_counts(100)
    assert not pool.storage[:, :, 1:].any()
    assert pool.storage.isfinite().all()


def test_prompts_stay_within_the_models_positions(loaded: LoadedModel) -> None:
    warm_up(loaded, make_pool(loaded), max_num_seqs=1, max_num_batched_tokens=1 << 20)


def test_a_long_context_writes_to_block_zero_alone(loaded: LoadedModel) -> None:
    pool = make_pool(loaded)
    loaded.decoder.reach(LONG_CONTEXT + 1)
    batch = warmup._decodes(2, pool.block_size, loaded.device, LONG_CONTEXT)
    assert batch.max_context_len == LONG_CONTEXT + 1
    with torch.inference_mode():
        assert loaded.decoder.forward(batch, pool).isfinite().all()
    assert not pool.storage[:, :, 1:].any()


def test_a_long_context_is_one_that_is_merged_from_splits() -> None:
    pytest.importorskip("triton", reason="triton is not installed: install the extra `gpu` or `dev`")
    from tandem.engine.model.kernels.paged_decode import MIN_SPLIT_KEYS

    assert LONG_CONTEXT > MIN_SPLIT_KEYS


def test_drawing_is_warmed_up_in_both_ways_to_filter(monkeypatch: pytest.MonkeyPatch) -> None:
    """The largest are enough for one request, and not for another."""
    selected: list[int] = []
    ascending = drawing._ascending

    def spy(probs: torch.Tensor, count: int) -> torch.Tensor:
        selected.append(count)
        return ascending(probs, count)

    monkeypatch.setattr(drawing, "_ascending", spy)
    warmup._draw(3, 5000, torch.device("cpu"))
    assert {drawing.LARGEST, 2 * drawing.LARGEST, 5000} <= set(selected)
