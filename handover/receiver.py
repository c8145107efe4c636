"""The receiving end of one connection: one thread that reads frames and calls the sink."""

from __future__ import annotations

import logging
import socket
import threading
import time
from collections.abc import Callable

from tandem.common.seldom import Seldom
from tandem.handover.frames import (
    Frame,
    FrameError,
    Kind,
    Open,
    checksum,
    decode,
    decode_reason,
    encode_reason,
)
from tandem.handover.handshake import HandshakeRefused, ReceiveChannel, welcome
from tandem.handover.incoming import Incoming, State
from tandem.handover.interfaces import KvSink, Reason, TransportSettings
from tandem.handover.link import Link, reason_of
from tandem.handover.registry import StreamRegistry
from tandem.handover.stats import Counters
from tandem.wire.peers import PeerIdentity

logger = logging.getLogger(__name__)

_TICKS_PER_LEASE = 12
_ACK_AFTER_BYTES = 2 << 20
_GONE = Reason("gone", "the receiver does not want the rows any more")


class Receiver:
    """Leases run on a clock that stands still while a frame is read or the sink works, so that a slow sink never
    makes a live sender look dead."""

    def __init__(
        self,
        sock: socket.socket,
        identity: PeerIdentity,
        settings: TransportSettings,
        sink: KvSink,
        registry: StreamRegistry,
        counters: Counters,
        complaints: Seldom,
        on_ended: Callable[[Receiver], None],
    ) -> None:
        self._link = Link(sock, settings.connect_timeout_s)
        self._identity = identity
        self._settings = settings
        self._sink = sink
        self._registry = registry
        self._counters = counters
        self._complaints = complaints
        self._on_ended = on_ended
        self._stopping = False
        self._streams: dict[int, Incoming] = {}
        self._last_number = 0
        self._clock = 0.0
        self._consumed = 0
        self._unacknowledged = 0
        self._thread = threading.Thread(target=self._run, name="kv-receive", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def stop(self) -> None:
        """Loses all streams and ends the thread. Waits for a sink call that is running."""
        self._stopping = True
        self._link.shutdown()
        self._thread.join()

    def turn_away(self, reason: Reason) -> None:
        """Instead of `start`. Says why where it may be anybody."""
        if not self._identity.key:
            self._link.post(Kind.REFUSE, encode_reason(reason))
        self._link.close()

    @property
    def alive(self) -> bool:
        return self._thread.is_alive()

    def post(self, kind: Kind, body: bytes = b"", *, stream: int = 0, start: int = 0, offset: int = 0) -> None:
        """From any thread; never waits. Quiet when the connection is gone."""
        self._link.post(kind, body, stream=stream, start=start, offset=offset)

    def lose(self, stream: Incoming, reason: Reason) -> None:
        """Ends a stream that will not get all its rows: tells the sender and the sink. From any thread."""
        if self._registry.end(stream, reason.code):
            self.post(Kind.ABORT, encode_reason(reason), stream=stream.number)
            self._report_lost(stream, reason)

    # On the receiver's thread.

    def _run(self) -> None:
        reason = Reason("shutdown", "the receiver is stopping")
        try:
            channel = welcome(self._link, self._identity, self._settings)
            try:
                self._serve(channel)
            finally:
                channel.payload.close()
        except HandshakeRefused as error:
            self._complaints.log("refused a connection: %s", error.reason)
        except Exception as error:
            if not self._stopping:
                reason = reason_of(error)
                self._complaints.log("a sender's connection ended: %s", reason)
        finally:
            for stream in self._streams.values():
                self.lose(stream, reason)
            self._link.close()
            self._on_ended(self)

    def _serve(self, channel: ReceiveChannel) -> None:
        link = self._link
        tick_s = self._settings.lease_s / _TICKS_PER_LEASE
        expire_at = time.monotonic() + tick_s
        while True:
            waiting_since = time.monotonic()
            readable = link.wait_readable(0 if self._unacknowledged else tick_s)
            now = time.monotonic()
            # At most a tick: a process that was suspended must not count that time against its senders.
            self._clock += min(now - waiting_since, tick_s)
            if readable:
                self._receive(channel)
            elif self._unacknowledged:
                self._acknowledge()
            if now >= expire_at:
                expire_at = now + tick_s
                self._expire_leases()

    def _expire_leases(self) -> None:
        for number, stream in list(self._streams.items()):
            if stream.state is State.ENDED:
                del self._streams[number]
            elif self._clock > stream.lease_until:
                del self._streams[number]
                self.lose(stream, Reason("lease", f"the sender was silent for {self._settings.lease_s} s"))

    def _acknowledge(self) -> None:
        self._unacknowledged = 0
        self.post(Kind.ACK, offset=self._consumed)

    def _receive(self, channel: ReceiveChannel) -> None:
        frame = self._link.receive()
        if frame.kind is Kind.ROWS:
            self._rows(channel, frame)
            return
        body = self._link.read_body(frame)
        if frame.kind is Kind.OPEN:
            self._opened(frame, decode(body, Open), channel.peer.worker_id)
            return
        if frame.kind not in (Kind.FINISH, Kind.ABORT, Kind.RENEW):
            raise FrameError(f"{frame.kind.name} from a sender")
        stream = self._find(frame)
        if stream is None:
            return
        if frame.kind is Kind.FINISH:
            del self._streams[frame.stream]
            self._finished(stream, bytes(body))
        elif frame.kind is Kind.ABORT:
            del self._streams[frame.stream]
            reason = decode_reason(body)
            if self._registry.end(stream, reason.code):
                self._report_lost(stream, reason)
        else:
            self.post(Kind.RENEW, stream=stream.number)

    def _opened(self, frame: Frame, opened: Open, sender_id: str) -> None:
        if frame.stream <= self._last_number:
            raise FrameError(f"stream {frame.stream} opened after stream {self._last_number}")
        self._last_number = frame.stream
        stream = Incoming(opened, frame.stream, sender_id, self, self._registry)
        admission = self._registry.admit(stream)
        if isinstance(admission, Reason):
            self.post(Kind.REFUSE, encode_reason(admission), stream=frame.stream)
            return
        if admission is not None:
            reason = Reason("superseded", f"epoch {opened.epoch} of the request arrived", retriable=False)
            admission.receiver.lose(admission, reason)
        self._streams[frame.stream] = stream
        self._renew(stream)
        try:
            self._sink.opened(stream)
        except Exception as error:
            self.lose(stream, self._sink_failed(stream, error))

    def _find(self, frame: Frame) -> Incoming | None:
        """The open stream of a frame, its lease renewed; None when it has ended."""
        if not 0 < frame.stream <= self._last_number:
            raise FrameError(f"{frame.kind.name} for stream {frame.stream}, which was never opened")
        stream = self._streams.get(frame.stream)
        if stream is None or stream.state is State.ENDED:
            self._streams.pop(frame.stream, None)
            return None
        self._renew(stream)
        return stream

    def _renew(self, stream: Incoming) -> None:
        stream.lease_until = self._clock + self._settings.lease_s

    def _rows(self, channel: ReceiveChannel, frame: Frame) -> None:
        started = time.perf_counter()
        payload = channel.payload.receive(self._link, frame)
        stream = self._find(frame)
        if stream is None:
            self._counters.late_frame()
        else:
            self._deliver(stream, frame, payload, started)
        self._consumed += 1
        if channel.payload.acknowledges:
            self._unacknowledged += frame.length
            if self._unacknowledged >= _ACK_AFTER_BYTES:
                self._acknowledge()

    def _deliver(self, stream: Incoming, frame: Frame, payload: memoryview, started: float) -> None:
        misfit = stream.misfit(frame)
        if misfit:
            self.lose(stream, Reason("range", misfit))
            return
        if checksum(payload) != frame.checksum:
            where = f"rows {frame.start}..{frame.stop} of layer {frame.layer}"
            self.lose(stream, Reason("checksum", f"{where} arrived damaged"))
            return
        try:
            wanted = self._sink.rows(stream.request_id, stream.epoch, frame.layer, frame.start, frame.stop, payload)
            payload.release()  # a sink that kept it must not read what the next frame overwrites
        except Exception as error:
            self.lose(stream, self._sink_failed(stream, error))
            return
        if wanted:
            self._counters.moved(frame.length, frame.stop - frame.start, time.perf_counter() - started)
        else:
            self._gone(stream)

    def _finished(self, stream: Incoming, payload: bytes) -> None:
        if stream.state is not State.ACCEPTED:
            self.lose(stream, Reason("range", "finished before it was accepted"))
            return
        # Ended first: `finished` may well be the end of the request, and close_stream must then find nothing.
        if not self._registry.end(stream, "done"):
            return
        try:
            complete = self._sink.finished(stream.request_id, stream.epoch, payload)
        except Exception as error:
            reason = self._sink_failed(stream, error)
            self.post(Kind.ABORT, encode_reason(reason), stream=stream.number)
            self._report_lost(stream, reason)
            return
        if complete:
            self.post(Kind.FINISH_ACK, stream=stream.number)
        else:
            self.post(Kind.ABORT, encode_reason(_GONE), stream=stream.number)

    def _gone(self, stream: Incoming) -> None:
        if self._registry.end(stream, _GONE.code):
            self.post(Kind.ABORT, encode_reason(_GONE), stream=stream.number)

    def _sink_failed(self, stream: Incoming, error: Exception) -> Reason:
        logger.error("the sink failed on stream %s", stream.request_id, exc_info=error)
        self._counters.callback_error()
        return Reason("sink", repr(error))

    def _report_lost(self, stream: Incoming, reason: Reason) -> None:
        try:
            self._sink.lost(stream.request_id, stream.epoch, reason)
        except Exception as error:
            self._sink_failed(stream, error)
