"""Receives KV for requests of this decode worker: matches streams with reservations, whichever comes first.

A hand-over has three parts that arrive on three threads: the router's Submit (event loop), the engine's reservation
(engine thread) and the prefill worker's stream (a connection thread). `_Import` collects them. Rows then go straight
from the transport into reserved blocks. Whatever goes wrong becomes `reservation.fail`: the engine computes the
prompt itself.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable
from typing import Protocol

from tandem.common.errors import TandemError
from tandem.engine.request import EngineRequest, KvReservation, RequestKey, RequestOutput
from tandem.handover import Incoming, Reason, local_host_id
from tandem.proto import worker_pb2
from tandem.worker.wire import unpack_first

log = logging.getLogger(__name__)

MAX_UNCLAIMED = 1024
"""Streams that wait for their Submit; further ones are refused."""

_GONE = Reason("gone", "the decode worker does not wait for this request")


class ClosableServer(Protocol):
    """What the importer needs of the transport's KvServer."""

    def close_stream(self, request_id: str, epoch: int, reason: Reason) -> bool: ...


class Importer:
    """The `Handover` of a decode worker, and the `KvSink` of its transport server."""

    server: ClosableServer
    """Set once, before the transport server starts."""

    def __init__(
        self,
        *,
        row_bytes: int,
        num_layers: int,
        timeout_s: float,
        near_allowed: bool = False,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """`timeout_s`: how long a request waits for its stream to open, and a stream for its request. An open stream
        is watched by the transport's lease. `near_allowed`: also take KV that is not exact."""
        self._row_bytes = row_bytes
        self._num_layers = num_layers
        self._timeout_s = timeout_s
        self._near_allowed = near_allowed
        self._clock = clock
        self._lock = threading.Lock()
        self._imports: dict[RequestKey, _Import] = {}
        self._unclaimed: dict[RequestKey, tuple[Incoming, float]] = {}

    # Handover: event loop

    def attach(self, request: EngineRequest, submit: worker_pb2.Submit) -> None:
        """Gives `request` the import through which its KV will come, if the router has announced a hand-over. On the
        event loop. Raises TandemError `invalid_request` where the message is meant for a prefill worker."""
        match submit.WhichOneof("handover"):
            case None:
                return
            case "send_kv_to":
                raise TandemError("invalid_request", "send_kv_to is for prefill workers")
        key = request.key
        entry = _Import(self, key, submit.expect_kv.worker_id, len(request.token_ids), self._clock() + self._timeout_s)
        with self._lock:
            self._imports[key] = entry
            early = self._unclaimed.pop(key, None)
        if early is not None:
            entry.stream_opened(early[0])
        request.kv_import = entry

    def ended(self, key: RequestKey) -> None:
        """Closes the import of a request that is over, if it has one. For any thread."""
        with self._lock:
            entry = self._imports.get(key)
        if entry is not None:
            entry.closed()

    def peer_lost(self, key: RequestKey, reason: str) -> None:
        """Fails the import of a request whose prefill worker is gone: the prompt is then computed here. For any
        thread."""
        with self._lock:
            entry = self._imports.get(key)
        if entry is not None:
            entry.fail(reason)

    def expire(self) -> None:
        """Gives up what has waited too long. Called a few times a second."""
        now = self._clock()
        with self._lock:
            late = [key for key, (_, expires) in self._unclaimed.items() if expires <= now]
            strays = [self._unclaimed.pop(key)[0] for key in late]
            entries = list(self._imports.values())
        for stream in strays:
            stream.refuse(_GONE)
        for entry in entries:
            entry.expire(now)

    # KvSink: connection threads

    def opened(self, stream: Incoming) -> None:
        """Takes a stream that a prefill worker has opened. Where its request is not known yet the stream waits, among
        `MAX_UNCLAIMED` at the most; beyond them it is refused. On the transport's thread."""
        key = RequestKey(stream.request_id, stream.epoch)
        with self._lock:
            entry = self._imports.get(key)
            room = len(self._unclaimed) < MAX_UNCLAIMED
            if entry is None and room:
                self._unclaimed[key] = (stream, self._clock() + self._timeout_s)
        if entry is not None:
            entry.stream_opened(stream)
        elif not room:
            stream.refuse(Reason("overloaded", f"{MAX_UNCLAIMED} streams wait for their requests already"))

    def rows(self, request_id: str, epoch: int, layer: int, start: int, stop: int, payload: memoryview) -> bool:
        entry = self._imports.get(RequestKey(request_id, epoch))
        reservation = entry.reservation if entry is not None else None
        return reservation is not None and reservation.write(layer, start, stop, payload)

    def finished(self, request_id: str, epoch: int, payload: bytes) -> bool:
        entry = self._imports.get(RequestKey(request_id, epoch))
        return entry is not None and entry.complete(payload)

    def lost(self, request_id: str, epoch: int, reason: Reason) -> None:
        """Forgets a stream that ended before its time, and fails the import that it belongs to. On the transport's
        thread."""
        key = RequestKey(request_id, epoch)
        with self._lock:
            self._unclaimed.pop(key, None)
            entry = self._imports.get(key)
        if entry is not None:
            entry.fail(str(reason), stream_open=False)

    # For _Import

    def check_shape(self, stream: Incoming, num_tokens: int) -> str:
        """Why `stream` does not fit a prompt of `num_tokens`; empty if it does."""
        offered = (stream.num_tokens, stream.row_bytes, stream.num_layers)
        wanted = (num_tokens, self._row_bytes, self._num_layers)
        if offered == wanted:
            return ""
        return f"the stream has (tokens, row bytes, layers) {offered}, the request {wanted}"

    def read_first(self, payload: bytes, accepted_at: float) -> RequestOutput:
        """The first token, in its message; its stream was accepted at `accepted_at`. Raises ValueError where it cannot
        be read, or depends on KV that is not exact and not allowed here: prefill workers are told so (`KvEndpoint`),
        but who sends it is another process."""
        first = unpack_first(payload, local_host_id(), time.monotonic(), accepted_at)
        if first.prompt is not None and first.prompt.inexact_from is not None and not self._near_allowed:
            raise ValueError(f"KV from token {first.prompt.inexact_from} on is not exact; kv_near is not set here")
        return first

    def forget(self, key: RequestKey) -> None:
        with self._lock:
            self._imports.pop(key, None)


class _Import:
    """One expected hand-over; the `KvImport` of its request. Ends in `complete`, `fail` or `closed`."""

    def __init__(self, importer: Importer, key: RequestKey, source: str, num_tokens: int, expires: float) -> None:
        self.reservation: KvReservation | None = None
        self._importer = importer
        self._key = key
        self._source = source
        self._num_tokens = num_tokens
        self._expires = expires
        self._lock = threading.Lock()
        self._stream: Incoming | None = None
        self._accepted_at: float | None = None
        self._failed = ""
        self._over = False
        """No stream is wanted any more: completed, failed or closed."""

    # KvImport: engine thread

    def reserved(self, reservation: KvReservation) -> None:
        """Takes the memory that the engine has reserved for the KV; the stream is accepted once both are there. On the
        engine's thread."""
        with self._lock:
            self.reservation = reservation
            failed = self._failed
        if failed:
            reservation.fail(failed)
        else:
            self._accept_if_ready()

    def closed(self) -> None:
        self._importer.forget(self._key)
        if self._end(""):
            self._importer.server.close_stream(*self._key, _GONE)

    # Transport and event loop

    def stream_opened(self, stream: Incoming) -> None:
        """Takes the stream, or refuses it where its shape or sender is wrong or the import is over; a wrong one also
        fails the import."""
        problem = self._importer.check_shape(stream, self._num_tokens)
        if not problem and stream.sender_id != self._source:
            problem = f"the stream is from {stream.sender_id}, expected was {self._source}"
        with self._lock:
            wanted = not self._over and self._stream is None and not problem
            if wanted:
                self._stream = stream
        if wanted:
            self._accept_if_ready()
            return
        stream.refuse(Reason("range", problem, retriable=False) if problem else _GONE)
        if problem:
            self.fail(problem, stream_open=False)

    def complete(self, payload: bytes) -> bool:
        """Completes the reservation with the first token, which `payload` holds. False: the import is over already, or
        the payload cannot be read, and then the prompt is computed here."""
        reservation = self.reservation
        if reservation is None or not self._end(""):
            return False
        try:
            reservation.complete(self._read_first(payload))
        except ValueError as error:
            reason = f"the hand-over is not usable: {error}"
            log.warning("%s: prompt is computed here: %s", self._key.request_id, reason)
            reservation.fail(reason)
            return False
        return True

    def _read_first(self, payload: bytes) -> RequestOutput:
        stream, accepted_at = self._stream, self._accepted_at
        if stream is None or accepted_at is None:
            raise ValueError("there is no stream that was accepted")
        first = self._importer.read_first(payload, accepted_at)
        if first.prompt is not None:
            first.prompt.handover_bytes = stream.received_bytes
            first.prompt.handover_transport = stream.transport
            first.prompt.handover_codec = stream.codec

        return first

    def fail(self, reason: str, *, stream_open: bool = True) -> None:
        """The KV will not come, or is not wanted from there any more. Idempotent."""
        had_stream = self._stream is not None
        if not self._end(reason):
            return
        log.info("%s: prompt is computed here: %s", self._key.request_id, reason)
        if had_stream and stream_open:
            self._importer.server.close_stream(*self._key, _GONE)
        if self.reservation is not None:
            self.reservation.fail(reason)

    def expire(self, now: float) -> None:
        if self._stream is None and now >= self._expires:
            self.fail(f"unreachable: nothing came from prefill worker {self._source}")

    def _end(self, failed: str) -> bool:
        """Whether this call ended it."""
        with self._lock:
            if self._over:
                return False
            self._over = True
            self._failed = failed
            return True

    def _accept_if_ready(self) -> None:
        with self._lock:
            reservation, stream = self.reservation, self._stream
            if reservation is None or stream is None or self._accepted_at is not None or self._over:
                return
            self._accepted_at = time.monotonic()
        stream.accept(reservation.skip_tokens)
