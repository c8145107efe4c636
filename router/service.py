"""What HTTP and gRPC share: the served model, the fleet, admission, and calls that are opened and always closed."""

from __future__ import annotations

import itertools
import secrets
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from opentelemetry.trace import SpanKind, Status, StatusCode

from tandem.common import telemetry
from tandem.common.errors import TandemError
from tandem.kvstore.dataplane.auth import read_secret
from tandem.router.choice import CallContext, CallSpec, ChoiceSpec
from tandem.router.contexts import ContextClient
from tandem.router.dispatch import Dispatcher
from tandem.router.explain import Explain
from tandem.router.generate import Call
from tandem.router.metrics import RouterMetrics
from tandem.router.served_model import ServedModel
from tandem.router.settings import RouterConfig
from tandem.router.siblings import Siblings
from tandem.router.workers import Fleet


class Service:
    def __init__(
        self, config: RouterConfig, model: ServedModel, fleet: Fleet, metrics: RouterMetrics, siblings: Siblings
    ) -> None:
        self.config = config
        self.model = model
        self.fleet = fleet
        self.metrics = metrics
        self.contexts = ContextClient(config.kv_store, read_secret(config.kv_secret_file)) if config.kv_store else None
        """None: this router keeps no named contexts."""
        self.siblings = siblings
        self.explain = Explain()
        self.draining = False
        self._router_id = secrets.token_hex(4)
        self._numbers = itertools.count(1)
        self._in_flight = 0
        siblings.on("metrics", lambda _: metrics.text().decode())
        siblings.on("request", lambda question: _account(self.explain, question))
        self._tracing = telemetry.tracing_enabled()
        self._context = CallContext(
            dispatcher=Dispatcher(fleet, metrics, config.disaggregate),
            metrics=metrics,
            text=model.text,
            timeout_s=config.request_timeout_s,
            worker_wait_s=config.worker_wait_s,
            keepalive_s=config.keepalive_s,
        )

    @property
    def ready(self) -> bool:
        return bool(self.fleet.decode) and not self.draining

    @property
    def max_model_len(self) -> int:
        """Tokens of prompt and output together: what every connected decode worker can hold."""
        limits = [session.info.max_model_len for session in self.fleet.decode if session.info.max_model_len]
        return min([self.model.max_position_embeddings, *limits])

    def check_load(self, sequences: int = 1) -> None:
        """Raises TandemError `overloaded` where `sequences` more would be too many."""
        if self._in_flight + sequences > self.config.max_requests:
            raise TandemError(
                "overloaded",
                f"{self._in_flight} of {self.config.max_requests} sequences are in flight; try again shortly",
                retry_after_s=1.0,
            )

    @contextmanager
    def call(
        self,
        request_id: str,
        choices: Sequence[ChoiceSpec],
        *,
        arrived: float,
        traceparent: str = "",
        streaming: bool = False,
    ) -> Iterator[Call]:
        """A started call, which is closed on the way out. Raises TandemError `overloaded` or `unavailable`."""
        self.check_load(len(choices))
        span = telemetry.tracer().start_span(
            "router.generate",
            context=telemetry.context_from_traceparent(traceparent) if self._tracing else None,
            kind=SpanKind.SERVER,
            attributes={"tandem.request_id": request_id, "tandem.choices": len(choices)} if self._tracing else None,
        )
        spec = CallSpec(
            request_id=f"{request_id}.{self._router_id}{next(self._numbers):x}",
            choices=choices,
            arrived=arrived,
            traceparent=telemetry.traceparent_of(span) if self._tracing else traceparent,
            streaming=streaming,
        )
        call = Call(spec, self._context)
        self._in_flight += len(choices)
        self.metrics.in_flight.set(self._in_flight)
        try:
            call.start()
            yield call
        except TandemError as error:
            span.set_status(Status(StatusCode.ERROR, error.code))
            raise
        finally:
            call.close()
            span.end()
            self._in_flight -= len(choices)
            self.metrics.in_flight.set(self._in_flight)
            self.metrics.prompt_tokens.inc(call.usage().prompt_tokens)
            self.metrics.request_seconds.observe(time.monotonic() - arrived)


def _account(explain: Explain, question: dict[str, Any]) -> dict[str, Any] | None:
    record = explain.find(question["id"], question["tenant"])
    return record.describe() if record is not None else None
