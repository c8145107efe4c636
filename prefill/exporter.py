"""Sends the KV of prefill requests to their decode workers, layer by layer while the engine still computes.

One `_Export` per request stands between three threads: the event loop opens the stream when the request arrives (so
that the decode worker can reserve blocks at once), the engine thread announces rows, and connection threads of the
transport copy them out of the pool. The stream's one last callback releases the engine's blocks.
"""

from __future__ import annotations

import logging
import math
import threading
import time
from collections.abc import Sequence
from typing import Protocol

import torch

from tandem.common.errors import TandemError
from tandem.engine.model.batch import KvPool
from tandem.engine.request import EngineRequest, RequestKey, RequestOutput
from tandem.handover import Endpoint, KvClient, KvStream, Reason, local_host_id
from tandem.proto import worker_pb2
from tandem.worker.wire import pack_first

log = logging.getLogger(__name__)


class ReleasingEngine(Protocol):
    """What the exporter needs of engine.Engine."""

    @property
    def pool(self) -> KvPool: ...

    def release(self, key: RequestKey, error: str = "") -> None: ...


class Exporter:
    """The `Handover` of a prefill worker."""

    def __init__(self, engine: ReleasingEngine, transport: KvClient, worker_id: str) -> None:
        self.engine = engine
        self.worker_id = worker_id
        self._transport = transport
        self._exports: dict[RequestKey, _Export] = {}
        self._lock = threading.Lock()

    def attach(self, request: EngineRequest, submit: worker_pb2.Submit) -> None:
        """Opens a stream to the decode worker that `submit` names, and gives `request` the export that fills it. On the
        event loop. Raises TandemError `invalid_request` without such a worker, `unavailable` where no stream can be
        opened."""
        if submit.WhichOneof("handover") != "send_kv_to":
            raise TandemError("invalid_request", "a prefill worker needs send_kv_to: it cannot decode")
        target = submit.send_kv_to
        endpoint = Endpoint(
            worker_id=target.worker_id,
            worker_epoch=target.worker_epoch,
            host_id=target.host_id,
            unix_path=target.unix_path,
            host=target.host,
            port=target.port,
        )
        key, pool = request.key, self.engine.pool
        export = _Export(self, key, submit.handover_limit_s)
        with self._lock:
            self._exports[key] = export
        try:
            export.stream = self._transport.open(
                endpoint, *key, len(request.token_ids), pool.row_bytes, pool.num_layers, export
            )
        except (ValueError, RuntimeError) as error:
            self.forget(key)
            raise TandemError("unavailable", f"the hand-over cannot be opened: {error}") from error
        request.kv_export = export
        request.near_allowed = request.near_allowed and target.near_allowed

    def ended(self, key: RequestKey) -> None:
        """Aborts the export of a request that is over, if it has not been sent by then. For any thread."""
        with self._lock:
            export = self._exports.get(key)
        if export is not None:
            export.aborted("the request ended")

    def expire(self) -> None:
        """Gives up hand-overs that take too long. Called a few times a second, on the event loop."""
        now = time.monotonic()
        with self._lock:
            exports = list(self._exports.values())
        for export in exports:
            export.expire(now)

    def peer_lost(self, key: RequestKey, reason: str) -> None:
        log.warning("%s: handover_lost is meant for decode workers (%s)", key.request_id, reason)

    def forget(self, key: RequestKey) -> None:
        with self._lock:
            self._exports.pop(key, None)


class _Export:
    """One request. `KvExport` for the engine, `StreamListener` for the transport."""

    stream: KvStream
    """Set right after it is opened, before the engine knows the request."""

    def __init__(self, exporter: Exporter, key: RequestKey, limit_s: float) -> None:
        """`limit_s`: see `Submit.handover_limit_s`."""
        self._exporter = exporter
        self._limit_s = limit_s
        self._gives_up_at = math.inf
        self._key = key
        self._pool = exporter.engine.pool
        self._slots = torch.empty(0, dtype=torch.int64)
        self._ended: str | None = None
        """The error of a stream that is over; empty: none."""
        self._accepted_at: float | None = None

    # KvExport: engine thread

    def begin(self, key: RequestKey, tokens: Sequence[int], slots: Sequence[int], cached_tokens: int) -> None:
        """Takes the request's KV slots (one per token) and sends the rows of the `cached_tokens` leading tokens, which
        are there already. On the engine's thread."""
        if self._ended is not None:
            # The stream was over before the engine knew the request, so the release meant nothing to it then.
            self._exporter.engine.release(key, self._ended)
        self._slots = torch.tensor(slots, dtype=torch.int64).to(self._pool.storage.device)
        for layer in range(self._pool.num_layers):
            self.layer_ready(layer, 0, cached_tokens)

    def layer_ready(self, layer: int, start: int, stop: int) -> None:
        """Sends the rows of tokens `start` to `stop` of one layer, which has just been computed. On the engine's
        thread."""
        pool, slots = self._pool, self._slots

        def fill(start: int, stop: int, out: memoryview) -> None:
            pool.read_rows(layer, slots[start:stop], out)

        self.stream.send_layer(layer, start, stop, fill)

    def finished(self, output: RequestOutput) -> None:
        if output.prompt is not None:
            output.prompt.computed_by = self._exporter.worker_id
        now, accepted_at = time.monotonic(), self._accepted_at
        since_accept_s = 0.0 if accepted_at is None else now - accepted_at
        self.stream.finish(pack_first(output, local_host_id(), now, since_accept_s))
        if self._limit_s:
            self._gives_up_at = now + self._limit_s

    # Event loop

    def expire(self, now: float) -> None:
        if now >= self._gives_up_at:
            self._gives_up_at = math.inf
            self.stream.abort(Reason("slow", f"the KV was not there {self._limit_s:.1f} s after the first token"))

    # Any thread

    def aborted(self, reason: str) -> None:
        self.stream.abort(Reason("aborted", reason))

    # StreamListener: connection threads. No row is read after the last of these, so blocks may go.

    def on_accept(self, skip_tokens: int) -> None:
        self._accepted_at = time.monotonic()

    def on_done(self) -> None:
        self._release("")

    def on_refuse(self, reason: Reason) -> None:
        self._release(f"the decode worker refused the KV: {reason}")

    def on_lost(self, reason: Reason) -> None:
        self._release(f"the hand-over failed: {reason}")

    def _release(self, error: str) -> None:
        """Ends the request with `worker_lost` if there is an error and it has not ended yet."""
        self._ended = error
        self._exporter.forget(self._key)
        self._exporter.engine.release(self._key, error)
