"""Why a request went where it went, and where its time was spent: one record per request, the latest are kept.

Filled by `Call` and `Choice` as things happen; read by `GET /v1/requests/{id}` and by answers to requests that sent
`x-tandem-explain: 1`. All times are seconds after the arrival of the request at this router.
"""

from __future__ import annotations

import time
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any

from tandem.proto import worker_pb2
from tandem.router.calls.journeys import journeys
from tandem.router.tenants.fair_cache import FairCache

if TYPE_CHECKING:
    from tandem.router.placing.attempt import Attempt
    from tandem.router.placing.placement import Placement

MAX_RECORDS = 4000
"""About 5 KB each. The oldest are forgotten, those of a tenant that has half of them first."""
MAX_CANDIDATES = 8
"""The cheapest ones that are shown of a placement."""
MAX_PREEMPTIONS = 8
"""Preemptions that are shown of an attempt; all are counted."""
MAX_ATTEMPTS = 32
"""Most attempts of one record, as many as a request with n=16 and retries has."""


@dataclass(slots=True)
class AttemptNote:
    """One start of one choice on the workers."""

    choice: int
    epoch: int
    started_s: float
    decode: str
    prefill: str | None
    placement: Placement
    kv_bytes_per_token: int = 0
    resumed_tokens: int = 0
    """Tokens that an earlier attempt had produced; this one went on after them."""
    first_token_s: float | None = None
    report: worker_pb2.PromptReport | None = None
    num_preemptions: int = 0
    preemptions: list[tuple[float, str]] = field(default_factory=list)
    """The first ones: when, and for want of `memory` or for a request of an earlier `priority`."""
    ended_s: float | None = None
    ended: str = ""
    """`stop`, `length`, or what broke it."""

    def describe(self) -> dict[str, Any]:
        """The attempt as JSON values: stages and hits are there once the worker has told of them, candidates up to
        `MAX_CANDIDATES`."""
        value: dict[str, Any] = {
            "choice": self.choice,
            "attempt": self.epoch,
            "decode": self.decode,
            "prefill": self.prefill,
            "reason": self.placement.reason,
            "resumed_tokens": self.resumed_tokens,
            "started_s": _rounded(self.started_s),
            "first_token_s": _rounded(self.first_token_s),
            "ended_s": _rounded(self.ended_s),
            "ended": self.ended,
        }
        if self.num_preemptions:
            value["num_preemptions"] = self.num_preemptions
            value["preemptions"] = [{"at_s": _rounded(at_s), "reason": reason} for at_s, reason in self.preemptions]
        if self.report is not None:
            report = self.report
            value["cached_by_tier"] = dict(report.cached_by_tier)
            value["near_tokens"] = report.near_tokens
            value["inexact_from"] = report.inexact_from if report.HasField("inexact_from") else None
            value["computed_by"] = report.computed_by
            value["recompute_reason"] = report.recompute_reason
            stages = {
                "worker_queue_s": report.queue_s,
                "load_s": report.load_s,
                "prefill_s": report.prefill_s,
                "handover_s": report.handover_s,
            }
            value["kv_moved"] = [_rounded_fields(asdict(way)) for way in journeys(report, self.kv_bytes_per_token)]
            value["stages"] = {name: _rounded(seconds) for name, seconds in stages.items()}
        value["candidates"] = [
            _rounded_fields(asdict(candidate)) for candidate in self.placement.candidates[:MAX_CANDIDATES]
        ]
        return value


@dataclass(slots=True)
class Record:
    """One request's account: what `x-tandem-explain` shows of it. Times that end in `_s` are seconds since it
    arrived."""

    request_id: str
    tenant: str
    arrived: float
    """time.monotonic()"""
    arrived_at: float
    """time.time(): for people."""
    prompt_tokens: int
    choices: int
    cached_tokens: int = 0
    """Cached tokens of the prompts, known once it is over; so are the next."""
    output_tokens: int = 0
    granted_s: float | None = None
    """When admission let it go on to the workers."""
    attempts: list[AttemptNote] = field(default_factory=list)
    finished_s: float | None = None
    outcome: str = "running"
    """`ok` or the code of the error that ended it."""

    def granted(self) -> None:
        self.granted_s = self._now()

    def placed(self, choice: int, epoch: int, attempt: Attempt, resumed: int) -> None:
        """Notes that an attempt begins; `resumed`: output tokens that it starts with. Beyond `MAX_ATTEMPTS` nothing is
        noted."""
        if len(self.attempts) >= MAX_ATTEMPTS:
            return
        decode, prefill = attempt.decode.name, attempt.prefill.name if attempt.prefill is not None else None
        size = attempt.decode.info.kv_bytes_per_token
        self.attempts.append(AttemptNote(choice, epoch, self._now(), decode, prefill, attempt.placement, size, resumed))

    def first_token(self, choice: int, report: worker_pb2.PromptReport) -> None:
        if (note := self._latest(choice)) is not None:
            note.first_token_s, note.report = self._now(), report

    def preempted(self, choice: int, reason: str) -> None:
        """Its worker has taken its place from it, and gives it back later."""
        if (note := self._latest(choice)) is not None:
            note.num_preemptions += 1
            if len(note.preemptions) < MAX_PREEMPTIONS:
                note.preemptions.append((self._now(), reason))

    def ended(self, choice: int, why: str) -> None:
        """The latest attempt of `choice` is over."""
        note = self._latest(choice)
        if note is not None and note.ended_s is None:
            note.ended_s, note.ended = self._now(), why[:200]

    def finished(self, outcome: str) -> None:
        self.finished_s, self.outcome = self._now(), outcome

    def describe(self) -> dict[str, Any]:
        """What is shown, as JSON values."""
        return {
            "id": self.request_id,
            "tenant": self.tenant,
            "arrived_at": round(self.arrived_at, 3),
            "outcome": self.outcome,
            "prompt_tokens": self.prompt_tokens,
            "cached_tokens": self.cached_tokens,
            "output_tokens": self.output_tokens,
            "choices": self.choices,
            "queued_s": _rounded(self.granted_s),
            "finished_s": _rounded(self.finished_s),
            "attempts": [note.describe() for note in self.attempts],
        }

    def _latest(self, choice: int) -> AttemptNote | None:
        for note in reversed(self.attempts):
            if note.choice == choice:
                return note
        return None

    def _now(self) -> float:
        return time.monotonic() - self.arrived


class Explain:
    """The latest records by request id. A client that reuses an id replaces its own older record; ids of different
    tenants never meet."""

    def __init__(self, max_records: int = MAX_RECORDS) -> None:
        self._records: FairCache[str, Record] = FairCache(max_records)

    def __len__(self) -> int:
        return len(self._records)

    def begin(self, request_id: str, tenant: str, arrived: float, prompt_tokens: int, choices: int) -> Record:
        """`arrived`: time.monotonic()."""
        arrived_at = time.time() - (time.monotonic() - arrived)
        record = Record(request_id, tenant, arrived, arrived_at, prompt_tokens, choices)
        self._records.put(tenant, request_id, record)
        return record

    def find(self, request_id: str, tenant: str | None) -> Record | None:
        """`tenant` None: of any tenant, the latest."""
        if tenant is not None:
            return self._records.get(tenant, request_id)
        return next((record for name, record in self._records.newest() if name == request_id), None)


def _rounded(seconds: float | None) -> float | None:
    return None if seconds is None else round(seconds, 6)


def _rounded_fields(values: dict[str, Any]) -> dict[str, Any]:
    return {name: round(value, 6) if isinstance(value, float) else value for name, value in values.items()}
