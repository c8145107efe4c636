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
        ({"max_num_seqs": 0}, "max_num_seqs"),
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
