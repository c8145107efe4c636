"""Frequencies at the sizes of real models, against `transformers`."""

from __future__ import annotations

from contextlib import suppress
from typing import Any

import pytest
import torch
from transformers import LlamaConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from tandem.common.errors import ConfigError
from tandem.engine.model.config import RopeConfig
from tandem.engine.model.rope import RotaryTable, inverse_frequencies, rotate

CASES: list[tuple[RopeConfig, dict[str, Any]]] = [
    (RopeConfig("linear", 1e4, 4.0), {"factor": 4.0}),
    (RopeConfig("llama3", 5e5, 8.0, 8192), {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}),
    (RopeConfig("llama3", 5e5, 32.0, 8192, low_freq_factor=2.0, high_freq_factor=9.0),
     {"factor": 32.0, "low_freq_factor": 2.0, "high_freq_factor": 9.0}),
    (RopeConfig("yarn", 1e6, 4.0, 8192), {"factor": 4.0}),
    (RopeConfig("yarn", 1e4, 16.0, 8192, beta_fast=20.0, beta_slow=2.0, truncate=False),
     {"factor": 16.0, "beta_fast": 20.0, "beta_slow": 2.0, "truncate": False}),
]  # fmt: skip


@pytest.mark.parametrize(("rope", "parameters"), CASES)
@pytest.mark.parametrize("head_dim", [64, 80, 128])
def test_scaled_frequencies_agree(rope: RopeConfig, parameters: dict[str, Any], head_dim: int) -> None:
    config = LlamaConfig(
        head_dim=head_dim,
        max_position_embeddings=131_072,
        rope_parameters={
            "rope_type": rope.kind, "rope_theta": rope.theta, "original_max_position_embeddings": 8192, **parameters
        },
    )  # fmt: skip
    expected, _ = ROPE_INIT_FUNCTIONS[rope.kind](config, torch.device("cpu"))
    torch.testing.assert_close(inverse_frequencies(rope, head_dim), expected, rtol=1e-6, atol=0)


def test_a_rotation_keeps_lengths_and_depends_on_distance_only() -> None:
    table = RotaryTable(RopeConfig(), 32, torch.device("cpu"))
    table.reach(512)
    q, k = torch.randn(2, 1, 1, 32).double().unbind(0)

    def rotated(x: torch.Tensor, position: int) -> torch.Tensor:
        return rotate(x, *table.at(torch.tensor([position]), torch.float64))

    torch.testing.assert_close(rotated(q, 400).norm(), q.norm(), rtol=1e-6, atol=0)
    products = [(rotated(q, shift + 9) * rotated(k, shift)).sum().item() for shift in (0, 1, 250, 500)]
    assert max(products) - min(products) < 1e-4


def test_rows_have_the_same_bits_however_many_there_are() -> None:
    short, long = (RotaryTable(RopeConfig(), 64, torch.device("cpu")) for _ in range(2))
    short.reach(300)
    long.reach(300)
    long.reach(5000)
    positions = torch.arange(300)
    for some, more in zip(short.angles(positions), long.angles(positions), strict=True):
        assert torch.equal(some, more)


@pytest.mark.parametrize(
    "rope",
    [
        RopeConfig(theta=1e-30),
        RopeConfig("linear", 1e30, 1e-30),
        RopeConfig("yarn", 1.0, 4.0, 8192),
        RopeConfig("yarn", 1e4, 1e-30, 1, beta_fast=1e30, beta_slow=1e-30),
        RopeConfig("llama3", 1e30, 1e-30, 2**31, low_freq_factor=1e-30, high_freq_factor=1e30),
    ],
)
def test_settings_that_cannot_be_computed_are_refused_or_finite(rope: RopeConfig) -> None:
    with suppress(ConfigError):
        assert torch.isfinite(inverse_frequencies(rope, 512)).all()
