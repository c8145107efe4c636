"""What a node counts, in Prometheus terms, read from its books when somebody scrapes."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import fields

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily
from prometheus_client.metrics_core import Metric
from prometheus_client.registry import Collector, CollectorRegistry

from tandem.kvstore.dataplane.stats import DataPlaneStats
from tandem.kvstore.interfaces import TierName
from tandem.kvstore.node.stats import NodeStats, TierStats

_PREFIX = "tandem_kvstore_"
_TIER_GAUGES = {
    "objects": "Objects",
    "bytes": "Bytes of objects",
    "used_bytes": "Bytes taken, overhead included",
    "capacity_bytes": "Bytes that may be taken",
    "soft_pins": "Objects that leave last",
    "hard_pins": "Objects that do not leave",
    "hard_pinned_bytes": "Bytes of objects that do not leave",
}
_TIER_COUNTERS = {
    "hits": "Objects that fetches found, by the tier they came from",
    "hit_bytes": "Bytes that fetches found, by the tier they came from",
    "evictions": "Objects that left for others",
    "evicted_bytes": "Bytes that left for others",
    "writes": "Objects written",
    "written_bytes": "Bytes written",
    "writes_dropped": "Write-backs not done: queue full, no room, or a fault",
    "faults": "Reads and writes that failed",
}
_PEER_COUNTERS = {"hits": "peer_hits", "hit_bytes": "peer_hit_bytes"}
"""Other nodes are a source, not a tier of this one."""
_NODE_COUNTERS = {
    "misses": "Keys that could not be located",
    "lost": "Objects that left host memory before they were on a lower tier",
    "quarantined": "Objects dropped because their content was wrong",
    "reaped": "Puts and fetches whose lease lapsed",
    "failed_loads": "Objects that could not be brought into host memory",
}
_NODE_GAUGES = {
    "leases": "Holds on host memory",
    "puts_in_flight": "Puts that are being written",
    "loads_in_flight": "Objects on their way into host memory",
    "fetches_open": "Fetches that hold objects",
    "zombies": "Lapsed puts whose memory waits for the writer",
    "detached": "Objects that nobody can find any more, held by readers",
    "write_back_queued": "Objects that wait to be written to a lower tier",
    "write_back_queued_bytes": "Bytes that wait to be written to a lower tier",
    "fragmentation": "Share of the free host memory outside of its largest run",
}


def node_values(stats: NodeStats) -> dict[str, float]:
    """The numbers of a node that belong to no tier, by name."""
    return {name: float(getattr(stats, name)) for name in (*_NODE_COUNTERS, *_NODE_GAUGES)}


class StoreMetrics(Collector):
    """Registers itself. `source` gives the state of the moment; without a data plane its second part is None."""

    def __init__(
        self,
        source: Callable[[], tuple[NodeStats, DataPlaneStats | None]],
        registry: CollectorRegistry | None = None,
    ) -> None:
        self._source = source
        if registry is not None:
            registry.register(self)

    def collect(self) -> Iterator[Metric]:
        """Metrics of the moment, in the order of the tables above."""
        node, data_plane = self._source()
        for name, text in _TIER_GAUGES.items():
            yield _by_tier(GaugeMetricFamily(_PREFIX + "tier_" + name, text, labels=["tier"]), node.tiers, name)
        for name, text in _TIER_COUNTERS.items():
            family = _by_tier(CounterMetricFamily(_PREFIX + name, text, labels=["tier"]), node.tiers, name)
            if name in _PEER_COUNTERS:
                family.add_metric([TierName.PEER.value], getattr(node, _PEER_COUNTERS[name]))
            yield family
        for name, text in _NODE_COUNTERS.items():
            yield CounterMetricFamily(_PREFIX + name, text, value=getattr(node, name))
        for name, text in _NODE_GAUGES.items():
            yield GaugeMetricFamily(_PREFIX + name, text, value=getattr(node, name))
        refused = CounterMetricFamily(_PREFIX + "refused_puts", "Puts that did not begin", labels=["reason"])
        for reason, count in node.refused.items():
            refused.add_metric([str(reason)], count)
        yield refused
        if data_plane is not None:
            yield from _data_plane(data_plane)


def _by_tier(
    family: GaugeMetricFamily | CounterMetricFamily, tiers: tuple[TierStats, ...], name: str
) -> GaugeMetricFamily | CounterMetricFamily:
    for tier in tiers:
        family.add_metric([tier.tier.value], getattr(tier, name))
    return family


def _data_plane(stats: DataPlaneStats) -> Iterator[Metric]:
    for field in fields(stats):
        kind = GaugeMetricFamily if field.name == "connections" else CounterMetricFamily
        name = _PREFIX + "data_plane_" + field.name
        yield kind(name, f"DataPlaneStats.{field.name}", value=getattr(stats, field.name))
