"""uvicorn's HTTP/1.1 connection with the bounds that it leaves to a proxy in front: size of headers, slow senders.

The parser joins what it gets of a header to what it has, so that a header of many megabytes would stop the event loop
for seconds; and a client that never ends its request would be waited for without end.
"""

from __future__ import annotations

import asyncio
import resource
from typing import TYPE_CHECKING

import msgspec
from uvicorn.protocols.http.httptools_impl import STATUS_LINE, HttpToolsProtocol, RequestResponseCycle

from tandem.common.errors import TandemError
from tandem.router.http_errors import error_body

if TYPE_CHECKING:  # uvicorn keeps it private
    from uvicorn._types import ASGISendEvent

MAX_FRAMING_BYTES = 64 * 1024
"""Of one request, beside its body: request line, headers, sizes of chunks, trailers."""
CHUNK_BYTES = 32
"""Framing that each piece of a body may need on top of that."""
RECEIVE_S = 30.0
"""From the first byte of a request, or from the connection's beginning, to the end of its headers."""
MIN_BODY_BYTES = 1024
"""Of a body, every `RECEIVE_S`."""

_ASKS_FOR_HTTP_2 = b"\r\nUpgrade: h2c"
_FRAMING_OF_LINE = len(b"  HTTP/1.1\r\n")
_FRAMING_OF_HEADER = len(b": \r\n")


class _UntilClosed(RequestResponseCycle):
    """An answer to HTTP/1.0, which knows no chunks: without a length it ends with the connection."""

    _has_length = True

    async def send(self, message: ASGISendEvent) -> None:
        if message["type"] == "http.response.start":
            self._has_length = any(name == b"content-length" for name, _ in message["headers"])
            if not self._has_length:
                self.chunked_encoding = False
        elif message["type"] == "http.response.body" and not self._has_length:
            self.expected_content_length = len(message["body"])
        await super().send(message)


class BoundedHttp(HttpToolsProtocol):
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

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self._timer = self.loop.call_later(RECEIVE_S, self._look)

    def connection_lost(self, exc: Exception | None) -> None:
        if self._timer is not None:
            self._timer.cancel()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        if _ASKS_FOR_HTTP_2 in data and self._in_head:
            head, end, rest = data.partition(b"\r\n\r\n")  # the parser would pass over the body of such a request
            data = head.replace(_ASKS_FOR_HTTP_2, b"\r\nX-Upgrade: h2c") + end + rest
        self._piece = len(data)
        self._framing += len(data)
        HttpToolsProtocol.data_received(self, data)
        if self._framing > MAX_FRAMING_BYTES:
            self._refuse_headers()
        elif self._timer is not None:
            self._received += len(data)
        elif self._framing or self.cycle.more_body:
            self._received = 0
            self._timer = self.loop.call_later(RECEIVE_S, self._look)

    def on_headers_complete(self) -> None:
        if max(self._framing, self._piece) > MAX_FRAMING_BYTES and self._head_bytes() > MAX_FRAMING_BYTES:
            self._refuse_headers()
            raise ValueError("the parser may stop")
        HttpToolsProtocol.on_headers_complete(self)
        if self.scope["http_version"] == "1.0":
            self.cycle.__class__ = _UntilClosed

    def on_body(self, body: bytes) -> None:
        self._framing -= len(body) + CHUNK_BYTES
        HttpToolsProtocol.on_body(self, body)

    def on_message_complete(self) -> None:
        self._framing = 0
        self._read = self.cycle
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        HttpToolsProtocol.on_message_complete(self)

    @property
    def _in_head(self) -> bool:
        """Or before it."""
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
