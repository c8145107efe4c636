"""One choice of a request: a sequence on the workers, its text, and what to do when something breaks."""

from __future__ import annotations

import logging
import time
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Protocol

from tandem.common.errors import TandemError
from tandem.proto import worker_pb2
from tandem.proto.worker_pb2 import TokenLogprobs
from tandem.router.attempt import Attempt
from tandem.router.choice_text import ChoiceText, Piece
from tandem.router.detokenizer import Detokenizer
from tandem.router.dispatch import Dispatcher, SequenceSpec
from tandem.router.metrics import RouterMetrics
from tandem.router.tokenizer import ModelText

log = logging.getLogger(__name__)

MAX_ATTEMPTS = 3
RETRIED_CODES = frozenset({"worker_lost", "unavailable"})
"""Worker errors after which another start may succeed; `overloaded` is retried on other workers only."""

_FINISH_REASONS = {worker_pb2.FINISH_REASON_STOP: "stop", worker_pb2.FINISH_REASON_LENGTH: "length"}


@dataclass(frozen=True, slots=True)
class ChoiceSpec:
    sequence: SequenceSpec
    stop: tuple[str, ...] = ()
    include_stop: bool = False
    skip_special_tokens: bool = True
    keep_tokens: bool = False
    """Token ids or logprobs will be reported."""
    no_output: bool = False
    """Only the prompt is scored: whatever is generated is dropped."""


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


@dataclass(slots=True)
class CallSpec:
    request_id: str
    """Unique among all calls of all routers; the workers' keys derive from it."""
    choices: Sequence[ChoiceSpec]
    arrived: float = field(default_factory=time.monotonic)
    traceparent: str = ""
    streaming: bool = False


class Owner(Protocol):
    """The call that a choice belongs to."""

    spec: CallSpec
    context: CallContext
    deadline: float

    def choice_ready(self, choice: Choice) -> None:
        """There is something to read, or it has just finished."""

    def retry(self, choice: Choice, reason: str) -> None:
        """Its attempt is over; `choice.submit` again once a worker is there."""

    def fail(self, error: TandemError) -> None: ...


class Choice:
    """One sequence. Starts again on another worker as long as nothing of it was read by the client."""

    def __init__(self, call: Owner, index: int, spec: ChoiceSpec) -> None:
        self.index = index
        self.spec = spec
        self.finished = False
        self.cached_by_tier: dict[str, int] = {}
        """Prompt tokens that were not computed, by where their KV came from."""
        self.prompt_logprobs: list[TokenLogprobs] = []
        self._call = call
        self._attempt: Attempt | None = None
        self._epoch = 0
        self.avoid: set[tuple[str, int]] = set()
        """Starts of workers that would not take it."""
        self._read = False
        self._finish_reason: str | None = None
        self._stop_reason: int | str | None = None
        self._last_output = 0.0
        self._reset()

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
        """Raises TandemError `unavailable`."""
        call, self._epoch = self._call, self._epoch + 1
        self._reset()
        self._attempt = call.context.dispatcher.start(
            worker_pb2.RequestKey(request_id=f"{call.spec.request_id}.{self.index}", epoch=self._epoch),
            self.spec.sequence,
            self,
            timeout_s=max(0.001, call.deadline - time.monotonic()),
            traceparent=call.spec.traceparent,
            avoid=self.avoid,
        )

    def take(self) -> Delta:
        self._read = True
        return Delta(self.index, self._text.take(), self._finish_reason, self._stop_reason)

    def cancel(self) -> None:
        if not self.finished:
            self.finished = True
            self._call.context.metrics.completion_tokens.inc(self.num_tokens)
        if self._attempt is not None:
            self._attempt.cancel()
            self._attempt = None

    def on_output(self, output: worker_pb2.RequestOutput) -> None:
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
            self._again("worker_lost", reason)

    def _take_output(self, output: worker_pb2.RequestOutput) -> None:
        if output.finish_reason in (worker_pb2.FINISH_REASON_ERROR, worker_pb2.FINISH_REASON_CANCELLED):
            self._on_error(output)
            return
        if output.start_index > self._received:
            self._call.fail(TandemError("internal", "tokens of this request were lost on the way"))
            return
        if output.HasField("prompt"):
            self._note_prompt(output)
        seen = self._received - output.start_index
        token_ids: Sequence[int] = output.token_ids
        logprobs: Sequence[TokenLogprobs] = output.logprobs
        if seen:
            token_ids, logprobs = token_ids[seen:], logprobs[seen:]
        if token_ids:
            self._note_time(len(token_ids))
            self._received += len(token_ids)
            self._feed(token_ids, logprobs, output)
        if output.finish_reason:
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
        self._text.finish()
        self.finished = True
        self._finish_reason, self._stop_reason = finish_reason, stop_reason
        if self._attempt is not None:
            self._attempt.cancel()
            self._attempt = None
        self._call.context.metrics.completion_tokens.inc(self.num_tokens)
        self._call.choice_ready(self)

    def _on_error(self, output: worker_pb2.RequestOutput) -> None:
        code = output.error.code or "unavailable"
        decode = self._attempt.decode if self._attempt is not None else None
        if code == "overloaded" and decode is not None:
            self.avoid.add(decode.identity)
            fleet = self._call.context.dispatcher.fleet
            if not self._read and any(session.identity not in self.avoid for session in fleet.decode):
                self._again("worker_lost", output.error.message)
                return
        if code in RETRIED_CODES:
            if decode is not None:
                self.avoid.add(decode.identity)
            self._again(code, output.error.message)
            return
        retry_after_s = 1.0 if output.error.retriable else None
        self._call.fail(TandemError(code, output.error.message or code, retry_after_s=retry_after_s))

    def _again(self, code: str, reason: str) -> None:
        self._attempt = None
        if not self._read and self._epoch < MAX_ATTEMPTS:
            self._call.context.metrics.retries.inc()
            self._call.retry(self, reason)
            return
        self._call.fail(
            TandemError(
                code,
                f"the decode worker was lost after {self._received} tokens ({reason}); the request can be sent again",
                retry_after_s=1.0,
            )
        )

    def _note_prompt(self, output: worker_pb2.RequestOutput) -> None:
        metrics, report = self._call.context.metrics, output.prompt
        self.cached_by_tier = dict(report.cached_by_tier)
        self.prompt_logprobs = list(output.prompt_logprobs)
        for tier, tokens in self.cached_by_tier.items():
            metrics.cached_tokens.labels(tier).inc(tokens)
        if self._attempt is not None:
            self._call.context.dispatcher.prompt_computed(self.spec.sequence, self._attempt.decode)
        if report.recompute_reason:
            metrics.handover_recomputes.inc()
            log.info(
                "request %s: hand-over became a recompute: %s", self._call.spec.request_id, report.recompute_reason
            )
        elif report.handover_s:
            metrics.handover_seconds.observe(report.handover_s)

    def _note_time(self, new_tokens: int) -> None:
        now = time.monotonic()
        if self._received == 0:
            self._call.context.metrics.ttft.observe(now - self._call.spec.arrived)
        else:
            self._call.context.metrics.itl.observe((now - self._last_output) / new_tokens)
        self._last_output = now

    def _reset(self) -> None:
        spec = self.spec
        self._received = 0
        self._text = ChoiceText(
            Detokenizer(
                self._call.context.text,
                spec.sequence.prompt.token_ids,
                skip_special_tokens=spec.skip_special_tokens,
            ),
            spec.stop,
            min_tokens=spec.sequence.sampling.min_tokens,
            keep_tokens=spec.keep_tokens,
            include_stop=spec.include_stop,
        )


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
