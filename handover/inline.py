"""Payload in the byte stream: between hosts, and where there is no memfd."""

from __future__ import annotations

from tandem.handover.frames import Kind, Rows
from tandem.wire.header import Header, ProtocolError
from tandem.wire.link import Link


class InlineSender:
    """Fills one buffer and sends it; the kernel's socket buffer is the window."""

    offset = 0

    def __init__(self, frame_bytes: int) -> None:
        self._buffer = memoryview(bytearray(frame_bytes))

    def reserve(self, length: int) -> memoryview | None:
        if length > len(self._buffer):
            raise ValueError(f"{length} bytes do not fit in a frame of {len(self._buffer)}")
        return self._buffer[:length]

    def cancel(self) -> None:
        pass

    def send(self, link: Link, stream: int, rows: Rows, payload: memoryview) -> None:
        link.send(Kind.ROWS, stream, rows, payload)

    def credit(self, consumed: int) -> None:
        pass

    def close(self) -> None:
        pass


class InlineReceiver:
    """Reads into one buffer, which grows to the largest frame seen (at most MAX_PAYLOAD_BYTES)."""

    acknowledges = False

    def __init__(self) -> None:
        self._buffer = memoryview(b"")

    def receive(self, link: Link, header: Header, rows: Rows) -> memoryview:
        """Reads the payload that follows the header. Raises ProtocolError, OSError."""
        if header.payload_length != rows.length:
            raise ProtocolError(f"Rows of {rows.length} bytes with a payload of {header.payload_length}")
        if rows.length > len(self._buffer):
            self._buffer = memoryview(bytearray(rows.length))
        payload = self._buffer[: rows.length]
        link.read_into(payload)
        return payload

    def close(self) -> None:
        pass
