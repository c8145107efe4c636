"""What one client or server counts, and the metrics made of it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily
from prometheus_client.metrics_core import Metric
from prometheus_client.registry import Collector

_PREFIX = "tandem_handover_"


@dataclass(frozen=True, slots=True)
class HandoverStats:
    """A snapshot. bytes / transfer_s is the rate while moving; counters only grow, open_* are gauges."""

    bytes: int = 0
    """Payload of Rows frames sent, or received and checked."""
    rows: int = 0
    """Token rows, counted once per layer."""
    frames: int = 0
    """Rows frames."""
    transfer_s: float = 0.0
    """Sender: fill, checksum and send. Receiver: read, checksum and sink."""
    bytes_by_way: Mapping[str, float] = field(default_factory=dict)
    """`bytes` by transport and codec, as `tcp/raw`."""
    seconds_by_way: Mapping[str, float] = field(default_factory=dict)
    """`transfer_s` in the same way."""
    outcomes: Mapping[str, int] = field(default_factory=dict)
    """Ended streams: "done" or a Reason code."""
    late_frames: int = 0
    """Rows for a stream that had ended; dropped."""
    callback_errors: int = 0
    """Exceptions raised by a sink or a listener; logged."""
    open_streams: int = 0
    open_connections: int = 0


class HandoverMetrics(Collector):
    """The figures of a prefill worker's client (what it sent), or of a decode worker's server (what it received)."""

    def __init__(self, stats: Callable[[], HandoverStats]) -> None:
        self._stats = stats

    def collect(self) -> Iterator[Metric]:
        """One family for each field; `streams` is by outcome."""
        stats = self._stats()
        for name, text, total in (
            ("bytes", "Bytes of KV handed over", stats.bytes),
            ("rows", "Rows of KV handed over: one for each token and layer", stats.rows),
            ("frames", "Pieces in which they came", stats.frames),
            ("transfer_seconds", "Time in which they were copied, checked and sent or received", stats.transfer_s),
            ("late_frames", "Pieces that came after their stream had ended", stats.late_frames),
            ("callback_errors", "Faults of the worker in the middle of a hand-over", stats.callback_errors),
        ):
            yield CounterMetricFamily(_PREFIX + name, text, value=total)
        for name, text, values in (
            (
                "transport_bytes",
                "Bytes of KV handed over, before any codec, by the way that they took",
                stats.bytes_by_way,
            ),
            ("transport_seconds", "Time in which they were copied, checked and sent or received", stats.seconds_by_way),
        ):
            ways = CounterMetricFamily(_PREFIX + name, text, labels=["transport", "codec"])
            for way, value in values.items():
                ways.add_metric(way.split("/"), value)
            yield ways
        streams = CounterMetricFamily(_PREFIX + "streams", "Hand-overs by how they ended", labels=["outcome"])
        for outcome, count in stats.outcomes.items():
            streams.add_metric([outcome], count)
        yield streams
        for name, text, value in (
            ("open_streams", "Hand-overs under way", stats.open_streams),
            ("open_connections", "Connections to other workers", stats.open_connections),
        ):
            yield GaugeMetricFamily(_PREFIX + name, text, value=value)
