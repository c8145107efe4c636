"""Measured speeds."""

from __future__ import annotations

import pytest

from tandem.engine.status import StepMeter


def test_nothing_is_known_before_the_first_step() -> None:
    meter = StepMeter()
    assert meter.prefill_tokens_per_s == meter.decode_step_s == 0


def test_speeds_follow_recent_steps() -> None:
    meter = StepMeter()
    for seconds in [0.010] * 50 + [0.020] * 50:
        meter.add(4, 0, seconds)
    assert meter.decode_step_s == pytest.approx(0.020, rel=0.02)
    for tokens, seconds in [(100, 0.1)] * 50 + [(100, 0.05)] * 50:
        meter.add(0, tokens, seconds)
    assert meter.prefill_tokens_per_s == pytest.approx(2000, rel=0.02)


def test_a_tiny_prompt_weighs_little() -> None:
    meter = StepMeter()
    meter.add(0, 1000, 0.5)
    meter.add(0, 1, 0.01)
    assert meter.prefill_tokens_per_s == pytest.approx(2000, rel=0.05)


def test_decodes_in_a_mixed_step_are_not_counted_as_prefill() -> None:
    meter = StepMeter()
    meter.add(8, 0, 0.010)
    meter.add(8, 100, 0.060)
    assert meter.prefill_tokens_per_s == pytest.approx(2000)
    assert meter.decode_step_s == 0.010
