"""Defaults of `generation_config.json`: what counts, and what no request could have."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tandem.router.text.served_model import SamplingDefaults


def load(folder: Path, **fields: Any) -> SamplingDefaults:
    (folder / "generation_config.json").write_text(json.dumps(fields))
    return SamplingDefaults.load(folder)


def test_values_within_their_bounds_count(tmp_path: Path) -> None:
    defaults = load(tmp_path, temperature=0.6, top_p=0.95, top_k=20, min_p=0.05, repetition_penalty=1.05)
    assert defaults == SamplingDefaults(0.6, 0.95, 20, 0.05, 1.05)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("temperature", -1),
        ("temperature", float("nan")),
        ("temperature", "0.5"),
        ("temperature", True),
        ("temperature", 1e300),
        ("top_p", 0),
        ("top_p", 1.5),
        ("top_k", -7),
        ("min_p", 2),
        ("repetition_penalty", 0),
        ("repetition_penalty", float("inf")),
        ("repetition_penalty", [1.1]),
    ],
)
def test_an_impossible_value_is_left_out_with_one_warning(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, name: str, value: Any
) -> None:
    assert load(tmp_path, **{name: value}) == SamplingDefaults()
    (record,) = caplog.records
    assert f"generation_config.json: {name} is" in record.getMessage()


def test_nothing_is_said_of_fields_that_are_not_set(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    assert load(tmp_path, temperature=None, do_sample=True, transformers_version="5") == SamplingDefaults()
    assert not caplog.records
