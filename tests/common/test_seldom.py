from __future__ import annotations

import logging

import pytest

from tandem.common.seldom import INTERVAL_S, Seldom


def test_a_flood_leaves_one_line_per_interval_and_a_count(caplog: pytest.LogCaptureFixture) -> None:
    now = 100.0
    complaints = Seldom(logging.getLogger("tandem.test"), logging.WARNING, clock=lambda: now)
    with caplog.at_level(logging.WARNING, "tandem.test"):
        for number in range(22_000):
            complaints.log("stranger %d", number)
        now += INTERVAL_S
        complaints.log("stranger %d", 22_000)
        now += INTERVAL_S
        complaints.log("stranger %d", 22_001)
    assert [record.getMessage() for record in caplog.records] == [
        "stranger 0",
        "stranger 22000 (and 21999 more since the last such line)",
        "stranger 22001",
    ]
