"""One attempt at one sequence: submitted to its decode worker and, with a hand-over, to its prefill worker at once.

Tokens come from the decode worker alone. Whatever happens to the prefill side, the decode side hears `HandoverLost`
and computes the prompt itself, so it never fails a request.
"""

from __future__ import annotations

from typing import Protocol

from tandem.proto import worker_pb2
from tandem.router.session import WorkerSession


class Listener(Protocol):
    def on_output(self, output: worker_pb2.RequestOutput) -> None:
        """An output of the decode worker; with a finish_reason it is the last call."""

    def on_worker_lost(self, reason: str) -> None:
        """The decode worker is gone; the last call."""


class Attempt:
    def __init__(
        self, submit: worker_pb2.Submit, decode: WorkerSession, prefill: WorkerSession | None, listener: Listener
    ) -> None:
        """`submit` lacks the hand-over; this fills it in for each side and sends."""
        self.key = submit.key
        self.decode = decode
        self.prefill = prefill
        self._listener = listener
        if prefill is None:
            decode.submit(submit, self)
            return
        to_decode = worker_pb2.Submit()
        to_decode.CopyFrom(submit)
        to_decode.expect_kv.worker_id = prefill.info.worker_id
        to_decode.expect_kv.worker_epoch = prefill.info.worker_epoch
        decode.submit(to_decode, self)
        submit.send_kv_to.CopyFrom(decode.info.kv_endpoint)
        prefill.submit(submit, _PrefillSide(self))

    def cancel(self) -> None:
        """Frees the request on both workers. Idempotent."""
        self.decode.cancel(self.key)
        self._cancel_prefill()

    def on_output(self, output: worker_pb2.RequestOutput) -> None:
        if output.finish_reason:
            self._cancel_prefill()
        self._listener.on_output(output)

    def on_lost(self, reason: str) -> None:
        self._cancel_prefill()
        self._listener.on_worker_lost(reason)

    def handover_failed(self, reason: str) -> None:
        self.decode.handover_lost(self.key, reason)

    def _cancel_prefill(self) -> None:
        if self.prefill is not None:
            self.prefill.cancel(self.key)


class _PrefillSide:
    def __init__(self, attempt: Attempt) -> None:
        self._attempt = attempt

    def on_output(self, output: worker_pb2.RequestOutput) -> None:
        if output.finish_reason in (worker_pb2.FINISH_REASON_UNSPECIFIED, worker_pb2.FINISH_REASON_HANDED_OVER):
            return
        self._attempt.handover_failed(f"{output.error.code}: {output.error.message}"[:200])

    def on_lost(self, reason: str) -> None:
        self._attempt.handover_failed(reason)
