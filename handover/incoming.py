"""One incoming hand-over: what the decode worker's sink gets, and its bookkeeping on the server."""

from __future__ import annotations

import enum
from typing import TYPE_CHECKING, NamedTuple

from tandem.handover.frames import Accept, Kind, Open, Rows
from tandem.wire.protocol import Reason

if TYPE_CHECKING:
    from tandem.handover.receiver import Receiver
    from tandem.handover.registry import StreamRegistry


class StreamKey(NamedTuple):
    """One attempt at one request."""

    request_id: str
    epoch: int


class State(enum.Enum):
    """How far a stream is."""

    OPENED = 1
    ACCEPTED = 2
    ENDED = 3


class Incoming:
    """A stream that a sender opened. `accept` and `refuse` may be called from any thread and never wait."""

    def __init__(
        self, opened: Open, number: int, sender_id: str, transport: str, receiver: Receiver, registry: StreamRegistry
    ) -> None:
        self.request_id = opened.request_id
        self.epoch = opened.epoch
        self.num_tokens = opened.num_tokens
        self.row_bytes = opened.row_bytes
        """Bytes of K and V of one token in one layer."""
        self.num_layers = opened.num_layers
        self.transport = transport
        """How its rows come: `shared_memory`, `unix` or `tcp`."""
        self.codec = "raw"
        """How its last rows were encoded."""
        self.received_bytes = 0
        """Rows that were delivered, before any codec. Changed by the receiver's thread only."""
        self.sender_id = sender_id
        """Worker id of the sender."""
        self.number = number
        self.receiver = receiver
        self.lease_until = 0.0
        """End of the lease on the receiver's clock. Used by its thread only."""
        self.state = State.OPENED
        """Changed under the registry's lock."""
        self.skip_tokens = 0
        self._registry = registry

    @property
    def key(self) -> StreamKey:
        return StreamKey(self.request_id, self.epoch)

    def accept(self, skip_tokens: int) -> bool:
        """Rows from `skip_tokens` on are welcome. False when the stream has ended meanwhile or was answered already.
        Raises ValueError outside 0..num_tokens."""
        if not 0 <= skip_tokens <= self.num_tokens:
            raise ValueError(f"cannot skip {skip_tokens} of {self.num_tokens} tokens")
        if not self._registry.accept(self, skip_tokens):
            return False
        self.receiver.post(Kind.ACCEPT, self.number, Accept(skip_tokens))
        return True

    def refuse(self, reason: Reason) -> bool:
        """The sender's `on_refuse(reason)` follows, and the sink hears no more of it. False when the stream has ended
        meanwhile or was answered already."""
        if not self._registry.end(self, reason.code, only_unanswered=True):
            return False
        self.receiver.post(Kind.REFUSE, self.number, reason)
        return True

    def misfit(self, rows: Rows) -> str | None:
        """Says what is wrong with a Rows frame, if anything; the payload apart."""
        if self.state is not State.ACCEPTED:
            return "rows before the stream was accepted"
        if rows.layer >= self.num_layers:
            return f"layer {rows.layer} of {self.num_layers}"
        if not self.skip_tokens <= rows.start < rows.stop <= self.num_tokens:
            return f"rows {rows.start}..{rows.stop}, wanted are {self.skip_tokens}..{self.num_tokens}"
        if rows.length != (rows.stop - rows.start) * self.row_bytes:
            return f"{rows.length} bytes for {rows.stop - rows.start} rows of {self.row_bytes}"
        return None
