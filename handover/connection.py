"""The sending end of one connection: a thread that connects and sends, a thread that listens.

All state is guarded by the lock of `_wake`, which is never held while a callback, a `fill` or a socket call runs. A
stream is `busy` while one of those runs for it; its last callback is made when it is not, so no `fill` runs after it.
"""

from __future__ import annotations

import logging
import threading
import time
from collections import deque
from collections.abc import Callable
from functools import partial

from tandem.common.counters import Counters
from tandem.handover.frames import Accept, Ack, Finish, Kind, Open, Rows, checksum
from tandem.handover.handshake import SendChannel, connect
from tandem.handover.interfaces import HandoverSettings, StreamListener, reason_of
from tandem.handover.stats import HandoverStats
from tandem.handover.stream import Ending, KvStream, PendingRows
from tandem.wire.handshake import HandshakeRefused
from tandem.wire.header import Header, ProtocolError
from tandem.wire.link import Link
from tandem.wire.peers import Endpoint, PeerIdentity
from tandem.wire.protocol import Body, Reason, expect

logger = logging.getLogger(__name__)

RENEWALS_PER_LEASE = 3
_LISTEN_TICK_S = 0.5
_PROGRESS_BYTES = 32 << 10
_FRAME_S = 0.25
_LEAST_FRAME_BYTES = 64 << 10
"""A frame on a link between hosts takes `_FRAME_S` where it can, but is no smaller."""


class ClientConnection:
    """`open` streams, then `start`."""

    def __init__(
        self,
        endpoint: Endpoint,
        identity: PeerIdentity,
        settings: HandoverSettings,
        counters: Counters[HandoverStats],
        on_failed: Callable[[ClientConnection], None],
    ) -> None:
        self.endpoint = endpoint
        self._identity = identity
        self._settings = settings
        self._counters = counters
        self._on_failed = on_failed
        self._wake = threading.Condition(threading.Lock())
        self._streams: dict[int, KvStream] = {}
        self._last_number = 0
        self._control: deque[KvStream] = deque()
        """Streams to announce, or that ended here."""
        self._ready: deque[KvStream] = deque()
        """Accepted streams with items: the next to send from is the first."""
        self._channel: SendChannel | None = None
        self._frame_bytes = settings.frame_bytes
        """Rows that are sent at a time: on a slow link few, as others wait meanwhile."""
        self._failed: Ending | None = None
        self._sender = threading.Thread(target=self._run, name=f"kv-send-{endpoint.worker_id}", daemon=True)

    def start(self) -> None:
        self._sender.start()

    @property
    def alive(self) -> bool:
        return self._sender.is_alive()

    @property
    def num_streams(self) -> int:
        with self._wake:
            return len(self._streams)

    # From any thread; nothing here waits.

    def open(
        self, request_id: str, epoch: int, num_tokens: int, row_bytes: int, num_layers: int, listener: StreamListener
    ) -> KvStream | None:
        """None: the connection has failed; use a new one."""
        with self._wake:
            if self._failed:
                return None
            self._last_number += 1
            stream = KvStream(self, self._last_number, request_id, epoch, num_tokens, row_bytes, num_layers, listener)
            if len(self._streams) < self._settings.max_streams:
                self._streams[stream.number] = stream
            else:
                reason = Reason("overloaded", f"{len(self._streams)} streams are open to {self.endpoint.worker_id!r}")
                stream.ending = Ending(reason, refused=True)
            self._control.append(stream)
            self._wake.notify()
            return stream

    def enqueue(self, stream: KvStream, item: PendingRows | bytes) -> None:
        """Queues rows, or the finish payload, of `stream`. Raises ValueError after the finish."""
        with self._wake:
            if stream.ending:
                return
            if stream.finishing:
                raise ValueError(f"stream {stream.request_id!r} is finished already")
            stream.finishing = isinstance(item, bytes)
            stream.items.append(item)
            self._make_ready(stream)

    def abort(self, stream: KvStream, reason: Reason) -> None:
        """Ends `stream` here; the receiver is told."""
        with self._wake:
            if self._mark_ended(stream, Ending(reason)):
                self._control.append(stream)
                self._wake.notify()

    def close(self) -> None:
        """Ends all streams as lost, and both threads. Waits for a callback, a `fill` or a connect that is running."""
        self._fail(Ending(Reason("shutdown", "this worker is stopping")))
        self._sender.join()

    # With the lock held.

    def _make_ready(self, stream: KvStream) -> None:
        if stream.accepted and stream.items and not stream.queued:
            stream.queued = True
            self._ready.append(stream)
            self._wake.notify()

    def _mark_ended(self, stream: KvStream, ending: Ending) -> bool:
        if stream.ending:
            return False
        stream.ending = ending
        stream.items.clear()
        self._streams.pop(stream.number, None)
        return True

    # Without the lock.

    def _end(self, stream: KvStream, ending: Ending) -> None:
        with self._wake:
            self._mark_ended(stream, ending)
        self._tell(stream)

    def _leave(self, stream: KvStream) -> None:
        with self._wake:
            stream.busy -= 1
        self._tell(stream)

    def _tell(self, stream: KvStream) -> None:
        """Makes the last callback, once, if the stream has ended and nothing runs for it."""
        with self._wake:
            ending = stream.ending
            if ending is None or stream.busy or stream.told:
                return
            stream.told = True
        self._counters.count("outcomes", ending.outcome)
        self._guarded(stream, lambda: ending.tell(stream.listener))

    def _guarded(self, stream: KvStream, callback: Callable[[], None]) -> None:
        try:
            callback()
        except Exception:
            logger.exception("the listener of stream %s failed", stream.request_id)
            self._counters.add(callback_errors=1)

    def _fail(self, ending: Ending) -> None:
        """Ends every stream. Only the first call counts."""
        with self._wake:
            if self._failed:
                return
            self._failed = ending
            streams = list(self._streams.values())
            channel = self._channel
            self._wake.notify()
        if channel:
            channel.link.shutdown()
        self._on_failed(self)
        for stream in streams:
            self._end(stream, ending)

    # On the sender thread.

    def _run(self) -> None:
        try:
            channel = connect(self.endpoint, self._identity, self._settings)
        except HandshakeRefused as error:
            self._fail(Ending(error.reason, refused=True))
        except OSError as error:
            self._fail(Ending(Reason("unreachable", str(error))))
        except Exception as error:
            logger.exception("connecting to %s failed", self.endpoint)
            self._fail(Ending(Reason("unreachable", repr(error))))
        else:
            with self._wake:
                self._channel = channel
            try:
                self._serve(channel)
            finally:
                with self._wake:
                    self._channel = None
                channel.close()
        while self._control:  # ended here, with no connection to say so on
            self._tell(self._control.popleft())

    def _serve(self, channel: SendChannel) -> None:
        listener = threading.Thread(
            target=self._listen, args=(channel,), name=f"kv-listen-{self.endpoint.worker_id}", daemon=True
        )
        listener.start()
        try:
            self._send_until_failed(channel)
        except Exception as error:
            self._fail(Ending(reason_of(error)))
        finally:
            channel.link.shutdown()
            listener.join()

    def _send_until_failed(self, channel: SendChannel) -> None:
        # Renewals are echoed, so they also tell this side that the receiver is there.
        renew_every_s = min(channel.lease_s, self._settings.stall_timeout_s) / RENEWALS_PER_LEASE
        renew_at = time.monotonic() + renew_every_s
        while True:
            step: Callable[[], None] | None
            with self._wake:
                if self._failed:
                    return
                now = time.monotonic()
                if now >= renew_at:
                    renew_at = now + renew_every_s
                    numbers = [stream.number for stream in self._streams.values() if stream.announced]
                    step = partial(self._renew, channel, numbers)
                elif self._control:
                    step = self._next_control(channel)
                else:
                    step = self._next_item(channel)
                    if step is None:
                        self._wake.wait(renew_at - now)
                        continue
            step()

    def _next_control(self, channel: SendChannel) -> Callable[[], None]:
        """Announces a stream, or says that it was aborted. With the lock held."""
        stream = self._control.popleft()
        stream.busy += 1
        if stream.ending is None:
            stream.announced = True
            return partial(self._announce, channel, stream)
        return partial(self._say_aborted, channel, stream, stream.ending.reason if stream.announced else None)

    def _next_item(self, channel: SendChannel) -> Callable[[], None] | None:
        """One frame of the first ready stream, which then queues up again behind the others. With the lock held."""
        while self._ready:
            stream = self._ready[0]
            item = stream.peek(max(self._frame_bytes // stream.row_bytes, 1))
            region = memoryview(b"")
            if isinstance(item, PendingRows):
                free = channel.payload.reserve((item.stop - item.start) * stream.row_bytes)
                if free is None:
                    return None
                region = free
            self._ready.popleft()
            stream.queued = False
            if item is None:
                continue
            stream.advance(item)
            self._make_ready(stream)
            stream.busy += 1
            if isinstance(item, PendingRows):
                return partial(self._send_rows, channel, stream, item, region)
            return partial(self._send_finish, channel, stream, item)
        return None

    def _renew(self, channel: SendChannel, numbers: list[int]) -> None:
        for number in numbers:
            channel.link.send(Kind.RENEW, number)

    def _announce(self, channel: SendChannel, stream: KvStream) -> None:
        try:
            body = Open(stream.request_id, stream.epoch, stream.num_tokens, stream.row_bytes, stream.num_layers)
            channel.link.send(Kind.OPEN, stream.number, body)
        finally:
            self._leave(stream)

    def _say_aborted(self, channel: SendChannel, stream: KvStream, reason: Reason | None) -> None:
        try:
            if reason is not None:
                channel.link.send(Kind.ABORT, stream.number, reason)
        finally:
            self._leave(stream)

    def _send_rows(self, channel: SendChannel, stream: KvStream, piece: PendingRows, region: memoryview) -> None:
        started = time.perf_counter()
        try:
            try:
                piece.fill(piece.start, piece.stop, region)
            except Exception as error:
                logger.exception("reading rows of stream %s failed", stream.request_id)
                self._counters.add(callback_errors=1)
                with self._wake:
                    channel.payload.cancel()
                self.abort(stream, Reason("source", repr(error)))
                return
            rows = Rows(piece.layer, piece.start, piece.stop, len(region), checksum(region), channel.payload.offset)
            channel.payload.send(channel.link, stream.number, rows, region)
        finally:
            self._leave(stream)
        seconds = time.perf_counter() - started
        self._counters.add(bytes=len(region), rows=piece.stop - piece.start, frames=1, transfer_s=seconds)
        if channel.transport == "tcp":
            self._fit_frames(channel.link, len(region) / max(seconds, 1e-6))
        way = f"{channel.transport}/raw"
        self._counters.count("bytes_by_way", way, len(region))
        self._counters.count("seconds_by_way", way, seconds)

    def _fit_frames(self, link: Link, bytes_per_s: float) -> None:
        """Goes halfway from the present size of frames to what takes `_FRAME_S`."""
        most, was = self._settings.frame_bytes, self._frame_bytes
        wanted = max((was + bytes_per_s * _FRAME_S) / 2, _LEAST_FRAME_BYTES)
        self._frame_bytes = round(min(wanted, most))
        if self._frame_bytes < most == was:
            link.is_slow()

    def _send_finish(self, channel: SendChannel, stream: KvStream, payload: bytes) -> None:
        try:
            channel.link.send(Kind.FINISH, stream.number, Finish(payload))
        finally:
            self._leave(stream)

    # On the listener thread.

    def _listen(self, channel: SendChannel) -> None:
        tick_s = min(_LISTEN_TICK_S, self._settings.stall_timeout_s / 4)
        heard, taken = time.monotonic(), 0
        try:
            channel.link.look_every(tick_s)
            while True:
                if channel.link.wait_for_frame(tick_s):
                    self._receive(channel)
                    heard = time.monotonic()
                elif not self.num_streams:
                    heard = time.monotonic()
                elif self._crawls(channel.link, taken):  # Renew waits behind rows
                    heard, taken = time.monotonic(), channel.link.on_its_way()[0]
                elif time.monotonic() - heard > self._settings.stall_timeout_s:
                    raise TimeoutError(f"the receiver was silent for {self._settings.stall_timeout_s} s")
        except Exception as error:
            self._fail(Ending(reason_of(error)))

    @staticmethod
    def _crawls(link: Link, taken: int) -> bool:
        """Whether a slow link has brought the peer's host more than `taken` bytes, and more are on their way. What a
        peer that hangs gets is little (Renew) or comes to an end (its buffers)."""
        got, waiting = link.on_its_way()
        return waiting > 0 and got - taken >= _PROGRESS_BYTES

    def _receive(self, channel: SendChannel) -> None:
        header, body = channel.link.receive()
        if isinstance(body, Ack):
            with self._wake:
                channel.payload.credit(body.consumed)
                self._wake.notify()
            return
        if header.kind is Kind.REFUSE and header.id == 0:
            self._fail(Ending(expect(body, Reason), refused=True))
            return
        with self._wake:
            if not 0 < header.id <= self._last_number:
                raise ProtocolError(f"{header.kind.name} for stream {header.id}, which was never opened")
            stream = self._streams.get(header.id)
        if stream is not None:
            self._receive_for(stream, header, body)

    def _receive_for(self, stream: KvStream, header: Header, body: Body) -> None:
        if isinstance(body, Accept):
            self._accepted(stream, body.skip_tokens)
        elif isinstance(body, Reason):
            self._end(stream, Ending(body, refused=header.kind is Kind.REFUSE))
        elif header.kind is Kind.FINISH_ACK:
            if not stream.finishing or stream.items:
                raise ProtocolError("a FinishAck before the Finish")
            self._end(stream, Ending(None))
        elif header.kind is not Kind.RENEW:
            raise ProtocolError(f"{header.kind.name} from a receiver")

    def _accepted(self, stream: KvStream, skip_tokens: int) -> None:
        with self._wake:
            if stream.accepted or skip_tokens > stream.num_tokens:
                raise ProtocolError(
                    f"an Accept that skips {skip_tokens} of {stream.num_tokens} tokens, or a second one"
                )
            if stream.ending:
                return
            stream.accepted = True
            stream.skip_tokens = skip_tokens
            stream.busy += 1
            self._make_ready(stream)
        self._guarded(stream, lambda: stream.listener.on_accept(skip_tokens))
        self._leave(stream)
