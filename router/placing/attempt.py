"""One attempt at one sequence: submitted to its decode worker and, with a hand-over, to its prefill worker at once.

Tokens come from the decode worker alone. Whatever happens to the prefill side, the decode side hears `HandoverLost`
and computes the prompt itself, so it never fails a request. What becomes of an attempt is what is known of the health
of its workers.
"""

from __future__ import annotations

import logging
import time
from typing import Protocol

from tandem.proto import worker_pb2
from tandem.router.fleet.session import WorkerSession
from tandem.router.placing.placement import Placement

log = logging.getLogger(__name__)

FAULT = "internal"
"""The error code that speaks against the worker."""
DOUBT = "computation_failed"
"""The request's own fault or the worker's. The others are refusals, or the request's own fault."""


class Listener(Protocol):
    """Who hears of an attempt, on the event loop."""

    def on_output(self, output: worker_pb2.RequestOutput) -> None:
        """An output of the decode worker; with a finish_reason it is the last call."""

    def on_worker_lost(self, reason: str) -> None:
        """The decode worker is gone; the last call."""


class Attempt:
    """One start of a sequence on its workers, until the decode worker finishes it or is lost."""

    def __init__(
        self,
        message: worker_pb2.SessionRequest,
        decode: WorkerSession,
        prefill: WorkerSession | None,
        listener: Listener,
        placement: Placement,
    ) -> None:
        """The Submit in `message` lacks the hand-over; this fills it in for each side and sends. `placement`: why these
        workers."""
        self.key = message.submit.key
        self.decode = decode
        self.prefill = prefill
        self.placement = placement
        self._listener = listener
        self._started = time.monotonic()
        self._answered = False
        self._tenant = message.submit.tenant
        self._prefill_doubted = False
        """It could not compute the prompt: its own fault if the decode worker can."""
        self._prefill_heard = False
        """The prefill worker has said itself that there will be no hand-over, or was lost."""
        decode.health.started(self._started)
        if prefill is None:
            decode.submit(message, self)
            return
        prefill.health.started(self._started)
        to_decode = worker_pb2.SessionRequest()
        to_decode.CopyFrom(message)
        to_decode.submit.expect_kv.worker_id = prefill.info.worker_id
        to_decode.submit.expect_kv.worker_epoch = prefill.info.worker_epoch
        decode.submit(to_decode, self)
        message.submit.send_kv_to.CopyFrom(decode.info.kv_endpoint)
        prefill.submit(message, _PrefillSide(self))

    def cancel(self) -> None:
        """Frees the request on both workers. Idempotent."""
        self.decode.cancel(self.key)
        self._cancel_prefill()

    def on_output(self, output: worker_pb2.RequestOutput) -> None:
        """Hands an output of the decode worker to the listener; an error that is the worker's fault counts against its
        health."""
        if not self._answered and not output.preempted:
            self._note_answer(output)
        if output.finish_reason:
            if output.error.code == FAULT:
                note_failure(self.decode)
            elif output.error.code == DOUBT and self.decode.health.doubted(time.monotonic(), self._tenant):
                _warn(self.decode)
            self._cancel_prefill()
        self._listener.on_output(output)

    def on_lost(self, reason: str) -> None:
        self._cancel_prefill()
        self._listener.on_worker_lost(reason)

    def handover_failed(self, reason: str, *, doubted: bool = False) -> None:
        self._prefill_doubted = doubted
        self._prefill_heard = True
        self.decode.handover_lost(self.key, reason)

    def _note_answer(self, output: worker_pb2.RequestOutput) -> None:
        if output.finish_reason in (worker_pb2.FINISH_REASON_ERROR, worker_pb2.FINISH_REASON_CANCELLED):
            return
        self._answered = True
        now = time.monotonic()
        ttft_s = now - self._started
        if self.prefill is None:
            self.decode.health.answered(now, ttft_s)
            return
        self.decode.health.answered(now)
        if not self._prefill_heard:
            if output.prompt.recompute_reason.startswith("slow: "):
                pass  # the link's fault, and the model of its costs has learned of it
            elif output.prompt.recompute_reason:
                note_failure(self.prefill)
            else:
                self.prefill.health.answered(now, ttft_s)
        elif self._prefill_doubted:
            note_failure(self.prefill)

    def _cancel_prefill(self) -> None:
        if self.prefill is not None:
            self.prefill.cancel(self.key)


class _PrefillSide:
    def __init__(self, attempt: Attempt) -> None:
        self._attempt = attempt

    def on_output(self, output: worker_pb2.RequestOutput) -> None:
        """Hears how the prefill ended; unless the KV was handed over, the decode worker is told to compute the
        prompt."""
        if output.finish_reason in (worker_pb2.FINISH_REASON_UNSPECIFIED, worker_pb2.FINISH_REASON_HANDED_OVER):
            return
        if output.error.code == FAULT and self._attempt.prefill is not None:
            note_failure(self._attempt.prefill)
        doubted = output.error.code == DOUBT
        self._attempt.handover_failed(f"{output.error.code}: {output.error.message}"[:200], doubted=doubted)

    def on_lost(self, reason: str) -> None:
        self._attempt.handover_failed(reason)


def note_failure(session: WorkerSession) -> None:
    if session.health.failed(time.monotonic()):
        _warn(session)


def _warn(session: WorkerSession) -> None:
    log.warning("worker %s gets no requests for a while: %s", session.name, session.health.problem)
