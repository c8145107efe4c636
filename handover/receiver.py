"""The receiving end of one connection: one thread that reads frames and calls the sink."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable

from tandem.common.counters import Counters
from tandem.common.seldom import Seldom
from tandem.handover.frames import Ack, Finish, Kind, Open, Rows, checksum
from tandem.handover.handshake import ReceiveChannel, welcome
from tandem.handover.incoming import Incoming, State
from tandem.handover.interfaces import HandoverSettings, KvSink, reason_of
from tandem.handover.registry import StreamRegistry
from tandem.handover.stats import HandoverStats
from tandem.wire.handshake import HandshakeRefused
from tandem.wire.header import Header, ProtocolError
from tandem.wire.link import Link
from tandem.wire.peers import PeerIdentity
from tandem.wire.protocol import Body, Reason

logger = logging.getLogger(__name__)

_TICKS_PER_LEASE = 12
_ACK_AFTER_BYTES = 2 << 20
_GONE = Reason("gone", "the receiver does not want the rows any more")


class Receiver:
    """`run` it once, on a thread of its own. Leases run on a clock that stands still while a frame is read or the sink
    works, so that a slow sink never makes a live sender look dead."""

    def __init__(
        self,
        link: Link,
        identity: PeerIdentity,
        settings: HandoverSettings,
        sink: KvSink,
        registry: StreamRegistry,
        counters: Counters[HandoverStats],
        complaints: Seldom,
        is_stopping: Callable[[], bool],
    ) -> None:
        self._link = link
        self._identity = identity
        self._settings = settings
        self._sink = sink
        self._registry = registry
        self._counters = counters
        self._complaints = complaints
        self._is_stopping = is_stopping
        self._streams: dict[int, Incoming] = {}
        self._last_number = 0
        self._clock = 0.0
        self._consumed = 0
        self._unacknowledged = 0

    def post(self, kind: Kind, stream: int, body: Body | None = None) -> None:
        """Sends, or keeps for the sender to read. From any thread; never waits. Quiet when the connection is gone."""
        self._link.post(kind, stream, body)

    def lose(self, stream: Incoming, reason: Reason) -> None:
        """Ends a stream that will not get all its rows: tells the sender and the sink. From any thread."""
        if self._registry.end(stream, reason.code):
            self.post(Kind.ABORT, stream.number, reason)
            self._report_lost(stream, reason)

    # On the receiver's thread.

    def run(self) -> None:
        """Serves until the sender goes, or the link is shut down. Then all its streams are lost."""
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
            if not self._is_stopping():
                reason = reason_of(error)
                self._complaints.log("a sender's connection ended: %s", reason)
        finally:
            for stream in self._streams.values():
                self.lose(stream, reason)

    def _serve(self, channel: ReceiveChannel) -> None:
        link = self._link
        tick_s = self._settings.lease_s / _TICKS_PER_LEASE
        link.look_every(tick_s)
        expire_at = time.monotonic() + tick_s
        while True:
            waiting_since = time.monotonic()
            readable = link.wait_for_frame(0 if self._unacknowledged else tick_s)
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
        self.post(Kind.ACK, 0, Ack(self._consumed))

    def _receive(self, channel: ReceiveChannel) -> None:
        header, body = self._link.receive()
        if isinstance(body, Rows):
            self._rows(channel, header, body)
            return
        if isinstance(body, Open):
            self._opened(header.id, body, channel.sender_id, channel.transport)
            return
        if header.kind not in (Kind.FINISH, Kind.ABORT, Kind.RENEW):
            raise ProtocolError(f"{header.kind.name} from a sender")
        stream = self._find(header)
        if stream is None:
            return
        if isinstance(body, Finish):
            del self._streams[header.id]
            self._finished(stream, body.payload)
        elif isinstance(body, Reason):
            del self._streams[header.id]
            if self._registry.end(stream, body.code):
                self._report_lost(stream, body)
        else:
            self.post(Kind.RENEW, stream.number)

    def _opened(self, number: int, opened: Open, sender_id: str, transport: str) -> None:
        if number <= self._last_number:
            raise ProtocolError(f"stream {number} opened after stream {self._last_number}")
        self._last_number = number
        stream = Incoming(opened, number, sender_id, transport, self, self._registry)
        admission = self._registry.admit(stream)
        if isinstance(admission, Reason):
            self.post(Kind.REFUSE, number, admission)
            return
        if admission is not None:
            reason = Reason("superseded", f"epoch {opened.epoch} of the request arrived", retriable=False)
            admission.receiver.lose(admission, reason)
        self._streams[number] = stream
        self._renew(stream)
        try:
            self._sink.opened(stream)
        except Exception as error:
            self.lose(stream, self._sink_failed(stream, error))

    def _find(self, header: Header) -> Incoming | None:
        """The open stream of a frame, its lease renewed; None when it has ended."""
        if not 0 < header.id <= self._last_number:
            raise ProtocolError(f"{header.kind.name} for stream {header.id}, which was never opened")
        stream = self._streams.get(header.id)
        if stream is None or stream.state is State.ENDED:
            self._streams.pop(header.id, None)
            return None
        self._renew(stream)
        return stream

    def _renew(self, stream: Incoming) -> None:
        stream.lease_until = self._clock + self._settings.lease_s

    def _rows(self, channel: ReceiveChannel, header: Header, rows: Rows) -> None:
        started = time.perf_counter()
        payload = channel.payload.receive(self._link, header, rows)
        stream = self._find(header)
        if stream is None:
            self._counters.add(late_frames=1)
        else:
            self._deliver(stream, rows, payload, started)
        self._consumed += 1
        if channel.payload.acknowledges:
            self._unacknowledged += rows.length
            if self._unacknowledged >= _ACK_AFTER_BYTES:
                self._acknowledge()

    def _deliver(self, stream: Incoming, rows: Rows, payload: memoryview, started: float) -> None:
        misfit = stream.misfit(rows)
        if misfit:
            self.lose(stream, Reason("range", misfit))
            return
        if checksum(payload) != rows.checksum:
            where = f"rows {rows.start}..{rows.stop} of layer {rows.layer}"
            self.lose(stream, Reason("checksum", f"{where} arrived damaged"))
            return
        try:
            wanted = self._sink.rows(stream.request_id, stream.epoch, rows.layer, rows.start, rows.stop, payload)
            payload.release()  # a sink that kept it must not read what the next frame overwrites
        except Exception as error:
            self.lose(stream, self._sink_failed(stream, error))
            return
        if wanted:
            stream.received_bytes += rows.length
            seconds = time.perf_counter() - started
            self._counters.add(bytes=rows.length, rows=rows.stop - rows.start, frames=1, transfer_s=seconds)
            way = f"{stream.transport}/{stream.codec}"
            self._counters.count("bytes_by_way", way, rows.length)
            self._counters.count("seconds_by_way", way, seconds)
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
            self.post(Kind.ABORT, stream.number, reason)
            self._report_lost(stream, reason)
            return
        if complete:
            self.post(Kind.FINISH_ACK, stream.number)
        else:
            self.post(Kind.ABORT, stream.number, _GONE)

    def _gone(self, stream: Incoming) -> None:
        if self._registry.end(stream, _GONE.code):
            self.post(Kind.ABORT, stream.number, _GONE)

    def _sink_failed(self, stream: Incoming, error: Exception) -> Reason:
        logger.error("the sink failed on stream %s", stream.request_id, exc_info=error)
        self._counters.add(callback_errors=1)
        return Reason("sink", repr(error))

    def _report_lost(self, stream: Incoming, reason: Reason) -> None:
        try:
            self._sink.lost(stream.request_id, stream.epoch, reason)
        except Exception as error:
            self._sink_failed(stream, error)
