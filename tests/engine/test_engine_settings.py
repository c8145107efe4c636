"""Settings that cannot work are refused with a remedy; memory gives the longest request."""

from __future__ import annotations

from typing import Any

import pytest

from tandem.common.errors import ConfigError
from tandem.engine.model.memory import pool_size
from tandem.engine.settings import EngineConfig


@pytest.mark.parametrize(
    ("settings", "names"),
    [
        ({"block_size": 24}, "block_size"),
        ({"block_size": 0}, "block_size"),
        ({"max_num_seqs": -1}, "max_num_seqs"),
        ({"max_num_batched_tokens": -1}, "max_num_batched_tokens"),
        ({"num_threads": 0}, "num_threads"),
        ({"max_num_seqs": 64, "max_num_batched_tokens": 79}, "max_num_batched_tokens"),
        ({"max_model_len": 1}, "max_model_len"),
    ],
)
def test_a_setting_that_cannot_work_is_refused_by_name(settings: dict[str, Any], names: str) -> None:
    with pytest.raises(ConfigError, match=names):
        EngineConfig(model="m", **settings)


def test_the_smallest_budget_lets_a_prompt_advance_while_all_others_decode() -> None:
    assert EngineConfig(model="m", max_num_seqs=64, max_num_batched_tokens=80)


@pytest.mark.parametrize(
    ("device", "given", "sizes"),
    [
        ("cpu", {}, (64, 512)),
        ("cuda", {}, (256, 8192)),
        ("cpu", {"max_num_seqs": 8}, (8, 512)),
        ("cuda", {"max_num_batched_tokens": 2048}, (256, 2048)),
        ("cuda", {"max_num_seqs": 8, "max_num_batched_tokens": 100}, (8, 100)),
    ],
)
def test_steps_have_the_size_of_their_device_where_settings_do_not_say_it(
    device: str, given: dict[str, int], sizes: tuple[int, int]
) -> None:
    config = EngineConfig(model="m", **given).sized_for(device)  # type: ignore[arg-type]
    assert (config.max_num_seqs, config.max_num_batched_tokens) == sizes


def test_a_size_that_does_not_go_with_the_devices_is_refused() -> None:
    with pytest.raises(ConfigError, match="max_num_batched_tokens 100: must be at least"):
        EngineConfig(model="m", max_num_batched_tokens=100).sized_for("cuda")
    with pytest.raises(ConfigError, match="max_num_batched_tokens 512: must be at least"):
        EngineConfig(model="m", max_num_seqs=500).sized_for("cpu")


@pytest.mark.parametrize(
    ("budget", "asked", "expected"),
    [
        (100_000, None, (100, 1024)),
        (11_000, None, (11, 160)),
        (11_999, 160, (11, 160)),
        (100_000, 500, (100, 500)),
        (2_000, None, (2, 16)),
    ],
)
def test_the_pool_bounds_the_context(budget: int, asked: int | None, expected: tuple[int, int]) -> None:
    assert pool_size(budget, 1_000, 16, asked, 1024) == expected


@pytest.mark.parametrize(("budget", "asked"), [(11_000, 161), (1_000, None), (0, None), (100_000, 1025)])
def test_a_context_that_does_not_fit_is_refused(budget: int, asked: int | None) -> None:
    with pytest.raises(ConfigError, match=r"kv_cache_bytes \d+: holds|made for 1024"):
        pool_size(budget, 1_000, 16, asked, 1024)
