"""Nothing that is counted on many threads gets lost, and a snapshot does not change any more."""

from __future__ import annotations

import sys
import threading
from collections.abc import Mapping
from dataclasses import dataclass, field

import pytest

from tandem.common.counters import Counters


@dataclass(frozen=True, slots=True)
class Figures:
    frames: int = 0
    seconds: float = 0.5
    by_end: Mapping[str, int] = field(default_factory=dict)


def test_numbers_and_labels_are_counted_from_where_they_begin() -> None:
    counters = Counters(Figures())
    first = counters.snapshot()
    counters.add(frames=2, seconds=0.25)
    counters.add(frames=True)
    counters.count("by_end", "done")
    counters.count("by_end", "done")
    counters.count("by_end", "lost")
    assert counters.snapshot() == Figures(3, 0.75, {"done": 2, "lost": 1})
    assert first == Figures()


@pytest.mark.parametrize("name", ["by_end", "frame"])
def test_what_is_not_a_number_of_the_figures_is_not_counted(name: str) -> None:
    with pytest.raises(KeyError):
        Counters(Figures()).add(**{name: 1})
    with pytest.raises(KeyError):
        Counters(Figures()).count("frames", "done")


def test_no_thread_loses_a_count() -> None:
    counters = Counters(Figures())

    def work() -> None:
        for _ in range(2000):
            counters.add(frames=1, seconds=1)
            counters.count("by_end", "done")

    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        threads = [threading.Thread(target=work) for _ in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    finally:
        sys.setswitchinterval(interval)
    assert counters.snapshot() == Figures(8000, 8000.5, {"done": 8000})
