"""One outgoing hand-over: what the prefill worker holds, and its bookkeeping on the connection."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass
from typing import TYPE_CHECKING

from tandem.handover.interfaces import Fill, StreamListener
from tandem.wire.protocol import Reason

if TYPE_CHECKING:
    from tandem.handover.connection import ClientConnection


@dataclass(slots=True)
class PendingRows:
    """Rows of one layer that are to be sent."""

    layer: int
    start: int
    stop: int
    fill: Fill


@dataclass(frozen=True, slots=True)
class Ending:
    """The last callback of a stream. Without a reason: done."""

    reason: Reason | None
    refused: bool = False

    def tell(self, listener: StreamListener) -> None:
        """Makes the last callback."""
        if self.reason is None:
            listener.on_done()
        elif self.refused:
            listener.on_refuse(self.reason)
        else:
            listener.on_lost(self.reason)

    @property
    def outcome(self) -> str:
        return self.reason.code if self.reason else "done"


class KvStream:
    """Made by `KvClient.open`. All three methods may be called from any thread and never wait.

    Memory held is a few hundred bytes per `send_layer`; the rows stay where they are until `fill` copies them.
    """

    def __init__(
        self,
        connection: ClientConnection,
        number: int,
        request_id: str,
        epoch: int,
        num_tokens: int,
        row_bytes: int,
        num_layers: int,
        listener: StreamListener,
    ) -> None:
        self.request_id = request_id
        self.epoch = epoch
        self.num_tokens = num_tokens
        self.row_bytes = row_bytes
        self.num_layers = num_layers
        self.number = number
        self.listener = listener
        # The rest belongs to the connection and is guarded by its lock.
        self.announced = False
        """Open was sent."""
        self.accepted = False
        self.skip_tokens = 0
        self.items: deque[PendingRows | bytes] = deque()
        self.finishing = False
        """`finish` was called."""
        self.queued = False
        """Whether it is in the connection's round of streams to send from."""
        self.busy = 0
        """Callbacks, fills and sends that run for it."""
        self.ending: Ending | None = None
        self.told = False
        """The last callback is made or being made."""
        self._connection = connection

    def peek(self, max_rows: int) -> PendingRows | bytes | None:
        """The next piece to send: at most `max_rows` rows, or the finish payload. Under the connection's lock."""
        while self.items:
            item = self.items[0]
            if isinstance(item, bytes):
                return item
            start = max(item.start, self.skip_tokens)
            if start < item.stop:
                return PendingRows(item.layer, start, min(item.stop, start + max_rows), item.fill)
            self.items.popleft()
        return None

    def advance(self, piece: PendingRows | bytes) -> None:
        """Takes what `peek` returned: it is being sent. Under the connection's lock."""
        item = self.items[0]
        if isinstance(piece, bytes) or isinstance(item, bytes) or piece.stop == item.stop:
            self.items.popleft()
        else:
            item.start = piece.stop

    def send_layer(self, layer: int, start: int, stop: int, fill: Fill) -> None:
        """Queues rows [start, stop) of `layer`, which must stay unchanged until they are sent. Nothing happens on a
        stream that has ended. Raises ValueError for rows outside the stream, or after `finish`."""
        if not 0 <= layer < self.num_layers or not 0 <= start <= stop <= self.num_tokens:
            raise ValueError(
                f"rows {start}..{stop} of layer {layer} in a stream of {self.num_tokens} rows, {self.num_layers} layers"
            )
        if start < stop:
            self._connection.enqueue(self, PendingRows(layer, start, stop, fill))

    def finish(self, payload: bytes) -> None:
        """Queues the end, after all rows. Raises ValueError when called twice."""
        self._connection.enqueue(self, payload)

    def abort(self, reason: Reason) -> None:
        """Tells the receiver; `on_lost(reason)` follows on a connection thread. Nothing happens on a stream that has
        ended."""
        self._connection.abort(self, reason)
