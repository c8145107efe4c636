"""What requests are told: outputs are made here, and collected until a step is over."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable

from tandem.common.errors import TandemError
from tandem.engine.request import FinishReason, RequestKey, RequestOutput
from tandem.engine.schedule.sequence import Sequence
from tandem.engine.step.executor import NextToken

logger = logging.getLogger(__name__)


class Outputs:
    """Engine thread only."""

    def __init__(self, receive: Callable[[list[RequestOutput]], None]) -> None:
        self.receive = receive
        self._waiting: list[RequestOutput] = []

    def put(self, output: RequestOutput) -> None:
        self._waiting.append(output)

    def flush(self) -> None:
        """Hands over what there is. What the receiver raises is not the engine's concern."""
        outputs, self._waiting = self._waiting, []
        if outputs:
            try:
                self.receive(outputs)
            except Exception:
                logger.exception("the receiver of outputs failed; %d outputs are lost", len(outputs))


def advance(sequence: Sequence, chosen: NextToken, *, ends: bool) -> RequestOutput:
    """Appends the `chosen` token, unless the output has its length already, and says what came of it. `ends`: the token
    ends the output, whatever the request says of it."""
    params = sequence.request.sampling
    output = RequestOutput(sequence.key, start_index=sequence.num_output)
    if sequence.num_output < params.max_tokens:
        sequence.append(chosen.token)
        output.token_ids.append(chosen.token)
        if chosen.logprobs is not None:
            output.logprobs.append(chosen.logprobs)
        if ends or (chosen.token in sequence.stop_ids and sequence.num_output >= params.min_tokens):
            output.finish_reason = FinishReason.STOP
            output.stop_token_id = chosen.token
    waits_for_mask = sequence.guide is not None and output.token_ids  # which says whether the output is complete
    if output.finish_reason is None and not waits_for_mask and len(sequence.tokens) >= sequence.max_total:
        output.finish_reason = FinishReason.LENGTH
    if sequence.report is not None and params.prompt_logprobs is not None:
        output.prompt_logprobs = [None, *(chosen.prompt_logprobs or ())]
    add_report(sequence, output)
    return output


def add_report(sequence: Sequence, output: RequestOutput) -> None:
    """What is told once, with the first output."""
    if sequence.report is not None:
        report, now = sequence.report, time.monotonic()
        report.queue_s = (sequence.first_scheduled or now) - sequence.submitted
        report.prefill_s = now - (sequence.first_scheduled or now)
        report.inexact_from = sequence.inexact_from
        output.prompt, sequence.report = report, None


def embedding(sequence: Sequence, vector: bytes) -> RequestOutput:
    """The one output of a request for an embedding: `vector` is float32, little-endian."""
    output = RequestOutput(sequence.key, finish_reason=FinishReason.STOP, embedding=vector)
    add_report(sequence, output)
    return output


def failed(key: RequestKey, error: TandemError, start_index: int = 0) -> RequestOutput:
    """The last output of a request that ends with `error` after `start_index` tokens."""
    output = RequestOutput(key, finish_reason=FinishReason.ERROR, start_index=start_index)
    output.error_code, output.error_message = error.code, error.message
    return output
