"""What HTTP and gRPC share: the served model, the fleet, admission, and calls that are opened and always closed."""

from __future__ import annotations

import asyncio
import itertools
import math
import secrets
import time
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, Any

import msgspec
from opentelemetry.trace import INVALID_SPAN, Span, SpanKind, Status, StatusCode

from tandem.common import telemetry
from tandem.common.errors import TandemError
from tandem.common.fair_work import FairWork
from tandem.common.fairness import LAST_BAND, ServiceCounters
from tandem.common.secret import derive
from tandem.kvstore.identity import SALT_PURPOSE
from tandem.router.calls.accounts import Accounts, Charge
from tandem.router.calls.choice import CallContext, CallSpec, ChoiceSpec
from tandem.router.calls.explain import Explain
from tandem.router.calls.generate import Call
from tandem.router.calls.request_log import RequestLog, request_pairs
from tandem.router.fleet.session import WorkerSession
from tandem.router.fleet.workers import Fleet, no_worker
from tandem.router.metrics.router_metrics import RouterMetrics
from tandem.router.placing.contexts import ContextClient
from tandem.router.placing.dispatch import Dispatcher
from tandem.router.placing.store_view import StoreView
from tandem.router.placing.targets import Targets
from tandem.router.settings import RouterConfig
from tandem.router.tenants.caller import Caller
from tandem.router.tenants.usage import TenantUsage, merged
from tandem.router.text.served_model import ServedModel
from tandem.router.turns.admission import Admission
from tandem.router.turns.siblings import Siblings

if TYPE_CHECKING:
    from tandem.router.batch.lane import BatchLane

KEEPALIVE_S = 15.0
"""Silence after which a stream gets a comment, so that proxies do not close it."""
WORK_PLACES = 2
"""They share the interpreter, so more would do no more; one tenant alone takes one, so that another finds one."""
MAX_WAITING_WORK = 256
"""Large bodies and answers of one tenant that wait for a thread."""
PUMP_S = 0.02
"""Pause between two looks at whether those who wait can go on."""


class Service:
    """What every front door uses of a router. On the event loop."""

    def __init__(
        self,
        config: RouterConfig,
        model: ServedModel,
        fleet: Fleet,
        metrics: RouterMetrics,
        accounts: Accounts,
        counters: ServiceCounters,
        siblings: Siblings,
        secret: bytes = b"",
    ) -> None:
        """`secret`: the deployment's; empty: there is none, and whoever knows a tenant's name knows its salt."""
        self.config = config
        self.model = model
        self.fleet = fleet
        self.metrics = metrics
        self.contexts = ContextClient(config.kv_store_address, secret) if config.kv_store_address else None
        """None: this router keeps no named contexts."""
        self.accounts = accounts
        self.work = FairWork("requests", WORK_PLACES, max_waiting=MAX_WAITING_WORK, share=WORK_PLACES - 1)
        """Threads for large bodies."""
        self.answers = FairWork("answers", WORK_PLACES, max_waiting=MAX_WAITING_WORK, share=WORK_PLACES - 1)
        self.siblings = siblings
        self.explain = Explain()
        self.batches: BatchLane | None = None
        """None: this router keeps no files."""
        directory = config.kv_directory or config.kv_store_address
        self.store = StoreView.open(directory, secret) if directory else None
        """None: where the KV store holds what is not known here."""
        self.log: RequestLog | None = None
        """None: requests leave no lines in the log."""
        self.draining = False
        self._router_id = secrets.token_hex(4)
        self._numbers = itertools.count(1)
        self._in_flight = 0
        self._no_decode_since = math.inf
        """Requests wait since then (time.monotonic()), and there is no decode worker."""
        metrics.in_flight.set_function(lambda: self._in_flight)
        siblings.on("metrics", lambda _: metrics.text().decode())
        siblings.on("usage", lambda question: accounts.usage.report(question["tenant"]))
        siblings.on("request", lambda question: _account(self.explain, question))
        self.salt_key = derive(secret, SALT_PURPOSE)
        dispatcher = Dispatcher(
            fleet,
            metrics,
            config.disaggregate,
            self.store,
            self.salt_key,
            config.max_index_blocks,
            targets=Targets.stated(config),
        )
        self.admission = Admission(
            counters,
            max_requests=config.max_queued_requests,
            max_tokens=config.max_queued_tokens,
            room=dispatcher.room,
            wait_s=dispatcher.wait_s,
            claims=dispatcher.claims,
            ttft_slo_s=config.ttft_slo_s,
        )
        metrics.watch_admission(self.admission)
        self._tracing = telemetry.tracing_enabled()
        self._context = CallContext(
            dispatcher=dispatcher,
            metrics=metrics,
            text=model.text,
            timeout_s=config.request_timeout_s,
            worker_wait_s=config.worker_wait_s,
            keepalive_s=KEEPALIVE_S,
            admission=self.admission,
            answers=self.answers,
        )

    def note_request(
        self, *, request_id: str, tenant: str, arrived: float, call: str, status: str, generates: bool
    ) -> None:
        """Its line in the log, once it is over. `arrived`: time.monotonic()."""
        if self.log is None:
            return
        record = self.explain.find(request_id, tenant) if generates else None
        if record is not None and record.arrived != arrived:  # of an earlier request with this id
            record = None
        pairs = request_pairs(
            record,
            request_id=request_id,
            tenant=tenant,
            call=call,
            status=status,
            model=self.model.name,
            total_s=time.monotonic() - arrived,
        )
        self.log.note("request", pairs)

    def close(self) -> None:
        """Ends the threads, and what watches the store."""
        self.work.close()
        self.answers.close()
        if self.store is not None:
            self.store.close()

    @property
    def ready(self) -> bool:
        return bool(self.fleet.decode) and not self.draining

    @property
    def max_model_len(self) -> int:
        """Tokens of prompt and output together: what every connected decode worker can hold."""
        return min([self.model.max_position_embeddings, *self.fleet.max_model_lens])

    @property
    def needs_key(self) -> bool:
        """Whether clients must say who they are."""
        config = self.config
        return bool(config.api_key or config.api_keys_file or config.tenants_file)

    @property
    def in_flight(self) -> int:
        """Sequences, those that wait included."""
        return self._in_flight

    def check_in_flight(self, sequences: int = 1) -> None:
        """Raises TandemError `overloaded` where `sequences` more would be too many."""
        if self._in_flight + sequences > self.config.max_requests:
            raise TandemError(
                "overloaded",
                f"{self._in_flight} of {self.config.max_requests} sequences are in flight; try again shortly",
                retry_after_s=1.0,
            )

    @asynccontextmanager
    async def call(
        self,
        request_id: str,
        choices: Sequence[ChoiceSpec],
        *,
        arrived: float,
        traceparent: str = "",
        streaming: bool = False,
        timeout_s: float | None = None,
    ) -> AsyncIterator[Call]:
        """A started call, which is closed on the way out. `timeout_s`: from arrival; None: as the router allows.

        Raises TandemError `overloaded` or `unavailable`.
        """
        self.check_in_flight(len(choices))
        span = self._span(request_id, len(choices), traceparent)
        sequence = choices[0].sequence
        record = self.explain.begin(
            request_id, sequence.caller.tenant, arrived, len(sequence.prompt.token_ids), len(choices)
        )
        spec = CallSpec(
            request_id=f"{request_id}.{self._router_id}{next(self._numbers):x}",
            choices=choices,
            record=record,
            arrived=arrived,
            traceparent=telemetry.traceparent_of(span) if self._tracing else traceparent,
            streaming=streaming,
            timeout_s=timeout_s,
        )
        call = Call(spec, self._context)
        charge: Charge | None = None
        self._in_flight += len(choices)
        try:
            charge = await self.accounts.open(self.model.name, choices)
            call.start()
            yield call
        except TandemError as error:
            record.finished(error.code)
            if charge is not None:
                charge.fail(error)
            span.set_status(Status(StatusCode.ERROR, error.code))
            raise
        finally:
            call.close()
            usage = call.usage()
            record.cached_tokens, record.output_tokens = usage.cached_tokens, usage.completion_tokens
            if record.finished_s is None:
                record.finished(call.error.code if call.error is not None else "ok" if call.finished else "cancelled")
            if charge is not None:
                charge.close(usage, call.error)
            span.end()
            self._in_flight -= len(choices)
            self.metrics.prompt_tokens.inc(by=usage.prompt_tokens)
            self.metrics.request_seconds.observe(time.monotonic() - arrived)
            if self.admission.waiting_requests:
                asyncio.get_running_loop().call_soon(self.pump)

    async def account(self, request_id: str, caller: Caller) -> dict[str, Any]:
        """Where one of the latest requests went, and why. A tenant finds its own requests only; one with `admin` those
        of all. Raises TandemError `not_found`."""
        tenant = None if caller.admin else caller.tenant
        question = {"id": request_id, "tenant": tenant}
        account = _account(self.explain, question)
        if account is None and self.siblings.count > 1:
            answers = await self.siblings.ask("request", **question)
            account = next((answer for answer in answers.values() if answer is not None), None)
        if account is None:
            raise TandemError(
                "not_found",
                f"there is no account of request {request_id[:64]!r}: it is not yours, or too long ago",
                param="id",
            )
        return account

    async def usage(self, caller: Caller) -> list[TenantUsage]:
        """What the caller's tenant has used, of all routers on this machine; for a tenant with `admin`, what each
        has."""
        tenant = None if caller.admin else caller.tenant
        reports = [self.accounts.usage.report(tenant)]
        answers = await self.siblings.ask("usage", tenant=tenant)
        reports += [msgspec.convert(answer, list[TenantUsage]) for answer in answers.values()]
        return merged(reports)

    def _span(self, request_id: str, choices: int, traceparent: str) -> Span:
        if not self._tracing:
            return INVALID_SPAN
        return telemetry.tracer().start_span(
            "router.generate",
            context=telemetry.context_from_traceparent(traceparent),
            kind=SpanKind.SERVER,
            attributes={"tandem.request_id": request_id, "tandem.choices": choices},
        )

    @property
    def batch_workers(self) -> list[WorkerSession]:
        """Decode workers that batches may use."""
        return self._context.dispatcher.workers(LAST_BAND)[0]

    def pump(self) -> None:
        """Lets those who wait go on, as far as the workers have room."""
        if self.admission.pump():
            asyncio.get_running_loop().call_soon(self.pump)

    async def pump_regularly(self) -> None:
        """Room also comes from what other routers' requests leave behind, and with new workers."""
        while True:
            await asyncio.sleep(PUMP_S)
            self.pump()
            self._refuse_without_workers()

    def _refuse_without_workers(self) -> None:
        """Ends the wait of those that have waited long enough for a first decode worker."""
        if not self.admission.waiting_requests or self.fleet.decode:
            self._no_decode_since = math.inf
            return
        now, patience_s = time.monotonic(), self.config.worker_wait_s
        self._no_decode_since = min(self._no_decode_since, now)
        if now - self._no_decode_since >= patience_s:
            self.admission.refuse_those(now - patience_s, no_worker())


def _account(explain: Explain, question: dict[str, Any]) -> dict[str, Any] | None:
    record = explain.find(question["id"], question["tenant"])
    return record.describe() if record is not None else None
