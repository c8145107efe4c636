"""Logs, traces and metrics of a process: set up once in `main`, used everywhere.

Traces follow OpenTelemetry and W3C `traceparent`; nothing is exported, and the SDK is not even imported, unless
OTEL_EXPORTER_OTLP_ENDPOINT is set.
"""

from __future__ import annotations

import logging
import os
import sys
import time

from opentelemetry import trace
from opentelemetry.context import Context
from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator
from prometheus_client import (
    CollectorRegistry,
    GCCollector,
    ProcessCollector,
    disable_created_metrics,
    start_http_server,
)

from tandem.common.addresses import in_url
from tandem.common.errors import ConfigError

_PROPAGATOR = TraceContextTextMapPropagator()
_TALKATIVE = ("httpx", "httpx2")
"""They log a line per request to the hub."""


class _LineFormatter(logging.Formatter):
    """`2026-01-31T12:00:00.123Z INFO prefill-0 tandem.prefill.worker: message`; further lines are indented."""

    def __init__(self, worker: str) -> None:
        super().__init__(
            f"%(asctime)s.%(msecs)03dZ %(levelname)s {worker} %(name)s: %(message)s", datefmt="%Y-%m-%dT%H:%M:%S"
        )
        self.converter = time.gmtime

    def format(self, record: logging.LogRecord) -> str:
        return super().format(record).replace("\n", "\n    ")


def set_up_logging(worker: str, level: str = "info") -> None:
    """Logs of this process go to stderr, one event per line, marked with the worker's name."""
    numeric = logging.getLevelNamesMapping().get(level.upper())
    if numeric is None:
        raise ConfigError(f"--log-level {level}: use one of debug, info, warning, error")
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(_LineFormatter(worker))
    logging.basicConfig(level=max(numeric, logging.INFO), handlers=[handler], force=True)
    logging.getLogger("tandem").setLevel(numeric)
    for name in _TALKATIVE:
        logging.getLogger(name).setLevel(logging.WARNING)


def tracing_enabled() -> bool:
    return bool(os.environ.get("OTEL_EXPORTER_OTLP_ENDPOINT") or os.environ.get("OTEL_EXPORTER_OTLP_TRACES_ENDPOINT"))


def set_up_tracing(role: str, instance: str) -> None:
    """Exports spans of service `tandem-<role>` over OTLP/gRPC if an endpoint is configured; else a no-op."""
    if not tracing_enabled():
        return
    from opentelemetry.exporter.otlp.proto.grpc.trace_exporter import OTLPSpanExporter
    from opentelemetry.sdk.resources import Resource
    from opentelemetry.sdk.trace import TracerProvider
    from opentelemetry.sdk.trace.export import BatchSpanProcessor

    resource = Resource.create({"service.name": f"tandem-{role}", "service.instance.id": instance})
    provider = TracerProvider(resource=resource)
    provider.add_span_processor(BatchSpanProcessor(OTLPSpanExporter()))
    trace.set_tracer_provider(provider)


def tracer() -> trace.Tracer:
    """A no-op until `set_up_tracing` has found an endpoint."""
    return trace.get_tracer("tandem")


def context_from_traceparent(traceparent: str | None) -> Context | None:
    """The parent of a span, from a W3C header. None where it is absent; a malformed one is ignored, as W3C asks."""
    if not traceparent:
        return None
    return _PROPAGATOR.extract({"traceparent": traceparent})


def traceparent_of(span: trace.Span) -> str:
    """The W3C header that makes `span` a parent elsewhere; empty without a valid span."""
    carrier: dict[str, str] = {}
    _PROPAGATOR.inject(carrier, trace.set_span_in_context(span))
    return carrier.get("traceparent", "")


def process_registry() -> CollectorRegistry:
    """A registry for a process's metrics, with what every process has: memory, processor time, descriptors,
    collections."""
    disable_created_metrics()  # type: ignore[no-untyped-call]  # a second series for each one, which nobody reads
    registry = CollectorRegistry()
    ProcessCollector(registry=registry)
    GCCollector(registry=registry)
    return registry


def serve_metrics(host: str, port: int, registry: CollectorRegistry) -> None:
    """Prometheus text at http://host:port/metrics, from a daemon thread. Raises ConfigError."""
    try:
        start_http_server(port, addr=host, registry=registry)
    except OSError as error:
        raise ConfigError(
            f"--metrics-port {port}: cannot listen on {in_url(host)}:{port} ({error.strerror})"
        ) from error
