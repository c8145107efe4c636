"""The seam between transports: how the payload of a Rows frame gets from one process to the other.

Everything else (frames, streams, leases) is the same for all. `arena.py` moves it through shared memory, `inline.py`
in the byte stream; an RDMA library would be a third pair.
"""

from __future__ import annotations

from typing import Protocol

from tandem.handover.frames import Rows
from tandem.wire.header import Header
from tandem.wire.link import Link


class PayloadSender(Protocol):
    """Owned by the sender of one connection. Calls are serialised by the connection's lock, except `send`."""

    offset: int
    """Where the memory that the last `reserve` returned lies, for the Rows frame."""

    def reserve(self, length: int) -> memoryview | None:
        """Writable memory of `length` bytes for the next frame; None: ask again after an Ack. Raises ValueError when
        `length` can never be had."""

    def cancel(self) -> None:
        """Gives back what the last `reserve` returned; nothing was sent."""

    def send(self, link: Link, stream: int, rows: Rows, payload: memoryview) -> None:
        """Sends `rows` and the payload that was written to the reserved memory. Writing thread only."""

    def credit(self, consumed: int) -> None:
        """The receiver has consumed so many Rows frames in all. Raises ProtocolError when fewer were sent."""

    def close(self) -> None: ...


class PayloadReceiver(Protocol):
    """Owned by the reading thread of one connection."""

    acknowledges: bool
    """Whether the sender waits for Ack frames."""

    def receive(self, link: Link, header: Header, rows: Rows) -> memoryview:
        """The payload, valid until the next call, not yet checked. Raises ProtocolError, OSError."""

    def close(self) -> None: ...
