"""The way by which KV came, from what a worker reports."""

from __future__ import annotations

import pytest

from tandem.proto import worker_pb2
from tandem.router.calls.journeys import AS_STORED, Journey, journeys


def report(**fields: object) -> worker_pb2.PromptReport:
    handed_over = {"handover_transport": "tcp", "handover_codec": "raw", "handover_bytes": 5000, "handover_s": 0.5}
    return worker_pb2.PromptReport(**(handed_over | fields))  # type: ignore[arg-type]


def test_a_hand_over_and_tiers_of_the_store_are_told_apart() -> None:
    ways = journeys(report(cached_by_tier={"device": 7, "disk": 30, "peer": 10}, load_s=0.2), 100)
    assert sorted(ways, key=lambda way: way.transport) == [
        Journey("store_disk", AS_STORED, 3000, pytest.approx(0.15)),
        Journey("store_peer", AS_STORED, 1000, pytest.approx(0.05)),
        Journey("tcp", "raw", 5000, 0.5),
    ]


def test_what_is_computed_or_lies_on_the_device_took_no_way() -> None:
    assert journeys(report(recompute_reason="slow: not there"), 100) == []
    assert journeys(worker_pb2.PromptReport(cached_by_tier={"device": 9, "disk": 0}, load_s=0.1), 100) == []
