"""Frames over one connected stream socket, unix or TCP.

The socket stays in blocking mode with SO_RCVTIMEO and SO_SNDTIMEO: one `recv_into` with MSG_WAITALL then fills a whole
payload in one system call. Python's own socket time-outs make the socket non-blocking underneath, and a payload of
megabytes would come in hundreds of wake-ups.
"""

from __future__ import annotations

import contextlib
import enum
import fcntl
import os
import select
import socket
import struct
import threading
import time
from dataclasses import dataclass

from tandem.wire.header import HEADER_BYTES, START, Header, ProtocolError
from tandem.wire.protocol import Body, Protocol

MAX_UNSENT_BYTES = 1 << 20
"""Most bytes of posted frames that wait because the peer does not take them."""
PACE_BYTES = 1 << 20
"""A peer that moves less than this of a frame in `Patience.stall_s` has stopped."""
_TICK_S = 1.0
_AHEAD_BYTES = 4096
"""Read at a time where a frame starts: most are smaller, and take one system call."""
_UNSENT_TCP_BYTES = 128 << 10
_SIOCOUTQ = 0x5411
_CLOSE_ON_EXEC: int = getattr(socket, "MSG_CMSG_CLOEXEC", 0)
_KEEPALIVE = {"TCP_KEEPIDLE": 5, "TCP_KEEPINTVL": 1, "TCP_KEEPCNT": 3}


@dataclass(frozen=True, slots=True)
class Patience:
    """How long a peer is waited for."""

    connect_s: float = 2.0
    """Limit to connect, and for each step of the handshake."""
    stall_s: float = 5.0
    """Limit on silence in the middle of a frame, whichever way it goes."""


class LinkClosed(ConnectionError):
    """End of stream, between two frames or within one."""


class Link:
    """`send` may be called from any thread, and waits while the peer takes something; `post` may be called from any
    thread and never waits. A link uses one of the two after its handshake. `wait_for_frame`, `receive` and what follows
    it are for one reading thread.

    Everything but `post` raises OSError (TimeoutError when the peer stalls) once the connection is unusable, and
    `receive` ProtocolError on anything malformed.
    """

    def __init__(self, sock: socket.socket, protocol: Protocol, patience: Patience) -> None:
        """Owns `sock` if it does not raise OSError."""
        sock.settimeout(None)
        if sock.family != socket.AF_UNIX:
            _tune_tcp(sock, patience.stall_s)
        self.sock = sock
        self.protocol = protocol
        self.patience = patience
        self._ahead = memoryview(bytearray(_AHEAD_BYTES))
        self._ahead_from = self._ahead_to = 0
        """What has been received and not read."""
        self._sent = self._received = 0
        """Frames."""
        self._given = 0
        """Bytes that the kernel has taken from `send`."""
        self._unsent = bytearray()
        self._incoming, self._end = select.poll(), select.poll()
        self._incoming.register(sock, select.POLLIN)
        self._end.register(sock, getattr(select, "POLLRDHUP", 0))
        self._sending = threading.Lock()
        self._closing = threading.Lock()
        self._broken = self._closed = False
        self._tick_s = _TICK_S
        self._allow(patience.connect_s)

    def handshake_is_over(self) -> None:
        """The peer may take `Patience.stall_s` from now on."""
        self._allow(self.patience.stall_s)

    def _allow(self, seconds: float) -> None:
        self._stall_s = seconds
        self.sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDTIMEO, _timeval(seconds))
        self.look_every(self._tick_s)

    def look_every(self, seconds: float) -> None:
        """How long the reading thread sleeps at most; `wait_for_frame` for as long needs one system call less."""
        self._tick_s = seconds
        self.sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVTIMEO, _timeval(min(seconds, self._stall_s)))

    @property
    def is_unix(self) -> bool:
        return self.sock.family == socket.AF_UNIX

    # Sending

    def send(
        self, kind: enum.IntEnum, frame_id: int = 0, body: Body | None = None, payload: memoryview | bytes = b""
    ) -> None:
        """Raises ValueError, with nothing sent, for a body that is too large."""
        with self._sending:
            head = self._frame(kind, frame_id, body, len(payload))
            self._send_all([memoryview(head), memoryview(payload)] if payload else [memoryview(head)])

    def send_with_descriptor(self, kind: enum.IntEnum, frame_id: int, body: Body, descriptor: int) -> None:
        """`send` for a small frame, with a file descriptor (unix sockets only)."""
        with self._sending:
            raw = self._frame(kind, frame_id, body)
            sent = socket.send_fds(self.sock, [raw], [descriptor])
            self._send_all(_without([memoryview(raw)], sent))

    def post(self, kind: enum.IntEnum, frame_id: int = 0, body: Body | None = None) -> None:
        """Sends a small frame, or keeps it until the peer reads. A peer that lets more than a megabyte of them pile up
        loses its connection. Quiet on a closed or broken one: the reading thread finds out."""
        with self._sending:
            if self._closed or self._broken:
                return
            self._unsent += self._frame(kind, frame_id, body)
            self._flush()
            if len(self._unsent) > MAX_UNSENT_BYTES:
                self._break()

    def _frame(self, kind: enum.IntEnum, frame_id: int, body: Body | None, payload_length: int = 0) -> bytes:
        raw = self.protocol.frame(kind, frame_id, body, payload_length, self._sent)
        self._sent += 1
        return raw

    def _send_all(self, parts: list[memoryview]) -> None:
        pace: _Pace | None = None
        while parts:
            try:
                sent = self.sock.sendmsg(parts)
            except BlockingIOError:
                raise TimeoutError(f"the peer took nothing for {self._stall_s:g} s") from None
            self._given += sent
            parts = _without(parts, sent)
            if not parts:
                return
            pace = pace or _Pace(self._stall_s)
            if not pace.is_kept(sent):
                raise TimeoutError(f"the peer took too little for {self._stall_s:g} s")

    def is_slow(self) -> None:
        """From now on the kernel takes few bytes (`_UNSENT_TCP_BYTES`) beyond those that are on their way, so that a
        frame which must get through does not wait behind megabytes of others."""
        if not self.is_unix and hasattr(socket, "TCP_NOTSENT_LOWAT"):
            self.sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NOTSENT_LOWAT, _UNSENT_TCP_BYTES)

    def on_its_way(self) -> tuple[int, int]:
        """Bytes from `send` that the peer's host has got, and those that the kernel keeps because it has not. (0, 0)
        for a unix socket."""
        with contextlib.suppress(OSError), self._closing:
            if not self._closed and not self.is_unix:
                waiting: int = struct.unpack("i", fcntl.ioctl(self.sock, _SIOCOUTQ, bytes(4)))[0]
                return self._given - waiting, waiting
        return 0, 0

    def _flush(self) -> None:
        try:
            while self._unsent:
                del self._unsent[: self.sock.send(self._unsent, socket.MSG_DONTWAIT)]
        except BlockingIOError:
            pass
        except OSError:
            self._break()
        if not self._closed:
            self._incoming.modify(self.sock, select.POLLIN | select.POLLOUT if self._unsent else select.POLLIN)

    def _break(self) -> None:
        """Nothing can be posted any more; the reading thread gets an end of stream."""
        self._broken = True
        self._unsent.clear()
        self.shutdown()

    # Receiving

    def receive(self, timeout_s: float | None = None) -> tuple[Header, Body]:
        """The next header and its body. Its payload, if any, must be read or skipped before the next call.

        None: waits for the start of a frame for as long as it takes.
        """
        deadline = None if timeout_s is None else time.monotonic() + timeout_s
        while not self.wait_for_frame(self._tick_s if deadline is None else max(deadline - time.monotonic(), 0.0)):
            if deadline is not None and time.monotonic() >= deadline:
                raise TimeoutError(f"the peer sent nothing for {timeout_s:g} s")
        return self._read_frame()

    def receive_first(self, timeout_s: float) -> tuple[Header, Body, int | None]:
        """`receive` for the first frame of the peer, which may carry a file descriptor; the caller then owns it."""
        if not self.is_unix:
            return *self.receive(timeout_s), None
        if not self._incoming.poll(timeout_s * 1000):
            raise TimeoutError(f"the peer sent nothing for {timeout_s:g} s")
        first, descriptors, _, _ = socket.recv_fds(self.sock, HEADER_BYTES, 1, _CLOSE_ON_EXEC)
        descriptor = descriptors[0] if descriptors else None
        try:
            if not first:
                raise LinkClosed("the peer closed the connection")
            self._ahead[: len(first)] = first
            self._ahead_from, self._ahead_to = 0, len(first)
            return *self._read_frame(), descriptor
        except BaseException:
            if descriptor is not None:
                os.close(descriptor)
            raise

    def wait_for_frame(self, timeout_s: float) -> bool:
        """Whether `receive` has something to read. May return early. Sends what `post` has kept, if the peer takes
        it."""
        if self._ahead_from < self._ahead_to:
            return True
        if (timeout_s < self._tick_s or self._unsent) and not self._poll(timeout_s):
            return False
        try:
            self._ahead_from, self._ahead_to = 0, self._receive_some(self._ahead, 0)
        except BlockingIOError:
            return False
        return True

    def _poll(self, timeout_s: float) -> bool:
        readable = False
        for _, events in self._incoming.poll(timeout_s * 1000):
            if events & select.POLLOUT:
                with self._sending:
                    self._flush()
            readable = bool(events & ~select.POLLOUT)
        return readable

    def _read_frame(self) -> tuple[Header, Body]:
        header = self._read_header()
        if header.sequence != self._received:
            raise ProtocolError(f"frame {header.sequence} where {self._received} was due")
        self._received += 1
        raw = bytearray(header.body_length)
        if raw:
            self.read_into(memoryview(raw))
        return header, self.protocol.decode(header, raw)

    def _read_header(self) -> Header:
        start = self._ahead_from
        if self._ahead_to - start >= HEADER_BYTES:
            self._ahead_from += HEADER_BYTES
            return self.protocol.parse(self._ahead[start : self._ahead_from])
        raw = bytearray(HEADER_BYTES)
        self.read_into(memoryview(raw)[: START.size])
        self.protocol.check_start(raw)  # the whole header of another version may be shorter than ours
        self.read_into(memoryview(raw)[START.size :])
        return self.protocol.parse(raw)

    def read_into(self, target: memoryview) -> None:
        """Fills `target`. Raises TimeoutError when it comes too slowly."""
        count = min(len(target), self._ahead_to - self._ahead_from)
        target[:count] = self._ahead[self._ahead_from : self._ahead_from + count]
        self._ahead_from += count
        target = target[count:]
        pace: _Pace | None = None
        while target:
            try:
                count = self._receive_some(target, socket.MSG_WAITALL)
            except BlockingIOError:
                count = 0
            target = target[count:]
            if not target:
                return
            pace = pace or _Pace(self._stall_s)
            if not pace.is_kept(count):
                raise TimeoutError(f"the peer stopped in the middle of a frame for {self._stall_s:g} s")

    def _receive_some(self, target: memoryview, flags: int) -> int:
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

    # The end

    def wait_for_end(self, timeout_s: float) -> None:
        """Waits until the connection is gone, or time is up; incoming frames do not wake it (Linux; elsewhere it may
        only wait). For one thread beside the reading one."""
        self._end.poll(timeout_s * 1000)

    def shutdown(self) -> None:
        """Wakes the threads that read or send with an error. From any thread."""
        with self._closing:
            if not self._closed:
                with contextlib.suppress(OSError):  # not connected any more: what was wanted
                    self.sock.shutdown(socket.SHUT_RDWR)

    def close(self) -> None:
        """Frees the descriptor. Only when no other thread reads or sends any more; `post` may still be called."""
        with self._sending, self._closing:
            self._closed = True
            self.sock.close()


class _Pace:
    """Whether a frame moves: `PACE_BYTES` in every `stall_s`, or all of it."""

    __slots__ = ("_moved", "_since", "_stall_s")

    def __init__(self, stall_s: float) -> None:
        self._stall_s = stall_s
        self._since = time.monotonic()
        self._moved = 0

    def is_kept(self, count: int) -> bool:
        """Counts `count` more bytes, and says whether that is enough."""
        self._moved += count
        now = time.monotonic()
        if self._moved >= PACE_BYTES:
            self._since, self._moved = now, 0
        return now - self._since < self._stall_s


def connect_unix(path: str, protocol: Protocol, patience: Patience) -> Link:
    """Raises OSError."""
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        sock.settimeout(patience.connect_s)
        sock.connect(path)
        return Link(sock, protocol, patience)
    except OSError:
        sock.close()
        raise


def connect_tcp(host: str, port: int, protocol: Protocol, patience: Patience) -> Link:
    """Raises OSError."""
    sock = socket.create_connection((host, port), patience.connect_s)
    try:
        return Link(sock, protocol, patience)
    except OSError:
        sock.close()
        raise


def _tune_tcp(sock: socket.socket, stall_s: float) -> None:
    """No delay for small frames; a host that vanished is noticed on an idle connection, too."""
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    for name, value in (_KEEPALIVE | {"TCP_USER_TIMEOUT": int(stall_s * 1000)}).items():
        if hasattr(socket, name):
            sock.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), value)


def _without(parts: list[memoryview], count: int) -> list[memoryview]:
    """What is left of `parts` when their first `count` bytes are sent."""
    rest = []
    for part in parts:
        if count < len(part):
            rest.append(part[count:])
        count = max(0, count - len(part))
    return rest


def _timeval(seconds: float) -> bytes:
    return struct.pack("ll", int(seconds), int(seconds % 1 * 1e6))
