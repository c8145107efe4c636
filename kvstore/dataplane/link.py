"""Frames over one connected stream socket, unix or TCP. Blocking, with kernel time-outs.

The socket stays in blocking mode with SO_RCVTIMEO and SO_SNDTIMEO: one `recv_into` with MSG_WAITALL then fills a whole
payload in one system call. Python's own socket time-outs make the socket non-blocking underneath, and a payload of
megabytes would come in hundreds of wake-ups.
"""

from __future__ import annotations

import contextlib
import os
import select
import socket
import struct
import threading
import time
from typing import TypeVar

from tandem.kvstore.dataplane.protocol import (
    HEADER_BYTES,
    Body,
    Header,
    Kind,
    ProtocolError,
    decode,
    encode,
    parse,
)

STALL_S = 5.0
"""A peer that stops in the middle of a frame, or does not take one, for this long loses its connection."""
CONNECT_S = 2.0
"""To connect, and to answer each step of the handshake."""
_TICK_S = 1.0
_AHEAD_BYTES = 4096
"""Read at a time where a frame starts: most are smaller, and take one system call."""
_CLOSE_ON_EXEC: int = getattr(socket, "MSG_CMSG_CLOEXEC", 0)
_KEEPALIVE = {"TCP_KEEPIDLE": 5, "TCP_KEEPINTVL": 1, "TCP_KEEPCNT": 3, "TCP_USER_TIMEOUT": int(STALL_S * 1000)}
_Body = TypeVar("_Body", bound=Body)


class LinkClosed(ConnectionError):
    """End of stream, between two frames or within one."""


class Link:
    """`send` may be called from any thread; `receive` and what follows it from one reading thread.

    Everything raises OSError (TimeoutError when the peer stalls) once the connection is unusable, and `receive`
    ProtocolError on anything malformed.
    """

    def __init__(self, sock: socket.socket) -> None:
        sock.settimeout(None)
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDTIMEO, _timeval(STALL_S))
        if sock.family != socket.AF_UNIX:
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
            for name, value in _KEEPALIVE.items():
                if hasattr(socket, name):
                    sock.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), value)
        self.sock = sock
        self._process = _process_of(sock)
        self._ahead = memoryview(bytearray(_AHEAD_BYTES))
        self._ahead_from = self._ahead_to = 0
        """What has been received and not read."""
        self.look_every(_TICK_S)
        self._incoming, self._end = select.poll(), select.poll()
        self._incoming.register(sock, select.POLLIN)
        self._end.register(sock, getattr(select, "POLLRDHUP", 0))
        self._sending = threading.Lock()
        self._closing = threading.Lock()
        self._closed = False

    def look_every(self, seconds: float) -> None:
        """How long the reading thread sleeps at most; `wait_for_frame` for as long needs one system call less."""
        self._tick_s = seconds
        self.sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVTIMEO, _timeval(seconds))

    @property
    def is_unix(self) -> bool:
        return self.sock.family == socket.AF_UNIX

    def send(self, kind: Kind, frame_id: int, body: Body | None = None, payload: memoryview | bytes = b"") -> None:
        """Raises ValueError, with nothing sent, for a body that is too large."""
        head = encode(kind, frame_id, body, len(payload))
        with self._sending:
            if not payload:
                self._send_all(memoryview(head))
                return
            sent = self._send_some(head, payload)
            if sent < len(head):
                self._send_all(memoryview(head)[sent:])
                sent = len(head)
            self._send_all(memoryview(payload)[sent - len(head) :])

    def send_with_descriptor(self, kind: Kind, frame_id: int, body: Body, descriptor: int) -> None:
        """`send` for a small frame, with a file descriptor (unix sockets only)."""
        raw = encode(kind, frame_id, body)
        with self._sending:
            sent = socket.send_fds(self.sock, [raw], [descriptor])
            self._send_all(memoryview(raw)[sent:])

    def _send_all(self, rest: memoryview) -> None:
        while rest:
            rest = rest[self._send_some(rest) :]

    def _send_some(self, *parts: bytes | memoryview) -> int:
        try:
            return self.sock.sendmsg(parts)
        except BlockingIOError as error:
            raise TimeoutError(f"the peer took nothing for {STALL_S:g} s") from error

    def receive(self, timeout_s: float | None = None) -> tuple[Header, Body]:
        """The next header and its body. Its payload, if any, must be read or skipped before the next call.

        None: waits for the start of a frame for as long as it takes.
        """
        deadline = None if timeout_s is None else time.monotonic() + timeout_s
        while not self._read_ahead():
            if deadline is not None and time.monotonic() >= deadline:
                raise TimeoutError(f"the peer sent nothing for {timeout_s:g} s") from None
        return self._finish(self._read(HEADER_BYTES))

    def _read_ahead(self) -> bool:
        """Whether there is something to read, after a while."""
        if self._ahead_from == self._ahead_to:
            try:
                self._ahead_from, self._ahead_to = 0, self._receive_some(self._ahead, 0)
            except BlockingIOError:
                return False
        return True

    def receive_with_descriptor(self, timeout_s: float) -> tuple[Header, Body, int | None]:
        """`receive` for a frame that may carry a file descriptor, which the caller then owns."""
        poll = select.poll()
        poll.register(self.sock, select.POLLIN)
        if not poll.poll(timeout_s * 1000):
            raise TimeoutError(f"the peer sent nothing for {timeout_s:g} s")
        first, descriptors, _, _ = socket.recv_fds(self.sock, HEADER_BYTES, 1, _CLOSE_ON_EXEC)
        descriptor = descriptors[0] if descriptors else None
        try:
            if not first:
                raise LinkClosed("the peer closed the connection")
            header, body = self._finish(bytearray(first) + self._read(HEADER_BYTES - len(first)))
        except BaseException:
            if descriptor is not None:
                os.close(descriptor)
            raise
        return header, body, descriptor

    def _finish(self, head: bytearray) -> tuple[Header, Body]:
        header = parse(head)
        return header, decode(header, self._read(header.body_length))

    def _read(self, length: int) -> bytearray:
        raw = bytearray(length)
        self.read_into(memoryview(raw))
        return raw

    def read_into(self, target: memoryview) -> None:
        """Fills `target`. Raises TimeoutError when nothing at all comes for `STALL_S`."""
        count = min(len(target), self._ahead_to - self._ahead_from)
        target[:count] = self._ahead[self._ahead_from : self._ahead_from + count]
        self._ahead_from += count
        target = target[count:]
        heard = time.monotonic()
        while target:
            try:
                target = target[self._receive_some(target) :]
                heard = time.monotonic()
            except BlockingIOError:
                if time.monotonic() - heard >= STALL_S:
                    raise TimeoutError(f"the peer stopped in the middle of a frame for {STALL_S:g} s") from None

    def _receive_some(self, target: memoryview, flags: int = socket.MSG_WAITALL) -> int:
        count = self.sock.recv_into(target, len(target), flags)
        if count == 0:
            raise LinkClosed("the peer closed the connection")
        return count

    def skip(self, length: int) -> None:
        """Reads a payload that nobody wants."""
        scratch = memoryview(bytearray(min(length, 1 << 20)))
        while length:
            piece = scratch[: min(length, len(scratch))]
            self.read_into(piece)
            length -= len(piece)

    def wait_for_frame(self, timeout_s: float) -> bool:
        """Whether `receive` has something to read. May return early. For the reading thread."""
        if (
            timeout_s < self._tick_s
            and self._ahead_from == self._ahead_to
            and not self._incoming.poll(timeout_s * 1000)
        ):
            return False
        return self._read_ahead()

    def wait_for_end(self, timeout_s: float) -> None:
        """Until the connection is gone, or time is up; incoming frames do not wake it (Linux; elsewhere it may only
        wait). For one thread beside the reading one."""
        self._end.poll(timeout_s * 1000)

    def shutdown(self) -> None:
        """Wakes the threads that read or send with an error. From any thread."""
        with self._closing:
            if not self._closed:
                with contextlib.suppress(OSError):  # not connected any more: what was wanted
                    self.sock.shutdown(socket.SHUT_RDWR)

    def peer_is_dead(self) -> bool:
        """Whether the process at the other end of a unix socket is known to have ended. Its sockets are closed a
        moment before its end can be seen, so this waits for that moment."""
        if self._process is None:
            return False
        poll = select.poll()
        poll.register(self._process, select.POLLIN)
        return bool(poll.poll(_TICK_S * 1000))

    def close(self) -> None:
        """Frees the descriptors. Only when no other thread reads or sends any more."""
        with self._closing:
            self._closed = True
            self.sock.close()
            if self._process is not None:
                os.close(self._process)
                self._process = None


def expect(body: Body, wanted: type[_Body]) -> _Body:
    """`body`, which must be of that type. Raises ProtocolError."""
    if not isinstance(body, wanted):
        raise ProtocolError(f"{type(body).__name__} instead of a {wanted.__name__}")
    return body


def connect_unix(path: str) -> Link:
    """Raises OSError."""
    return _connected(socket.socket(socket.AF_UNIX, socket.SOCK_STREAM), path)


def connect_tcp(host: str, port: int) -> Link:
    """Raises OSError."""
    sock = socket.create_connection((host, port), CONNECT_S)
    try:
        return Link(sock)
    except OSError:
        sock.close()
        raise


def _connected(sock: socket.socket, address: str) -> Link:
    try:
        sock.settimeout(CONNECT_S)
        sock.connect(address)
        return Link(sock)
    except OSError:
        sock.close()
        raise


def _process_of(sock: socket.socket) -> int | None:
    """A descriptor of the process at the other end; None for TCP, other systems, and unseen or own processes."""
    if sock.family != socket.AF_UNIX or not hasattr(os, "pidfd_open"):
        return None
    pid, _, _ = struct.unpack("3i", sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, struct.calcsize("3i")))
    if pid in (0, os.getpid()):
        return None
    try:
        return os.pidfd_open(pid)
    except OSError:  # gone already, or in a namespace that cannot be seen from here
        return None


def _timeval(seconds: float) -> bytes:
    return struct.pack("ll", int(seconds), int(seconds % 1 * 1e6))
