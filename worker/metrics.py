"""What a worker counts, in Prometheus terms. Gauges are read from the engine when somebody scrapes."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator

from prometheus_client import Counter, Gauge, Histogram
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily
from prometheus_client.registry import Collector, CollectorRegistry

from tandem.engine.engine import Engine
from tandem.engine.request import Preemption, RequestOutput
from tandem.engine.store.stats import StoreStats
from tandem.proto import worker_pb2

_SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0)


class WorkerMetrics:
    """Counters of the requests that pass; one per `registry`."""

    def __init__(
        self,
        status: Callable[[], worker_pb2.WorkerStatus],
        registry: CollectorRegistry,
        store: Callable[[], StoreStats] | None = None,
        row_invariant: bool = False,
    ) -> None:
        """`row_invariant`: see `LoadedModel`. `store` is `EngineStore.stats` of a worker with a KV store."""
        self._requests = Counter(
            "tandem_worker_requests", "Ended requests", ["finish_reason", "error"], registry=registry
        )
        self._tokens = Counter("tandem_worker_generated_tokens", "Tokens sent to routers", registry=registry)
        self._cached = Counter("tandem_worker_cached_prompt_tokens", "Prompt tokens not computed", registry=registry)
        self._cached_by_tier = Counter(
            "tandem_worker_cached_prompt_tokens_by_tier",
            "Prompt tokens not computed, by where their KV came from",
            ["tier"],
            registry=registry,
        )
        self._near = Counter(
            "tandem_worker_near_prompt_tokens", "Prompt tokens not computed whose KV is not exact", registry=registry
        )
        self._recomputes = Counter(
            "tandem_worker_handover_recomputes", "Hand-overs that became a recompute", registry=registry
        )
        self._refused = Counter("tandem_worker_refused_requests", "Requests refused", ["error"], registry=registry)
        self._preemptions = Counter(
            "tandem_worker_preemptions",
            "Running requests that lost their blocks for a while: for want of memory, or for an earlier priority",
            ["reason"],
            registry=registry,
        )
        for reason in Preemption:
            self._preemptions.labels(reason.value)
        self._slow_readers = Counter(
            "tandem_worker_slow_sessions", "Sessions ended because the router did not read", registry=registry
        )
        self._prefill = Histogram(
            "tandem_worker_prefill_seconds", "Scheduled until first token", registry=registry, buckets=_SECONDS
        )
        self._handover = Histogram(
            "tandem_worker_handover_seconds", "First token until KV complete", registry=registry, buckets=_SECONDS
        )
        Gauge(
            "tandem_worker_row_invariant",
            "1 where a request's output does not depend on other requests, to the bit",
            registry=registry,
        ).set(row_invariant)
        registry.register(_EngineGauges(status))
        if store is not None:
            registry.register(_StoreCounters(store))

    def output(self, output: RequestOutput) -> None:
        """Counts what the engine gave for a request in one step."""
        if output.token_ids:
            self._tokens.inc(len(output.token_ids))
        if output.preempted is not None:
            self._preemptions.labels(output.preempted.value).inc()
        if output.finish_reason is not None:
            self._requests.labels(output.finish_reason.name.lower(), output.error_code).inc()
        report = output.prompt
        if report is not None:
            self._cached.inc(report.cached_tokens)
            for tier, tokens in report.cached_by_tier.items():
                self._cached_by_tier.labels(tier).inc(tokens)
            self._near.inc(report.near_tokens)
            self._prefill.observe(report.prefill_s)
            if report.recompute_reason:
                self._recomputes.inc()
            elif report.handover_s > 0:
                self._handover.observe(report.handover_s)

    def refused(self, code: str) -> None:
        self._refused.labels(code).inc()

    def slow_session(self) -> None:
        self._slow_readers.inc()


class _EngineGauges(Collector):
    def __init__(self, status: Callable[[], worker_pb2.WorkerStatus]) -> None:
        self._status = status

    def collect(self) -> Iterator[GaugeMetricFamily]:
        """One gauge for each number in the worker's status. Called with each scrape, off the event loop."""
        status = self._status()
        for field in status.DESCRIPTOR.fields:
            if field.message_type is not None:  # numbers by priority: of any cardinality
                continue
            name = re.sub(r"_s$", "_seconds", field.name.replace("_per_s", "_per_second"))
            value = float(getattr(status, field.name))
            yield GaugeMetricFamily(f"tandem_engine_{name}", f"WorkerStatus.{field.name}", value=value)


class ShortageCounter(Collector):
    """Steps of an engine that found too little memory."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine

    def collect(self) -> Iterator[CounterMetricFamily]:
        """The count so far. Called with each scrape, off the event loop."""
        yield CounterMetricFamily(
            "tandem_worker_memory_shortages",
            "Steps, or parts of them, that found too little memory on the device and were computed again",
            value=self._engine.shortages,
        )


class _StoreCounters(Collector):
    def __init__(self, stats: Callable[[], StoreStats]) -> None:
        self._stats = stats

    def collect(self) -> Iterator[CounterMetricFamily]:
        """Counters of look-ups, loads and saves of the KV store. Called with each scrape, off the event loop."""
        stats = self._stats()
        labelled = (
            ("lookups", "Prompts looked up in the KV store", "outcome", stats.lookups),
            ("loads", "Loads from the KV store; all but ok brought less than was there", "outcome", stats.loads),
            ("saves", "Chunks offered to the KV store", "outcome", stats.saves),
            ("loaded_tokens", "Prompt tokens loaded from the KV store", "tier", stats.loaded_tokens),
        )
        for name, text, label, values in labelled:
            family = CounterMetricFamily(f"tandem_worker_store_{name}", text, labels=[label])
            for value, count in values.items():
                family.add_metric([value], count)
            yield family
        for name, text, total in (
            ("load_seconds", "Time that loads took, one after the other", stats.load_s),
            ("save_seconds", "Time that saves took", stats.save_s),
            ("gates_missed", "Steps that went on without a request whose KV came too late", stats.gates_missed),
        ):
            yield CounterMetricFamily(f"tandem_worker_store_{name}", text, value=total)
