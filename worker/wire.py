"""Engine dataclasses to and from worker.proto. `output_to_proto` runs for every request of every step: keep it fast."""

from __future__ import annotations

import math
import struct
import time

from google.protobuf.message import DecodeError

from tandem.common.errors import ERROR_KINDS, TandemError
from tandem.common.fairness import MAX_WEIGHT
from tandem.common.sampling import SamplingParams
from tandem.engine.request import (
    EngineRequest,
    FinishReason,
    Pooling,
    Preemption,
    PromptReport,
    RequestKey,
    RequestOutput,
    TokenLogprobs,
)
from tandem.proto import worker_pb2

MAX_NAME = 256
"""Characters of a request's id, and of a tenant."""
MAX_SALT = 8192
"""Bytes."""
MAX_TIMEOUT_S = 30 * 86_400.0
_STAMP = struct.Struct("<Hdd")
"""Length of the clock's name, when the first token was computed, and how long after the Accept."""
_PREEMPTIONS = {
    Preemption.MEMORY: worker_pb2.PREEMPTION_MEMORY,
    Preemption.PRIORITY: worker_pb2.PREEMPTION_PRIORITY,
}


def key_from_proto(message: worker_pb2.RequestKey) -> RequestKey:
    return RequestKey(message.request_id, message.epoch)


def output_to_proto(output: RequestOutput) -> worker_pb2.RequestOutput:
    """The engine's output as routers read it."""
    key = output.key
    message = worker_pb2.RequestOutput(
        key=worker_pb2.RequestKey(request_id=key.request_id, epoch=key.epoch),
        start_index=output.start_index,
        token_ids=output.token_ids,
    )
    if output.logprobs:
        message.logprobs.extend(map(_logprobs_to_proto, output.logprobs))
    if output.finish_reason is not None:
        message.finish_reason = worker_pb2.FinishReason.ValueType(int(output.finish_reason))
        if output.stop_token_id is not None:
            message.stop_token_id = output.stop_token_id
        if output.error_code:
            message.error.CopyFrom(error_to_proto(output.error_code, output.error_message))
    if output.prompt is not None:
        report = output.prompt
        message.prompt.CopyFrom(
            worker_pb2.PromptReport(
                cached_tokens=report.cached_tokens,
                queue_s=report.queue_s,
                prefill_s=report.prefill_s,
                handover_s=report.handover_s,
                handover_bytes=report.handover_bytes,
                handover_transport=report.handover_transport,
                handover_codec=report.handover_codec,
                computed_by=report.computed_by,
                recompute_reason=report.recompute_reason,
                cached_by_tier=report.cached_by_tier,
                load_s=report.load_s,
                near_tokens=report.near_tokens,
                inexact_from=report.inexact_from,
            )
        )
    if output.embedding:
        message.embedding = output.embedding
    if output.preempted is not None:
        message.preempted = _PREEMPTIONS[output.preempted]
    if output.prompt_logprobs:
        message.prompt_logprobs.extend(map(_logprobs_to_proto, output.prompt_logprobs))
    return message


def output_from_proto(message: worker_pb2.RequestOutput) -> RequestOutput:
    """Raises ValueError for a finish reason that this version does not know."""
    report = message.prompt
    prompt = PromptReport(
        cached_tokens=report.cached_tokens,
        queue_s=report.queue_s,
        prefill_s=report.prefill_s,
        handover_s=report.handover_s,
        handover_bytes=report.handover_bytes,
        handover_transport=report.handover_transport,
        handover_codec=report.handover_codec,
        computed_by=report.computed_by,
        recompute_reason=report.recompute_reason,
        cached_by_tier=dict(report.cached_by_tier),
        load_s=report.load_s,
        near_tokens=report.near_tokens,
        inexact_from=report.inexact_from if report.HasField("inexact_from") else None,
    )
    prompt_logprobs: list[TokenLogprobs | None] = [
        _logprobs_from_proto(entry) if entry.rank else None for entry in message.prompt_logprobs
    ]
    return RequestOutput(
        key=key_from_proto(message.key),
        start_index=message.start_index,
        token_ids=list(message.token_ids),
        logprobs=[_logprobs_from_proto(entry) for entry in message.logprobs],
        finish_reason=FinishReason(message.finish_reason) if message.finish_reason else None,
        error_code=message.error.code,
        error_message=message.error.message,
        stop_token_id=message.stop_token_id if message.HasField("stop_token_id") else None,
        prompt=prompt if message.HasField("prompt") else None,
        prompt_logprobs=prompt_logprobs,
        embedding=message.embedding,
    )


def pack_first(output: RequestOutput, clock: str, now: float, since_accept_s: float = 0.0) -> bytes:
    """What ends a hand-over: the first token, and when it was computed: on the monotonic clock of host `clock`, and for
    other hosts so long after the decode worker's Accept came (0: before)."""
    name = clock.encode()
    return _STAMP.pack(len(name), now, since_accept_s) + name + output_to_proto(output).SerializeToString()


def unpack_first(payload: bytes, clock: str, now: float, accepted_at: float = -math.inf) -> RequestOutput:
    """The reverse, with `prompt.handover_s` filled in: by the clock that both ends have, or else by that of this end,
    which said Accept at `accepted_at`. The Accept's own way is then taken for a part of the hand-over.

    Raises ValueError for bytes that `pack_first` did not make.
    """
    try:
        length, computed_at, since_accept_s = _STAMP.unpack_from(payload)
        start = _STAMP.size + length
        output = output_from_proto(worker_pb2.RequestOutput.FromString(payload[start:]))
    except (struct.error, DecodeError) as error:
        raise ValueError(f"a first output of {len(payload)} bytes cannot be read: {error}") from error
    if output.prompt is not None:
        if not clock or payload[_STAMP.size : start] != clock.encode():
            computed_at = accepted_at + max(since_accept_s, 0.0)
        waited_s = now - max(computed_at, accepted_at)
        output.prompt.handover_s = max(waited_s, 0.0) if math.isfinite(waited_s) else 0.0
    return output


def error_to_proto(code: str, text: str) -> worker_pb2.WorkerError:
    known = code if code in ERROR_KINDS else "internal"
    return worker_pb2.WorkerError(code=known, message=text, retriable=ERROR_KINDS[known].retriable)


def error_output(key: RequestKey, code: str, text: str) -> RequestOutput:
    return RequestOutput(key, finish_reason=FinishReason.ERROR, error_code=code, error_message=text)


def request_from_proto(submit: worker_pb2.Submit) -> EngineRequest:
    """Raises TandemError for what is out of range; the engine itself checks tokens and lengths."""
    sampling = SamplingParams.from_proto(submit.sampling)
    timeout_s = submit.timeout_s if submit.HasField("timeout_s") else None
    ranges = (
        ("request_id", len(submit.key.request_id) <= MAX_NAME),
        ("tenant", len(submit.tenant) <= MAX_NAME),
        ("cache_salt", len(submit.cache_salt) <= MAX_SALT),
        ("timeout_s", timeout_s is None or abs(timeout_s) <= MAX_TIMEOUT_S),
        ("weight", submit.weight == 0.0 or 1 / MAX_WEIGHT <= submit.weight <= MAX_WEIGHT),
        ("pooling", int(submit.pooling) in tuple(map(int, Pooling))),
    )
    for name, fits in ranges:
        if not fits:
            raise TandemError("invalid_request", f"{name} is out of range", param=name)
    sampling.check_ranges()
    return EngineRequest(
        key=key_from_proto(submit.key),
        prompt_token_ids=list(submit.prompt_token_ids),
        sampling=sampling,
        priority=submit.priority,
        deadline=None if timeout_s is None else time.monotonic() + timeout_s,
        cache_salt=submit.cache_salt,
        tenant=submit.tenant or "default",
        weight=submit.weight or 1.0,
        output_token_ids=list(submit.output_token_ids),
        pooling=Pooling(submit.pooling),
        near_allowed=not submit.exact_kv,
    )


def _logprobs_to_proto(entry: TokenLogprobs | None) -> worker_pb2.TokenLogprobs:
    if entry is None:
        return worker_pb2.TokenLogprobs()
    return worker_pb2.TokenLogprobs(
        logprob=entry.logprob, rank=entry.rank, top_ids=entry.top_ids, top_logprobs=entry.top_logprobs
    )


def _logprobs_from_proto(entry: worker_pb2.TokenLogprobs) -> TokenLogprobs:
    return TokenLogprobs(entry.logprob, entry.rank, tuple(entry.top_ids), tuple(entry.top_logprobs))
