"""Frames over one connected stream socket, whichever address family it has."""

from __future__ import annotations

import contextlib
import logging
import os
import select
import socket
import threading
import time

from tandem.handover.frames import HEADER_BYTES, Frame, FrameError, Kind, checksum, pack, parse
from tandem.handover.interfaces import Reason

logger = logging.getLogger(__name__)

MAX_UNSENT_BYTES = 1 << 20
_CLOSE_ON_EXEC: int = getattr(socket, "MSG_CMSG_CLOEXEC", 0)


class PeerClosed(ConnectionError):
    """End of stream, between two frames or within one."""


def reason_of(error: Exception) -> Reason:
    """What the streams of a connection that broke with `error` are told."""
    if isinstance(error, FrameError):
        return Reason("protocol", str(error))
    if isinstance(error, TimeoutError):
        return Reason("stalled", str(error))
    if isinstance(error, OSError):
        return Reason("peer_closed", str(error))
    logger.error("a connection failed", exc_info=error)
    return Reason("internal", repr(error))


class Link:
    """`send` is for one writing thread and may wait up to `stall_timeout_s`; `post` is for any thread and never
    waits; `wait_readable` and `receive` are for one reading thread. A link uses either `send` or `post`.

    Every method raises OSError once the connection is unusable (TimeoutError when the peer stalls), and `receive`
    FrameError on anything malformed.
    """

    def __init__(self, sock: socket.socket, stall_timeout_s: float) -> None:
        self.sock = sock
        self.set_stall_timeout(stall_timeout_s)
        self._header = bytearray(HEADER_BYTES)
        self._poll = select.poll()
        self._fd = sock.fileno()
        self._poll.register(self._fd, select.POLLIN)
        self._sent = 0
        self._received = 0
        self._lock = threading.Lock()
        self._unsent = bytearray()
        self._broken = False
        self._closed = False

    def set_stall_timeout(self, seconds: float) -> None:
        self.sock.settimeout(seconds)
        self._stall_timeout_s = seconds

    def send(self, frame: Frame, payload: bytes | memoryview = b"") -> None:
        """Sends a header and what follows it, if anything; `frame.sequence` is filled in."""
        header = pack(frame._replace(sequence=self._sent))
        self._sent += 1
        if not payload:
            self.sock.sendall(header)
            return
        sent = self.sock.sendmsg([header, payload])
        if sent < HEADER_BYTES:
            self.sock.sendall(header[sent:])
            sent = HEADER_BYTES
        rest = memoryview(payload)[sent - HEADER_BYTES :]
        deadline = time.monotonic() + self._stall_timeout_s
        while rest:
            sent = self.sock.send(rest)
            rest = rest[sent:]
            if rest and time.monotonic() > deadline:
                raise TimeoutError(f"the peer did not take {len(payload)} bytes in {self._stall_timeout_s} s")

    def send_body(self, kind: Kind, body: bytes = b"", *, stream: int = 0) -> None:
        self.send(Frame(kind, stream, length=len(body), checksum=checksum(body) if body else 0), body)

    def send_with_descriptor(self, frame: Frame, body: bytes, descriptor: int) -> None:
        """`send` for a small frame, with a file descriptor (unix sockets only)."""
        raw = pack(frame._replace(sequence=self._sent)) + body
        self._sent += 1
        sent = socket.send_fds(self.sock, [raw], [descriptor])
        if sent < len(raw):  # even an empty sendall fails when the peer has answered and gone
            self.sock.sendall(raw[sent:])

    def post(self, kind: Kind, body: bytes = b"", *, stream: int = 0, start: int = 0, offset: int = 0) -> None:
        """Sends a small frame, or keeps it until the peer reads. A peer that lets more than a megabyte of small
        frames pile up loses its connection. Quiet on a closed or broken one: the reading thread finds out."""
        frame = Frame(
            kind, stream, start=start, offset=offset, length=len(body), checksum=checksum(body) if body else 0
        )
        with self._lock:
            if self._closed or self._broken:
                return
            self._unsent += pack(frame._replace(sequence=self._sent)) + body
            self._sent += 1
            self._flush()
            if len(self._unsent) > MAX_UNSENT_BYTES:
                self._break()

    def _flush(self) -> None:
        # Not sock.send: with a timeout set it would wait until the socket is writable.
        try:
            while self._unsent:
                del self._unsent[: os.write(self._fd, self._unsent)]
        except BlockingIOError:
            pass
        except OSError:
            self._break()
        interest = select.POLLIN | select.POLLOUT if self._unsent else select.POLLIN
        self._poll.modify(self._fd, interest)

    def wait_readable(self, timeout_s: float) -> bool:
        """Whether `receive` has something to read, an end of stream included."""
        for _, events in self._poll.poll(timeout_s * 1000):
            if events & select.POLLOUT:
                with self._lock:
                    self._flush()
            if events & ~select.POLLOUT:
                return True
        return False

    def receive_with_descriptor(self) -> tuple[Frame, int | None]:
        """`receive` for a frame that may carry a file descriptor, which the caller then owns."""
        first, descriptors, _, _ = socket.recv_fds(self.sock, HEADER_BYTES, 1, _CLOSE_ON_EXEC)
        descriptor = descriptors[0] if descriptors else None
        try:
            if not first:
                raise PeerClosed("the peer closed the connection")
            self._header[: len(first)] = first
            self.read_into(memoryview(self._header)[len(first) :])
            return self._parse(), descriptor
        except BaseException:
            if descriptor is not None:
                os.close(descriptor)
            raise

    def receive(self) -> Frame:
        """The next header. Its payload must be read before the next call."""
        self.read_into(memoryview(self._header))
        return self._parse()

    def _parse(self) -> Frame:
        frame = parse(self._header)
        if frame.sequence != self._received:
            raise FrameError(f"frame {frame.sequence} where {self._received} was due")
        self._received += 1
        return frame

    def read_body(self, frame: Frame) -> bytearray:
        """The payload of a frame that is not Rows."""
        body = bytearray(frame.length)
        if frame.length:
            self.read_into(memoryview(body))
            if checksum(body) != frame.checksum:
                raise FrameError(f"checksum of a {frame.kind.name} body does not match")
        return body

    def read_into(self, target: memoryview) -> None:
        deadline = time.monotonic() + self._stall_timeout_s
        while target:
            count = self.sock.recv_into(target)
            if count == 0:
                raise PeerClosed("the peer closed the connection")
            target = target[count:]
            if target and time.monotonic() > deadline:
                raise TimeoutError(f"the peer stopped in the middle of a frame for {self._stall_timeout_s} s")

    def shutdown(self) -> None:
        """Wakes the threads that read or write with an end of stream. From any thread."""
        with self._lock:
            if not self._closed:
                self._shutdown()

    def _break(self) -> None:
        """Nothing can be posted any more; the reading thread gets an end of stream."""
        self._broken = True
        self._unsent.clear()
        self._shutdown()

    def _shutdown(self) -> None:
        with contextlib.suppress(OSError):  # not connected any more: what was wanted
            self.sock.shutdown(socket.SHUT_RDWR)

    def close(self) -> None:
        """Frees the descriptor. Only when no thread reads or sends any more; `post` may still be called."""
        with self._lock:
            self._closed = True
            self.sock.close()
