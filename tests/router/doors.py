"""What a call needs around it where a test has no router."""

from __future__ import annotations

from tandem.common.fair_work import FairWork
from tandem.common.fairness import ServiceCounters
from tandem.router.calls.explain import Record
from tandem.router.turns.admission import Admission


def open_door() -> Admission:
    """Nobody ever waits."""
    return Admission(ServiceCounters(), max_requests=10, max_tokens=10**6, room=lambda *_: True, wait_s=lambda _: 0.0)


def a_thread() -> FairWork:
    return FairWork("test", 1, max_waiting=1)


def a_record() -> Record:
    return Record("r", "default", 0.0, 0.0, 1, 1)
