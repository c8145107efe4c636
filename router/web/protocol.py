"""uvicorn's HTTP/1.1 connection with what it leaves to a proxy in front: size of headers, slow senders, offers of other
protocols, clients that end their side or are answered before they have sent all.

The parser joins what it gets of a header to what it has, so that a header of many megabytes would stop the event loop
for seconds; and a client that never ends its request would be waited for without end. Of a request that offers to go on
in another protocol it skips the body, and would take it for the next request.
"""

from __future__ import annotations

import asyncio
import logging
import resource
import time
from typing import TYPE_CHECKING

import httptools
import msgspec
from uvicorn.protocols.http.httptools_impl import STATUS_LINE, HttpToolsProtocol, RequestResponseCycle

from tandem.common.errors import TandemError
from tandem.router.web.errors import error_body

if TYPE_CHECKING:  # uvicorn keeps it private
    from uvicorn._types import ASGISendEvent

log = logging.getLogger(__name__)

MAX_FRAMING_BYTES = 64 * 1024
"""Bytes of one request beside its body: request line, headers, sizes of chunks, trailers."""
CHUNK_BYTES = 32
"""Framing that each piece of a body may need on top of that."""
RECEIVE_S = 30.0
"""Time from the first byte of a request, or from the connection's beginning, to the end of its headers."""
MIN_BODY_BYTES = 1024
"""Bytes of a body that must come every `RECEIVE_S`."""

DROPPED_BYTES_PER_S = 16 << 20
"""Read and dropped, of all requests together that were answered before they ended. They have their answer already."""

FIRST_PROBE_S = 0.1
"""Pause between the first two questions whether a client that ended its side is still there; twice as long each
time."""
LONGEST_PROBE_S = 5.0
OLD_CLIENT_S = 10.0
"""A client of HTTP/1.0 that ended its side cannot be asked; it is taken to be there for so long."""
TELL_S = 10.0
"""Pause between two lines about requests that are none."""

_PROBE = STATUS_LINE[100] + b"\r\n"
_FRAMING_OF_LINE = len(b"  HTTP/1.1\r\n")
_FRAMING_OF_HEADER = len(b": \r\n")


class _Lingering(RequestResponseCycle):
    """Where an answer ends before its request, and the connection with it, the rest of the request is read and dropped
    first: what comes after a close is answered by a reset, which takes the answer away from the client."""

    lingers = False

    async def send(self, message: ASGISendEvent) -> None:
        """Sends a part of the answer. After the last one the connection stays until the request is read, if it is
        not."""
        is_last = message["type"] == "http.response.body" and not message.get("more_body", False)
        if is_last and self.more_body and not self.keep_alive:
            self.keep_alive = self.lingers = True
        await super().send(message)


class _UntilClosed(_Lingering):
    """An answer to HTTP/1.0, which knows no chunks: without a length it ends with the connection."""

    _has_length = True

    async def send(self, message: ASGISendEvent) -> None:
        """Sends a part of the answer as it is: in no chunks, even where its length is not known."""
        if message["type"] == "http.response.start":
            self._has_length = any(name == b"content-length" for name, _ in message["headers"])
            if not self._has_length:
                self.chunked_encoding = False
        elif message["type"] == "http.response.body" and not self._has_length:
            self.expected_content_length = len(message["body"])
        await super().send(message)


class _Refusals:
    """One line for many: a client that sends rubbish must not fill the log."""

    def __init__(self) -> None:
        self._untold = 0
        self._next = 0.0

    def note(self, status: int, problem: str) -> None:
        """Counts a refused request, and logs one line in `TELL_S` for all of them."""
        self._untold += 1
        now = time.monotonic()
        if now >= self._next:
            log.info("refused %d requests that were none, the last with %d: %s", self._untold, status, problem)
            self._untold, self._next = 0, now + TELL_S


_refusals = _Refusals()


class _Dropped:
    """How fast this process reads what it drops."""

    def __init__(self) -> None:
        self._paid_at = 0.0

    def pause_s(self, size: int) -> float:
        """Time until the connection that has just brought `size` bytes may bring more."""
        now = time.monotonic()
        self._paid_at = max(self._paid_at, now) + size / DROPPED_BYTES_PER_S
        return self._paid_at - now


_dropped = _Dropped()


class BoundedHttp(HttpToolsProtocol):
    """One connection of a client, made by uvicorn. On the event loop."""

    _framing = 0
    """Bytes of the current request that were no body; 0 between two requests."""
    _piece = 0
    """Bytes that are being parsed."""
    _received = 0
    """Bytes since `_timer` was set."""
    _read: object = None
    """uvicorn's `cycle` of the last request that was read to its end. The next one has a cycle of its own as soon as
    its headers are complete."""
    _timer: asyncio.TimerHandle | None = None
    _ended = 0.0
    """When the client ended its side; 0: it has not."""
    _probe: asyncio.TimerHandle | None = None
    _pause: asyncio.TimerHandle | None = None
    """What comes is dropped, and comes slowly."""

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self._timer = self.loop.call_later(RECEIVE_S, self._look)

    def connection_lost(self, exc: Exception | None) -> None:
        """Stops the timers."""
        if self._timer is not None:
            self._timer.cancel()
        if self._probe is not None:
            self._probe.cancel()
        if self._pause is not None:
            self._pause.cancel()
        super().connection_lost(exc)

    def eof_received(self) -> bool:  # type: ignore[override]
        """True: the connection stays, for the answers to what was asked in full. Who ends his side once an answer has
        begun is gone: it would be noticed late, where nothing comes for long."""
        if self.cycle is None or not self._in_head or self.cycle.response_started:
            return False
        if not self._ended:
            self._ended = time.monotonic()
            self._ask_whether_there(FIRST_PROBE_S)
        return True

    def data_received(self, data: bytes) -> None:
        """Parses what came, within the limits on headers and time. After a whole answer further data is dropped
        slowly."""
        self._piece = len(data)
        self._framing += len(data)
        self._unset_keepalive_if_required()
        try:
            self._parse(data)
        except httptools.HttpParserError:
            self.send_400_response("")
            return
        if self._framing > MAX_FRAMING_BYTES:
            self._refuse_headers()
        elif self._timer is not None:
            self._received += len(data)
        elif self._framing or self.cycle.more_body:
            self._received = 0
            self._timer = self.loop.call_later(RECEIVE_S, self._look)
        answered = self.cycle is not None and self.cycle.response_complete and not self._in_head
        if answered and not self.transport.is_closing():
            self.flow.pause_reading()
            self._pause = self.loop.call_later(_dropped.pause_s(len(data)), self._read_on)

    def _read_on(self) -> None:
        if not self.transport.is_closing():
            self.flow.resume_reading()

    def _parse(self, data: bytes) -> None:
        """Raises HttpParserError. A request that offers to go on in another protocol (Java's client does, with its
        first request) is parsed again without the offer: as one of HTTP/1.1, which has a body."""
        rest = memoryview(data)
        while True:
            try:
                self.parser.feed_data(rest)
                return
            except httptools.HttpParserUpgrade as offer:
                rest = rest[offer.args[0] :]
            method, version = self.parser.get_method(), self.parser.get_http_version()
            if method == b"CONNECT":
                self._refuse(405, "CONNECT is for proxies, and this is none")
                return
            head = [b"%b %b HTTP/%b\r\n" % (method, self.url, version.encode())]
            head += [b"%b: %b\r\n" % header for header in self.headers if header[0] != b"upgrade"]
            self.parser = httptools.HttpRequestParser(self)
            self.parser.set_dangerous_leniencies(lenient_data_after_close=True)
            self.parser.feed_data(b"".join(head) + b"\r\n")

    def on_headers_complete(self) -> None:
        """Begins a request. Raises ValueError, which stops the parser, where the headers are too large."""
        if max(self._framing, self._piece) > MAX_FRAMING_BYTES and self._head_bytes() > MAX_FRAMING_BYTES:
            self._refuse_headers()
            raise ValueError("the parser may stop")
        if self.parser.should_upgrade():
            return
        HttpToolsProtocol.on_headers_complete(self)
        self.cycle.__class__ = _UntilClosed if self.scope["http_version"] == "1.0" else _Lingering

    def on_body(self, body: bytes) -> None:
        self._framing -= len(body) + CHUNK_BYTES
        HttpToolsProtocol.on_body(self, body)

    def on_message_complete(self) -> None:
        """A request is read: its timer stops, and a connection that only lingered for it closes."""
        if self.parser.should_upgrade():
            return
        self._framing = 0
        self._read = self.cycle
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        HttpToolsProtocol.on_message_complete(self)
        if isinstance(self.cycle, _Lingering) and self.cycle.lingers:
            self.transport.close()

    def on_response_complete(self) -> None:
        """An answer is sent: the connection closes where the client has ended its side, or ends its own side where a
        request is still unread."""
        HttpToolsProtocol.on_response_complete(self)
        if self._ended and self.cycle.response_complete:
            self.transport.close()
        elif isinstance(self.cycle, _Lingering) and self.cycle.lingers:
            self.transport.write_eof()

    def _ask_whether_there(self, pause_s: float) -> None:
        """A client that is gone looks like one that only ended its side, until something is sent to it. Once an answer
        has begun, its parts do that."""
        if self.transport.is_closing() or self.cycle.response_complete:
            return
        if self.scope["http_version"] != "1.1":
            if not self._answering and time.monotonic() > self._ended + OLD_CLIENT_S:
                self.transport.close()
                return
        elif not self._answering:
            self.transport.write(_PROBE)
        self._probe = self.loop.call_later(pause_s, self._ask_whether_there, min(2 * pause_s, LONGEST_PROBE_S))

    @property
    def _answering(self) -> bool:
        """Whether an answer has begun and not ended. Those before the last request's are not looked at: they are
        answered first, so the next question comes too early at worst."""
        return self.cycle.response_started or bool(self.pipeline)

    @property
    def _in_head(self) -> bool:
        """Whether the next headers are not read whole, or have not begun."""
        return self.cycle is self._read

    def _look(self) -> None:
        self._timer = None
        if self._in_head:
            if self._framing or self.cycle is None:
                self._refuse(408, f"the headers did not come within {RECEIVE_S:g} s")
            return
        slow = self._received < MIN_BODY_BYTES and not self.flow.read_paused
        if slow or self.cycle.response_complete:
            self.transport.close()
            return
        self._received = 0
        self._timer = self.loop.call_later(RECEIVE_S, self._look)

    def _head_bytes(self) -> int:
        """Request line and headers with the empty line."""
        line = len(self.parser.get_method()) + len(self.url) + _FRAMING_OF_LINE
        return line + sum(len(name) + len(value) + _FRAMING_OF_HEADER for name, value in self.headers) + len(b"\r\n")

    def send_400_response(self, msg: str) -> None:
        self._refuse(400, "this is not valid HTTP/1.1")

    def _refuse_headers(self) -> None:
        self._refuse(431, f"the headers are larger than {MAX_FRAMING_BYTES} bytes")

    def _refuse(self, status: int, problem: str) -> None:
        """Closes the connection; says why where no other answer is under way."""
        if self.transport.is_closing():
            return
        _refusals.note(status, problem)
        if self._in_head:
            free = self.cycle is None or self.cycle.response_complete
        else:
            free = not self.cycle.response_started and not self.pipeline
        if free:
            body = msgspec.json.encode(error_body(TandemError("invalid_request", problem)))
            head = b"content-type: application/json\r\ncontent-length: %d\r\nconnection: close\r\n\r\n" % len(body)
            self.transport.write(STATUS_LINE[status] + head + body)
        self.transport.close()


def allow_many_connections() -> None:
    """Lifts the number of descriptors to what the system lets this process have; often it begins with 1,024."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft != hard:
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
