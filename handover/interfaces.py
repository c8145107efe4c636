"""What the workers plug into the transport, its settings, and why a stream ended."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

from tandem.wire.header import ProtocolError
from tandem.wire.link import Patience
from tandem.wire.protocol import Reason

if TYPE_CHECKING:
    from tandem.handover.server import Incoming

logger = logging.getLogger(__name__)

Fill = Callable[[int, int, memoryview], None]
"""fill(start, stop, out) writes rows [start, stop) to `out`, (stop - start) * row_bytes bytes. Runs on a sender
thread, between `send_layer` and the stream's last callback."""


def reason_of(error: Exception) -> Reason:
    """What the streams of a connection that broke with `error` are told.

    Codes made in this package: checksum, duplicate, gone, incompatible, internal, lease, overloaded, peer_closed,
    protocol, range, shutdown, sink, source, stalled, superseded, unproven, unreachable. Workers add their own with
    `abort`, `refuse` and `close_stream`.
    """
    if isinstance(error, ProtocolError):
        return Reason("protocol", str(error))
    if isinstance(error, TimeoutError):
        return Reason("stalled", str(error))
    if isinstance(error, OSError):
        return Reason("peer_closed", str(error))
    logger.error("a connection failed", exc_info=error)
    return Reason("internal", repr(error))


class StreamListener(Protocol):
    """The sender's side of one stream. Called on connection threads, one call at a time; must not block.

    `on_accept` comes at most once; then exactly one of the other three, after which no `fill` of the stream runs.
    """

    def on_accept(self, skip_tokens: int) -> None:
        """Rows at and above `skip_tokens` will be sent; the receiver has those below."""

    def on_refuse(self, reason: Reason) -> None:
        """The receiver does not want the stream, or the two workers do not fit together."""

    def on_done(self) -> None:
        """The receiver has every row and the finish payload."""

    def on_lost(self, reason: Reason) -> None:
        """The stream failed, was aborted here, or the receiver ended it."""


class KvSink(Protocol):
    """The receiver's side. Called on connection threads: in order for one stream, concurrently for streams of
    different senders. After `Incoming.refuse`, `KvServer.close_stream`, a false return or `finished` nothing more is
    called for that stream, except a `rows` that was already under way on another thread."""

    def opened(self, stream: Incoming) -> None:
        """A sender wants to hand over. Answer with `stream.accept` or `stream.refuse`, now or later."""

    def rows(self, request_id: str, epoch: int, layer: int, start: int, stop: int, payload: memoryview) -> bool:
        """Rows [start, stop) of `layer`, checked. `payload` must only be read, and only during the call. False: the
        request is gone; the sender is told."""

    def finished(self, request_id: str, epoch: int, payload: bytes) -> bool:
        """The sender has sent everything. True is acknowledged; False tells the sender that it was lost."""

    def lost(self, request_id: str, epoch: int, reason: Reason) -> None:
        """Nothing more will come. Called once, also for a stream that was opened and not answered."""


@dataclass(frozen=True, slots=True)
class HandoverSettings:
    """Times and bounds of the hand-over. Raises ValueError when they contradict each other."""

    lease_s: float = 3.0
    """A receiver drops a stream when its sender was silent this long. Senders renew three times as often."""
    stall_timeout_s: float = 5.0
    """A sender drops a connection with open streams when the receiver was silent this long; either side drops one
    that stops in the middle of a frame."""
    connect_timeout_s: float = 2.0
    """Limit for each address that is tried, connect and handshake together."""
    arena_bytes: int = 8 << 20
    """Shared memory per connection on one host. More does not help: rows wait in the KV pool until there is room, and
    a ring that outgrows the CPU cache costs a quarter more CPU time per byte."""
    frame_bytes: int = 1 << 20
    """Largest Rows payload sent; at most half of arena_bytes. Small enough that streams take turns often."""
    max_connections: int = 256
    """A server refuses further ones. One thread each."""
    max_streams: int = 4096
    """Open streams per server, and per connection of a client; further ones are refused as retriable."""

    def __post_init__(self) -> None:
        if min(self.lease_s, self.stall_timeout_s, self.connect_timeout_s) <= 0:
            raise ValueError("lease_s, stall_timeout_s and connect_timeout_s must be positive")
        if not 0 < self.frame_bytes <= self.arena_bytes // 2:
            raise ValueError("frame_bytes must be positive and at most half of arena_bytes")

    @property
    def patience(self) -> Patience:
        """How long the sockets wait."""
        return Patience(self.connect_timeout_s, self.stall_timeout_s)
