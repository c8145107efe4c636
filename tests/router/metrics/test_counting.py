"""Our counters and histograms say to Prometheus what those of prometheus_client would say."""

from __future__ import annotations

import prometheus_client
from hypothesis import given
from hypothesis import strategies as st
from prometheus_client import CollectorRegistry, generate_latest

from tandem.router.metrics.counting import Counter, Histogram

BOUNDS = (0.005, 0.1, 1, 2.5, 60)
seconds = st.floats(0, 100) | st.sampled_from(BOUNDS)


def test_a_counter_without_labels_begins_at_zero() -> None:
    registry = CollectorRegistry()
    Counter("tandem_things", "Things", registry=registry)
    assert b"\ntandem_things_total 0.0\n" in generate_latest(registry)


@given(st.lists(st.tuples(st.sampled_from(["a", 'b"\n', ""]), st.integers(0, 1000))))
def test_labelled_counts(counts: list[tuple[str, int]]) -> None:
    ours, theirs = CollectorRegistry(), CollectorRegistry()
    counter = Counter("tandem_things", "Things", ["kind"], registry=ours)
    reference = prometheus_client.Counter("tandem_things", "Things", ["kind"], registry=theirs)
    for kind, count in counts:
        counter.inc(kind, by=count)
        reference.labels(kind).inc(count)
    assert _samples(ours) == _samples(theirs)


@given(st.lists(seconds))
def test_histograms(values: list[float]) -> None:
    ours, theirs = CollectorRegistry(), CollectorRegistry()
    histogram = Histogram("tandem_seconds", "Seconds", BOUNDS, registry=ours)
    reference = prometheus_client.Histogram("tandem_seconds", "Seconds", buckets=BOUNDS, registry=theirs)
    for value in values:
        histogram.observe(value)
        reference.observe(value)
    assert _samples(ours) == _samples(theirs)


def _samples(registry: CollectorRegistry) -> list[bytes]:
    return [line for line in generate_latest(registry).splitlines() if b"_created" not in line]
