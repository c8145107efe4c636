"""Prometheus metrics of the router."""

from __future__ import annotations

import time
from collections.abc import Iterator
from typing import Protocol

from prometheus_client import Gauge, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from tandem.common.telemetry import process_registry
from tandem.router.fleet.workers import Fleet
from tandem.router.metrics.counting import Counter, Histogram
from tandem.router.turns.admission import Admission

_TTFT_BUCKETS = (0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10, 30, 60)
_ITL_BUCKETS = (0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 5)
_REQUEST_BUCKETS = (0.01, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300, 600)

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"


class RouterMetrics:
    """All metrics of one router, in a registry of their own. Changed on the event loop only."""

    def __init__(self) -> None:
        self.registry = registry = process_registry()
        self.requests = Counter(
            "tandem_router_requests", "Answered requests", ["endpoint", "status"], registry=registry
        )
        self.in_flight = Gauge("tandem_router_sequences_in_flight", "Sequences being generated", registry=registry)
        self.ttft = Histogram("tandem_router_ttft_seconds", "Arrival to first token", _TTFT_BUCKETS, registry=registry)
        self.itl = Histogram(
            "tandem_router_inter_token_seconds",
            "Time between outputs of a sequence, divided by their tokens",
            _ITL_BUCKETS,
            registry=registry,
        )
        self.request_seconds = Histogram(
            "tandem_router_request_seconds", "Arrival to end of answer", _REQUEST_BUCKETS, registry=registry
        )
        self.prompt_tokens = Counter("tandem_router_prompt_tokens", "Prompt tokens", registry=registry)
        self.cached_tokens = Counter(
            "tandem_router_cached_tokens",
            "Prompt tokens that were not computed, by where their KV came from",
            ["tier"],
            registry=registry,
        )
        self.completion_tokens = Counter("tandem_router_completion_tokens", "Generated tokens", registry=registry)
        self.placements = Counter(
            "tandem_router_placements", "Placements: handover, or why there was none", ["reason"], registry=registry
        )
        self.handover_recomputes = Counter(
            "tandem_router_handover_recomputes", "Hand-overs that became a recompute", registry=registry
        )
        self.handover_seconds = Histogram(
            "tandem_router_handover_seconds",
            "First token computed until the KV was complete on the decode worker",
            _ITL_BUCKETS,
            registry=registry,
        )
        self.kv_moved_bytes = Counter(
            "tandem_router_kv_moved_bytes",
            "KV that came from prefill workers or the store, before any codec",
            ["transport", "codec"],
            registry=registry,
        )
        self.kv_moved_seconds = Counter(
            "tandem_router_kv_moved_seconds",
            "Time for which first tokens waited for that KV",
            ["transport", "codec"],
            registry=registry,
        )
        self.preemptions = Counter(
            "tandem_router_preemptions",
            "Running sequences that lost their place for a while: for want of memory, or for an earlier priority",
            ["reason"],
            registry=registry,
        )
        self.retries = Counter("tandem_router_retries", "Sequences started again on another worker", registry=registry)
        self.disconnects = Counter(
            "tandem_router_client_disconnects", "Clients that went away before the end", registry=registry
        )

        self.prompt_tokens_seen = self.cached_tokens_seen = self.output_tokens_seen = 0
        """Totals so far, as tokens come: the counters above move when a request ends."""

    def watch(self, fleet: Fleet) -> None:
        self.registry.register(_FleetCollector(fleet))

    def watch_admission(self, admission: Admission) -> None:
        self.registry.register(_AdmissionCollector(admission))

    def watch_index(self, index: IndexSize) -> None:
        self.registry.register(_IndexCollector(index))

    def text(self) -> bytes:
        return generate_latest(self.registry)


class _AdmissionCollector(Collector):
    """The queue before the workers, read when asked."""

    def __init__(self, admission: Admission) -> None:
        self._admission = admission

    def collect(self) -> Iterator[Metric]:
        """What waits for its turn now, and counters of what was granted, queued and refused."""
        admission = self._admission
        yield GaugeMetricFamily(
            "tandem_router_waiting_requests", "Requests that wait for their turn", admission.waiting_requests
        )
        yield GaugeMetricFamily(
            "tandem_router_waiting_tokens",
            "Prompt tokens of requests that wait for their turn",
            admission.waiting_tokens,
        )
        yield CounterMetricFamily("tandem_router_granted", "Requests that went on to the workers", admission.granted)
        yield CounterMetricFamily("tandem_router_queued", "Of those, requests that had to wait", admission.queued)
        refused = CounterMetricFamily(
            "tandem_router_refused", "Requests that were not let in, by reason", labels=["reason"]
        )
        for reason, count in admission.refused.items():
            refused.add_metric([reason], count)
        yield refused


class IndexSize(Protocol):
    """What is counted of the prefix index."""

    max_blocks: int
    forgotten: int

    def __len__(self) -> int: ...


class _IndexCollector(Collector):
    """The prefix index, read when asked."""

    def __init__(self, index: IndexSize) -> None:
        self._index = index

    def collect(self) -> Iterator[Metric]:
        """Its size, what it may have now, and what did not fit."""
        index = self._index
        yield GaugeMetricFamily("tandem_router_index_blocks", "Blocks of KV that are known to be somewhere", len(index))
        yield GaugeMetricFamily("tandem_router_index_max_blocks", "As many are kept at most", index.max_blocks)
        yield CounterMetricFamily(
            "tandem_router_index_forgotten_blocks", "Blocks that did not fit and count as not cached", index.forgotten
        )


class _FleetCollector(Collector):
    """Gauges of every worker of the fleet, and of where they are listed; read when asked."""

    def __init__(self, fleet: Fleet) -> None:
        self._fleet = fleet

    def collect(self) -> Iterator[Metric]:
        """Gauges of each worker from its last status, and of each source of workers. On the event loop."""

        def gauge(name: str, text: str) -> GaugeMetricFamily:
            return GaugeMetricFamily(f"tandem_worker_{name}", text, labels=["target", "role", "worker"])

        now = time.monotonic()
        up = gauge("up", "1 while connected")
        healthy = gauge("healthy", "0 while it gets no requests because it failed or was far slower than the others")
        others = {
            field: gauge(name, text)
            for field, name, text in (
                ("running", "running", "Requests in the running batch"),
                ("waiting", "waiting", "Requests in the queue"),
                ("free_blocks", "free_blocks", "KV blocks free or evictable"),
                ("total_blocks", "total_blocks", "KV blocks"),
                ("pending_prefill_tokens", "pending_prefill_tokens", "Prompt tokens still to compute"),
                ("prefill_tokens_per_s", "prefill_tokens_per_second", "Measured prefill speed"),
                ("decode_step_s", "decode_step_seconds", "Measured seconds of a decode step"),
                ("draining", "draining", "1 while the worker takes no new requests"),
            )
        }
        for client in self._fleet.clients:
            session = client.session
            labels = [client.target.address, client.role_name, session.name if session else ""]
            up.add_metric(labels, float(session is not None))
            healthy.add_metric(labels, float(client.health.available(now)))
            if session is not None:
                for field, family in others.items():
                    family.add_metric(labels, float(getattr(session.status, field)))
        yield up
        yield healthy
        yield from others.values()
        stale = GaugeMetricFamily(
            "tandem_router_worker_source_stale",
            "1 while a list of workers cannot be read, and what it last said is in force",
            labels=["source"],
        )
        for source in self._fleet.sources:
            stale.add_metric([source.name], float(bool(source.problem)))
        yield stale
