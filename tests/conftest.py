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

END_TO_END = Path(__file__).parent / "e2e"


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
