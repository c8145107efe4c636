"""One choice of a request: a sequence on the workers, its text, and what to do when something breaks."""

from __future__ import annotations

import logging
import random
import time
from array import array
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Protocol

from tandem.common.errors import TandemError
from tandem.common.fair_work import FairWork
from tandem.proto import worker_pb2
from tandem.proto.worker_pb2 import TokenLogprobs
from tandem.router.calls.explain import Record
from tandem.router.calls.journeys import journeys
from tandem.router.fleet.retry import RetryBudget, Setbacks
from tandem.router.metrics.router_metrics import RouterMetrics
from tandem.router.placing.attempt import Attempt
from tandem.router.placing.dispatch import Dispatcher, SequenceSpec
from tandem.router.text.choice_text import ChoiceText, Piece
from tandem.router.text.detokenizer import Detokenizer
from tandem.router.text.tokenizer import ModelText
from tandem.router.turns.admission import Admission

log = logging.getLogger(__name__)

_FINISH_REASONS = {worker_pb2.FINISH_REASON_STOP: "stop", worker_pb2.FINISH_REASON_LENGTH: "length"}

_PREEMPTIONS = {worker_pb2.PREEMPTION_MEMORY: "memory", worker_pb2.PREEMPTION_PRIORITY: "priority"}


@dataclass(frozen=True, slots=True)
class ChoiceSpec:
    """What one choice asks for: its sequence, and what becomes of the output."""

    sequence: SequenceSpec
    stop: tuple[str, ...] = ()
    include_stop: bool = False
    skip_special_tokens: bool = True
    keep_tokens: bool = False
    """Token ids or logprobs will be reported."""
    no_output: bool = False
    """Only the prompt is scored: whatever is generated is dropped."""
    ignored: tuple[str, ...] = ()
    """Fields of the request that have no effect, by their names; the answer tells of them."""


@dataclass(slots=True)
class Delta:
    """What became visible of one choice since the last read."""

    index: int
    piece: Piece
    finish_reason: str | None = None
    """`stop` or `length`; set in the last delta of the choice."""
    stop_reason: int | str | None = None
    """The stop token id or stop string that ended it; None for end of sequence."""


@dataclass(slots=True)
class CallContext:
    """What a call needs from the house."""

    dispatcher: Dispatcher
    metrics: RouterMetrics
    text: ModelText
    timeout_s: float
    worker_wait_s: float
    keepalive_s: float
    admission: Admission
    answers: FairWork
    """Threads for what takes long to write."""
    retries: RetryBudget = field(default_factory=RetryBudget)


@dataclass(slots=True)
class CallSpec:
    """What one call asks for: its choices, and what it is known by."""

    request_id: str
    """Unique among all calls of all routers; the workers' keys derive from it."""
    choices: Sequence[ChoiceSpec]
    record: Record
    arrived: float = field(default_factory=time.monotonic)
    traceparent: str = ""
    streaming: bool = False
    timeout_s: float | None = None
    """Seconds from arrival to the last token; None: as the router allows."""
    prompt_tokens: int = field(init=False)
    """Each prompt counts once however many choices it has."""

    def __post_init__(self) -> None:
        prompts = {id(choice.sequence.prompt): choice.sequence.prompt for choice in self.choices}
        self.prompt_tokens = sum([len(prompt.token_ids) for prompt in prompts.values()])


class Owner(Protocol):
    """The call that a choice belongs to."""

    spec: CallSpec
    context: CallContext
    deadline: float

    def choice_ready(self, choice: Choice) -> None:
        """There is something to read, or it has just finished."""

    def retry(self, choice: Choice, reason: str, *, fault: bool) -> None:
        """Its attempt is over; `choice.submit` again once a worker is there. `fault`: not by a regular refusal."""

    def prompt_computed(self, choice: Choice) -> None:
        """The first worker has reported on its prompt; once per choice."""

    def produced(self, tokens: int) -> None:
        """New output tokens have come."""

    def fail(self, error: TandemError) -> None: ...


class Choice:
    """One sequence. When its worker is lost another one goes on after the tokens that have come: the reader of the text
    sees a pause. Tokens are a function of prompt, seed and position, so nothing tells where the worker changed."""

    def __init__(self, call: Owner, index: int, spec: ChoiceSpec) -> None:
        self.index = index
        self.spec = spec = _seeded(spec)
        self.finished = False
        self.cached_by_tier: dict[str, int] = {}
        """Prompt tokens that were not computed, by where their KV came from."""
        self.near_tokens = 0
        """Cached tokens of the prompt whose KV was not exact; those of the worker that had most of them."""
        self.prompt_logprobs: list[TokenLogprobs] = []
        self.embedding = b""
        """Little-endian float32, where pooling was asked for."""
        self.setbacks = Setbacks()
        self._call = call
        self._attempt: Attempt | None = None
        self._epoch = 0
        self._output = array("I")
        """Every token that has come: a worker that goes on is told them."""
        self._prompt_noted = False
        self._finish_reason: str | None = None
        self._stop_reason: int | str | None = None
        self._last_output = 0.0
        self._text = ChoiceText(
            Detokenizer(
                call.context.text, spec.sequence.prompt.token_ids, skip_special_tokens=spec.skip_special_tokens
            ),
            spec.stop,
            min_tokens=spec.sequence.sampling.min_tokens,
            keep_tokens=spec.keep_tokens,
            include_stop=spec.include_stop,
        )

    @property
    def num_tokens(self) -> int:
        return 0 if self.spec.no_output else self._text.num_tokens

    @property
    def buffered_bytes(self) -> int:
        """An upper estimate of what waits for the reader: text is a few bytes a token, a logprob about 100."""
        alternatives = self.spec.sequence.sampling.logprobs
        per_token = 100 if alternatives is None else 200 + 100 * alternatives
        return self._text.buffered * per_token

    def submit(self) -> None:
        """Starts, or goes on after the tokens that have come. Raises TandemError `unavailable`."""
        call, self._epoch = self._call, self._epoch + 1
        sequence = self.spec.sequence
        if self._output and sequence.sampling.prompt_logprobs is not None:  # they came with the first token
            sequence = replace(sequence, sampling=replace(sequence.sampling, prompt_logprobs=None))
        self._attempt = call.context.dispatcher.start(
            worker_pb2.RequestKey(request_id=f"{call.spec.request_id}.{self.index}", epoch=self._epoch),
            sequence,
            self,
            timeout_s=max(0.001, call.deadline - time.monotonic()),
            traceparent=call.spec.traceparent,
            avoid=self.setbacks.avoid,
            output_token_ids=self._output,
        )
        call.spec.record.placed(self.index, self._epoch, self._attempt, len(self._output))

    def take(self) -> Delta:
        return Delta(self.index, self._text.take(), self._finish_reason, self._stop_reason)

    def cancel(self) -> None:
        """Ends the choice on its workers and in the metrics. Idempotent."""
        if not self.finished:
            self.finished = True
            self._call.context.metrics.completion_tokens.inc(by=self.num_tokens)
        if self._attempt is not None:
            self._attempt.cancel()
            self._attempt = None

    def close(self) -> None:
        """Lets go of the call, after `cancel`."""
        del self._call

    def on_output(self, output: worker_pb2.RequestOutput) -> None:
        """Takes one output of the decode worker, on the event loop. Never raises: what goes wrong fails this call
        only."""
        if self.finished:
            return
        try:
            self._take_output(output)
        except Exception:
            # The worker's session serves others, too: only this request may end.
            log.exception("request %s: an output could not be processed", self._call.spec.request_id)
            self._call.fail(TandemError("internal", "an internal error; the router's log has more"))

    def on_worker_lost(self, reason: str) -> None:
        if not self.finished:
            self._on_fault("worker_lost", reason)

    def _take_output(self, output: worker_pb2.RequestOutput) -> None:
        if output.finish_reason in (worker_pb2.FINISH_REASON_ERROR, worker_pb2.FINISH_REASON_CANCELLED):
            self._on_error(output)
            return
        if output.preempted:
            reason = _PREEMPTIONS.get(output.preempted, "other")
            self._call.context.metrics.preemptions.inc(reason)
            self._call.spec.record.preempted(self.index, reason)
            return
        received = len(self._output)
        if output.start_index > received:
            self._call.fail(TandemError("internal", "tokens of this request were lost on the way"))
            return
        if output.HasField("prompt"):
            self._note_prompt(output)
        if output.embedding:
            self.embedding = output.embedding
        seen = received - output.start_index
        token_ids: Sequence[int] = output.token_ids
        logprobs: Sequence[TokenLogprobs] = output.logprobs
        if seen:
            token_ids, logprobs = token_ids[seen:], logprobs[seen:]
        if token_ids:
            self._note_time(len(token_ids))
            self._call.produced(len(token_ids))
            self._output.extend(token_ids)
            self._feed(token_ids, logprobs, output)
        if output.finish_reason or self._text.matched is not None:
            self._text.finish()
        if self._text.matched is not None:
            self._finish("stop", self._text.matched)
        elif output.finish_reason:
            stop_token = output.stop_token_id if output.HasField("stop_token_id") else None
            explicit = stop_token in self.spec.sequence.sampling.stop_token_ids
            self._finish(_FINISH_REASONS.get(output.finish_reason, "stop"), stop_token if explicit else None)
        elif self._text.has_text:
            self._call.choice_ready(self)

    def _feed(
        self, token_ids: Sequence[int], logprobs: Sequence[TokenLogprobs], output: worker_pb2.RequestOutput
    ) -> None:
        if self.spec.no_output:
            return
        if output.HasField("stop_token_id") and token_ids[-1] == output.stop_token_id:
            self._text.feed(token_ids[:-1], logprobs[:-1])
            if self._text.matched is None:
                self._text.count_silent(token_ids[-1], logprobs[-1] if logprobs else None)
        else:
            self._text.feed(token_ids, logprobs)

    def _finish(self, finish_reason: str, stop_reason: int | str | None) -> None:
        self.finished = True
        self._finish_reason, self._stop_reason = finish_reason, stop_reason
        self._call.spec.record.ended(self.index, finish_reason)
        if self._attempt is not None:
            self._attempt.cancel()
            self._attempt = None
        self._call.context.metrics.completion_tokens.inc(by=self.num_tokens)
        self._call.choice_ready(self)

    def _on_error(self, output: worker_pb2.RequestOutput) -> None:
        attempt, self._attempt = self._attempt, None
        if attempt is None:
            return
        code, message, worker = output.error.code or "unavailable", output.error.message, attempt.decode.identity
        match code:
            case "unavailable":  # the worker is leaving, as it should be able to at any time
                self.setbacks.left(worker)
                self._again(message, fault=False)
            case "overloaded":
                self.setbacks.full(worker)
                if self._others_left():
                    self._again(message, fault=False)
                elif self._output:  # it has been let in once
                    self.setbacks.ask_all_again()
                    self._again(message, fault=True)
                else:
                    self._call.fail(TandemError(code, message or code, retry_after_s=1.0))
            case "worker_lost" | "internal":
                self.setbacks.left(worker)
                if code == "internal" and not self._others_left():
                    self._call.fail(TandemError(code, message or code))
                else:
                    self._on_fault(code, message)
            case _:
                retry_after_s = 1.0 if output.error.retriable else None
                self._call.fail(TandemError(code, message or code, retry_after_s=retry_after_s))

    def _others_left(self) -> bool:
        fleet, avoid = self._call.context.dispatcher.fleet, self.setbacks.avoid
        return any(session.identity not in avoid for session in fleet.decode)

    def _on_fault(self, code: str, reason: str) -> None:
        if self.setbacks.lost():
            self._again(reason, fault=True)
            return
        self._call.fail(
            TandemError(
                "internal",
                f"{self.setbacks.losses} workers failed one after the other at token {len(self._output)} of this "
                f"request, the last one with {code} ({reason}); it is not tried again",
            )
        )

    def _again(self, reason: str, *, fault: bool) -> None:
        self._attempt = None
        self._call.spec.record.ended(self.index, reason)
        self.setbacks.begin(time.monotonic())
        self._call.retry(self, reason, fault=fault)

    def lost(self, reason: str) -> TandemError:
        """What the client hears when nobody has gone on with it in time."""
        return TandemError(
            "worker_lost",
            f"the decode worker was lost after {len(self._output)} tokens ({reason}) and no other could take over "
            "in time; the request can be sent again",
            retry_after_s=1.0,
        )

    def _note_prompt(self, output: worker_pb2.RequestOutput) -> None:
        metrics, report = self._call.context.metrics, output.prompt
        self._call.spec.record.first_token(self.index, report)
        self.near_tokens = max(self.near_tokens, report.near_tokens)
        if not self._prompt_noted:  # a worker that goes on reports, too; what the client pays for is settled
            self._prompt_noted = True
            self.cached_by_tier = dict(report.cached_by_tier)
            self.prompt_logprobs = list(output.prompt_logprobs)
            self._call.prompt_computed(self)
            for tier, tokens in self.cached_by_tier.items():
                metrics.cached_tokens.inc(tier, by=tokens)
            if self._attempt is not None:
                for way in journeys(report, self._attempt.decode.info.kv_bytes_per_token):
                    metrics.kv_moved_bytes.inc(way.transport, way.codec, by=way.bytes)
                    metrics.kv_moved_seconds.inc(way.transport, way.codec, by=way.seconds)
        if report.recompute_reason:
            metrics.handover_recomputes.inc()
            log.info(
                "request %s: hand-over became a recompute: %s", self._call.spec.request_id, report.recompute_reason
            )
        elif report.handover_s:
            metrics.handover_seconds.observe(report.handover_s)

    def _note_time(self, new_tokens: int) -> None:
        now = time.monotonic()
        if not self._output:
            self._call.context.metrics.ttft.observe(now - self._call.spec.arrived)
        else:
            self._call.context.metrics.itl.observe((now - self._last_output) / new_tokens)
        self._last_output = now
        if self.setbacks.since is not None:
            self.setbacks.over()


def with_seeds(spec: ChoiceSpec, n: int) -> list[ChoiceSpec]:
    """`n` copies of a choice; with a seed the i-th has seed + i, so that they differ and repeat."""
    seed = spec.sequence.sampling.seed
    if seed is None:
        return [spec] * n
    seeds = [(seed + i) % 2**64 for i in range(n)]
    return [
        replace(spec, sequence=replace(spec.sequence, sampling=replace(spec.sequence.sampling, seed=value)))
        for value in seeds
    ]


def _seeded(spec: ChoiceSpec) -> ChoiceSpec:
    """The choice with a seed of its own where tokens are drawn: another worker has to draw the same ones."""
    sampling = spec.sequence.sampling
    if sampling.seed is not None or sampling.temperature == 0.0:
        return spec
    sampling = replace(sampling, seed=random.getrandbits(64))
    return replace(spec, sequence=replace(spec.sequence, sampling=sampling))
