"""What holds for all tests: numbers and examples repeat; only tests that drive real processes may run twice.

`make test-random` runs the property tests with examples that nobody has seen.
"""

from __future__ import annotations

import random
import sys
from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings

# A busy machine makes examples slow: that says nothing about the code.
UNHURRIED = {"deadline": None, "suppress_health_check": [HealthCheck.too_slow], "print_blob": True}
settings.register_profile("repeatable", derandomize=True, **UNHURRIED)
settings.register_profile("random", **UNHURRIED)
settings.load_profile("repeatable")

HERE = Path(__file__).parent
END_TO_END = HERE / "e2e"
LONGEST_FIRST = ("e2e", "house", "clients")
"""Folders whose files take minutes: several processes run the files, and none of these must begin last."""


@pytest.fixture(autouse=True)
def _repeatable_numbers() -> None:
    random.seed(0)
    if torch := sys.modules.get("torch"):  # tests without tensors need not wait for its import
        torch.manual_seed(0)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if item.path.is_relative_to(END_TO_END):
            item.add_marker(pytest.mark.processes)
        if item.get_closest_marker("processes") is not None:
            item.add_marker(pytest.mark.flaky(reruns=1))
    items.sort(key=_turn)


def _turn(item: pytest.Item) -> int:
    room = item.path.relative_to(HERE).parts[0]
    return LONGEST_FIRST.index(room) if room in LONGEST_FIRST else len(LONGEST_FIRST)
