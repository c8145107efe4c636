"""One HTTP request and its answer, straight on ASGI: reading with a limit, JSON, server-sent events."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Callable, Collection, Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, Any, TypeVar
from urllib.parse import parse_qsl

import msgspec

from tandem.common.errors import TandemError
from tandem.common.fair_work import FairWork
from tandem.router.calls.accounts import Accounts
from tandem.router.tenants.caller import ANYBODY
from tandem.router.turns.limits import Place
from tandem.router.web.body_memory import BodyMemory
from tandem.router.web.cors import Cors
from tandem.router.web.errors import (
    ANTHROPIC_HEADER,
    ANTHROPIC_PATH,
    anthropic_error,
    error_body,
    error_headers,
)
from tandem.router.web.off_loop import off_loop
from tandem.router.web.request_fields import SMALL_BODY_BYTES, BodyReader, log_ignored
from tandem.router.web.request_ids import named_in_body, request_id_of, traceparent_of

if TYPE_CHECKING:  # uvicorn keeps them private
    from uvicorn._types import ASGIReceiveCallable, ASGISendCallable, HTTPScope

IGNORED_HEADER = b"x-tandem-ignored"
PIECE_BYTES = 256 * 1024
"""An answer is handed to the connection in pieces, which it copies."""
MAX_LISTED_BYTES = 1024
"""Length of a header that lists names."""

T = TypeVar("T")
Headers = list[tuple[bytes, bytes]]


class ClientGone(Exception):
    """The client closed the connection; there is nobody to answer."""


class Exchange:
    """One request, from its headers to the end of its answer. On the event loop."""

    def __init__(
        self,
        scope: HTTPScope,
        receive: ASGIReceiveCallable,
        send: ASGISendCallable,
        max_body_bytes: int,
        work: FairWork,
    ) -> None:
        """`work`: threads for what would hold the event loop."""
        self.method = scope["method"]
        self.path = scope["path"]
        self.arrived = time.monotonic()
        self.caller = ANYBODY
        """Set once the API key is checked."""
        self.accounts: Accounts | None = None
        """Whose limits the answer tells the caller; None: of none."""
        self.place: Place | None = None
        """Its own under these limits; None: it costs nothing."""
        self.ignored: list[str] = []
        """Fields of the request that have no effect; the answer names them in a header."""
        self.cors: Cors | None = None
        """None: no page of another origin may read the answer."""
        self.status = 0
        """HTTP status of the answer; 0 until it has begun."""
        self._headers = dict(scope["headers"])
        self._query_string = scope["query_string"]
        self._receive = receive
        self._send = send
        self._max_body_bytes = max_body_bytes
        self._work = work
        self.memory = BodyMemory()
        """Memory of the body, and of an answer that is long."""
        self.body_bytes = 0
        """What has come of the body."""
        self.request_id = request_id_of(self.header(b"x-request-id"))

    def header(self, name: bytes) -> str:
        """Empty where it is absent."""
        return self._headers.get(name, b"").decode("latin-1")

    @property
    def anthropic(self) -> bool:
        """Whether the client speaks Anthropic's API, in which errors and models have other shapes."""
        return self.path.startswith(ANTHROPIC_PATH) or ANTHROPIC_HEADER in self._headers

    @property
    def traceparent(self) -> str:
        """Empty where it is absent or malformed."""
        return traceparent_of(self.header(b"traceparent"))

    async def body(self) -> bytes:
        """Raises TandemError `request_too_large`, `invalid_request`, ClientGone."""
        encoding = self.header(b"content-encoding")
        if encoding not in ("", "identity"):
            raise TandemError("invalid_request", f"content-encoding: {encoding[:32]!r} is not supported; send it plain")
        length = self.header(b"content-length")
        if length.isdigit() and int(length) > self._max_body_bytes:
            raise self._too_large()
        parts: list[bytes] = []
        size = 0
        while True:
            message = await self._receive()
            if message["type"] != "http.request":
                raise ClientGone
            part = message.get("body", b"")
            size += len(part)
            if size > self._max_body_bytes:
                raise self._too_large()
            self.memory.hold(size, self.caller.tenant)
            self.body_bytes = size
            parts.append(part)
            if not message.get("more_body", False):
                return b"".join(parts)

    def release(self) -> None:
        """The request is over, and what was made of its body is gone."""
        self.memory.release()

    def query(self) -> dict[str, str]:
        """Parameters of the URL; the last one of a name counts."""
        return dict(parse_qsl(self._query_string.decode("latin-1"), keep_blank_values=True))

    async def parts(self, *, stalled_s: float) -> AsyncIterator[bytes]:
        """The body as it comes, for readers that bound it themselves.

        Raises ClientGone, also where nothing comes for `stalled_s`.
        """
        more = True
        while more:
            try:
                message = await asyncio.wait_for(self._receive(), stalled_s)
            except TimeoutError as error:
                raise ClientGone from error
            if message["type"] != "http.request":
                raise ClientGone
            yield message.get("body", b"")
            more = message.get("more_body", False)

    async def decode(self, reader: BodyReader[T]) -> T:
        """Raises TandemError `invalid_request` naming the field, `request_too_large`, `overloaded`."""
        raw = await self.body()
        if self.place is not None and len(raw) > SMALL_BODY_BYTES:
            self.place.has_read(len(raw))
        found: tuple[T, list[str]] = await self.off_loop(self._read, reader, raw)
        body, ignored = found
        self.ignore(ignored)
        return body

    def _read(self, reader: BodyReader[T], raw: bytes) -> tuple[T, list[str]]:
        if self.place is not None and len(raw) > SMALL_BODY_BYTES:
            self.place.begin()
        return reader.read(raw)

    async def off_loop(self, function: Callable[..., T], *args: Any) -> T:
        """The result of a function that takes long where the body is large: then in a thread, in the tenant's turn.
        Raises TandemError `overloaded`, and what the function raises."""
        return await off_loop(self._work, self.caller, self.body_bytes, function, *args)

    def name(self, given: str | None) -> None:
        """Takes the request's id from its body, where the client has put one there. Raises TandemError
        `invalid_request`."""
        self.request_id = named_in_body(given, self.request_id)

    def ignore(self, names: Iterable[str]) -> None:
        """Fields of the request that have no effect: the answer's headers tell the client, the log says it once."""
        names = list(names)
        self.ignored += names
        log_ignored(names, self.path)

    async def wait_for_disconnect(self) -> None:
        while (await self._receive())["type"] != "http.disconnect":
            continue

    async def reply(
        self,
        body: bytes | Sequence[bytes],
        *,
        status: int = 200,
        content_type: bytes = b"application/json",
        headers: Headers | None = None,
    ) -> None:
        """`body`: whole, or in parts."""
        parts = [body] if isinstance(body, bytes) else body
        length = sum(map(len, parts))
        await self._start(
            status, [(b"content-type", content_type), (b"content-length", str(length).encode()), *(headers or [])]
        )
        if length > PIECE_BYTES:
            for piece in _in_pieces(parts):
                await self._send({"type": "http.response.body", "body": piece, "more_body": True})
                await asyncio.sleep(0)
            parts = []
        await self._send({"type": "http.response.body", "body": b"".join(parts), "more_body": False})

    async def reply_parts(
        self, parts: AsyncIterator[bytes], *, length: int, content_type: bytes, stalled_s: float
    ) -> None:
        """A long answer. Raises ClientGone where the client takes nothing for `stalled_s`."""
        await self._start(200, [(b"content-type", content_type), (b"content-length", str(length).encode())])
        try:
            async for part in parts:
                sending = self._send({"type": "http.response.body", "body": part, "more_body": True})
                await asyncio.wait_for(sending, stalled_s)
        except TimeoutError as error:
            raise ClientGone from error
        await self._send({"type": "http.response.body", "body": b"", "more_body": False})

    async def reply_empty(self, headers: Headers) -> None:
        await self._start(204, headers)
        await self._send({"type": "http.response.body", "body": b"", "more_body": False})

    async def reply_preflight(self, methods: Collection[str]) -> None:
        """The answer to OPTIONS: needs no key, as browsers send none with it."""
        headers = [(b"allow", ", ".join(methods).encode())]
        if self.cors is not None and b"access-control-request-method" in self._headers:
            wanted = self._headers.get(b"access-control-request-headers", b"")
            headers += self.cors.preflight(self._headers.get(b"origin"), methods, wanted)
            self.cors = None  # that said it all
        await self.reply_empty(headers)

    async def reply_json(self, value: Any, *, status: int = 200, headers: Headers | None = None) -> None:
        await self.reply(msgspec.json.encode(value), status=status, headers=headers)

    async def reply_error(self, error: TandemError, headers: Headers | None = None) -> None:
        """The rest of an unread body is discarded by the server: closing at once could destroy the answer."""
        all_headers = error_headers(error) + (headers or [])
        body = anthropic_error(error, self.request_id) if self.anthropic else error_body(error)
        await self.reply_json(body, status=error.kind.http_status, headers=all_headers)

    async def start_events(self) -> None:
        """Begins a stream of events."""
        await self._start(
            200,
            [
                (b"content-type", b"text/event-stream; charset=utf-8"),
                (b"cache-control", b"no-cache"),
                (b"x-accel-buffering", b"no"),
            ],
        )

    async def send_events(self, events: bytes, *, last: bool = False) -> None:
        await self._send({"type": "http.response.body", "body": events, "more_body": not last})

    async def _start(self, status: int, headers: Headers) -> None:
        self.status = status
        headers.append((b"x-request-id", self.request_id.encode()))
        if self.ignored:
            headers.append((IGNORED_HEADER, header_list(self.ignored)))
        if self.anthropic:
            headers.append((b"request-id", self.request_id.encode()))
        if self.accounts is not None and not self.caller.rates.unlimited:
            headers += self.accounts.limits.headers(self.caller)
        if self.cors is not None:
            headers += self.cors.answer(self._headers.get(b"origin"), headers)
        await self._send({"type": "http.response.start", "status": status, "headers": headers, "trailers": False})

    def _too_large(self) -> TandemError:
        return TandemError("request_too_large", f"the body is larger than {self._max_body_bytes} bytes")


def _in_pieces(parts: Sequence[bytes]) -> Iterator[bytes]:
    """The same bytes, at most PIECE_BYTES at a time."""
    held: list[bytes] = []
    size = 0
    for part in parts:
        for start in range(0, len(part), PIECE_BYTES):
            piece = part[start : start + PIECE_BYTES]
            if size + len(piece) > PIECE_BYTES:
                yield b"".join(held)
                held, size = [], 0
            held.append(piece)
            size += len(piece)
    yield b"".join(held)


def header_list(names: Iterable[str]) -> bytes:
    """Each once, separated by commas; what is no printable ASCII is escaped, what is too long is left out."""
    listed = b", ".join(name.encode("unicode_escape").replace(b",", b"\\x2c") for name in dict.fromkeys(names))
    return listed if len(listed) <= MAX_LISTED_BYTES else listed[: MAX_LISTED_BYTES - 3] + b"..."
