"""/v1/files: what batches read and write, in OpenAI's shape."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable
from typing import TYPE_CHECKING, Any

from python_multipart.exceptions import MultipartParseError
from python_multipart.multipart import MultipartParser, parse_options_header

from tandem.common.errors import TandemError
from tandem.router.batch.files import MAX_FILE_BYTES
from tandem.router.batch.records import KEPT_S
from tandem.router.fields.sampling import in_range, invalid
from tandem.router.service import Service
from tandem.router.web.exchange import Exchange
from tandem.router.web.paging import page, page_size
from tandem.router.web.request_fields import typing_error

if TYPE_CHECKING:
    from tandem.router.batch.lane import BatchLane

MAX_PAGE = 10_000
MIN_KEPT_S = 3600
STALLED_S = 60.0
"""An upload or download that does not move for so long is cut off."""
FORM_PIECE_BYTES = 16 * 1024
"""The form's parser goes through what is no file byte by byte; between two pieces the event loop turns."""
MAX_FIELDS = 16
MAX_HEADER_BYTES = 4096
"""Bound of one part of the form."""
MAX_NAME = 64
MAX_FIELD_BYTES = 1024
MAX_FORM_BYTES = MAX_FILE_BYTES + (1 << 20)
MAX_FILENAME = 255

_FIELDS = ("purpose", "file", "expires_after[anchor]", "expires_after[seconds]")
_PREFIX = "/v1/files/"
_CONTENT = "/content"


def by_id(path: str) -> dict[str, Callable[[Exchange, Service], Awaitable[None]]]:
    """Handlers of everything below /v1/files/."""
    if path.endswith(_CONTENT):
        return {"GET": content}
    return {"GET": get, "DELETE": delete}


def lane_of(service: Service) -> BatchLane:
    if service.batches is None:
        raise TandemError("not_found", "This router keeps no files; its setting storage names a folder for them.")
    return service.batches


async def upload(exchange: Exchange, service: Service) -> None:
    """POST /v1/files: takes the file as it comes, straight to the disk."""
    storage = lane_of(service).storage
    form = _Form(exchange.header(b"content-type"))
    length = exchange.header(b"content-length")
    if length.isdigit() and int(length) > MAX_FORM_BYTES:
        raise _too_large()
    size = 0
    async with storage.upload(exchange.caller.tenant) as file:
        async for part in exchange.parts(stalled_s=STALLED_S):
            size += len(part)
            if size > MAX_FORM_BYTES:
                raise _too_large()
            for start in range(0, len(part), FORM_PIECE_BYTES):
                for data in form.feed(part[start : start + FORM_PIECE_BYTES]):
                    await file.write(data)
                await asyncio.sleep(0)
        filename = form.check()
        exchange.ignore(form.ignored)
        record = await file.finish(filename, form.kept_s())
    await exchange.reply_json(record.shape())


async def list_files(exchange: Exchange, service: Service) -> None:
    """GET /v1/files: a page of the tenant's files."""
    storage = lane_of(service).storage
    query = exchange.query()
    limit = page_size(query, MAX_PAGE, MAX_PAGE)
    wanted = query.get("order", "desc")
    if wanted not in ("asc", "desc"):
        raise invalid("order", "must be asc or desc")
    after, purpose, tenant = query.get("after", ""), query.get("purpose", ""), exchange.caller.tenant
    records, more = await storage.call(
        lambda index: index.files(
            tenant,
            time.time(),
            purpose=purpose,
            after=after,
            limit=limit,
            order="asc" if wanted == "asc" else "desc",
        )
    )
    await exchange.reply_json(page([record.shape() for record in records], more))


async def get(exchange: Exchange, service: Service) -> None:
    file_id, tenant = exchange.path.removeprefix(_PREFIX), exchange.caller.tenant
    record = await lane_of(service).storage.call(lambda index: index.file(tenant, file_id, time.time()))
    await exchange.reply_json(record.shape())


async def content(exchange: Exchange, service: Service) -> None:
    """GET /v1/files/{id}/content: the bytes of a file."""
    storage = lane_of(service).storage
    file_id, tenant = exchange.path.removeprefix(_PREFIX).removesuffix(_CONTENT), exchange.caller.tenant
    record = await storage.call(lambda index: index.file(tenant, file_id, time.time()))
    await exchange.reply_parts(
        storage.content(record.id), length=record.bytes, content_type=b"application/octet-stream", stalled_s=STALLED_S
    )


async def delete(exchange: Exchange, service: Service) -> None:
    file_id = exchange.path.removeprefix(_PREFIX)
    await lane_of(service).storage.delete(exchange.caller.tenant, file_id)
    await exchange.reply_json({"id": file_id, "object": "file", "deleted": True})


def kept_for(seconds: Any, anchor: Any, param: str) -> int:
    """OpenAI's `expires_after`; both None: the default. Raises TandemError `invalid_request`."""
    if seconds is None and anchor is None:
        return KEPT_S
    if anchor != "created_at":
        raise invalid(f"{param}[anchor]", "must be created_at")
    if not isinstance(seconds, int):
        raise invalid(f"{param}[seconds]", "must be a whole number of seconds")
    in_range(f"{param}[seconds]", seconds, MIN_KEPT_S, KEPT_S)
    return seconds


class _Form:
    """A multipart form as it comes: short fields are kept, the file's bytes are passed on."""

    def __init__(self, content_type: str) -> None:
        kind, options = parse_options_header(content_type)
        boundary = options.get(b"boundary", b"")
        if kind != b"multipart/form-data" or not 0 < len(boundary) <= 200:
            raise TandemError(
                "invalid_request", "send the file as multipart/form-data, with the fields purpose and file"
            )
        self._fields: dict[str, bytes] = {}
        self._filename: str | None = None
        self._ended = False
        self._file_data: list[bytes] = []
        self._header = ("", "")
        self._header_bytes = 0
        self._disposition = ""
        self._name = ""
        self._in_file = False
        self._parser = MultipartParser(
            boundary,
            {
                "on_part_begin": self._part_begins,
                "on_header_field": self._header_name,
                "on_header_value": self._header_value,
                "on_header_end": self._header_ends,
                "on_headers_finished": self._headers_end,
                "on_part_data": self._data,
                "on_end": self._ends,
            },
        )

    def feed(self, data: bytes) -> list[bytes]:
        """What came of the file."""
        try:
            self._parser.write(data)
        except MultipartParseError as error:
            raise TandemError("invalid_request", f"the form is malformed: {str(error)[:100]}") from error
        found, self._file_data = self._file_data, []
        return found

    def check(self) -> str:
        """The file's name. Raises TandemError `invalid_request`."""
        if not self._ended:
            raise TandemError("invalid_request", "the form is incomplete: its last boundary is missing")
        purpose = self._fields.get("purpose", b"")
        if purpose != b"batch":
            raise invalid("purpose", "is required and must be batch")
        if self._filename is None:
            raise invalid("file", "is required, as a part with a filename")
        return self._filename

    @property
    def ignored(self) -> list[str]:
        """Fields that have no effect."""
        return [name for name in self._fields if name not in _FIELDS]

    def kept_s(self) -> int:
        """Seconds that the file is to be kept. Raises TandemError `invalid_request` naming `expires_after`."""
        seconds = self._fields.get("expires_after[seconds]")
        anchor = self._fields.get("expires_after[anchor]")
        number = int(seconds) if seconds is not None and seconds.isdigit() and len(seconds) < 12 else None
        if seconds is not None and number is None:
            raise invalid("expires_after[seconds]", "must be a whole number of seconds")
        return kept_for(number, None if anchor is None else anchor.decode("utf-8", "replace"), "expires_after")

    def _part_begins(self) -> None:
        self._header_bytes = 0
        self._disposition = self._name = ""
        self._in_file = False

    def _count_header(self, size: int) -> None:
        self._header_bytes += size
        if self._header_bytes > MAX_HEADER_BYTES:
            raise TandemError(
                "invalid_request", f"headers of a part of the form may have at most {MAX_HEADER_BYTES} bytes"
            )

    def _header_name(self, data: bytes, start: int, end: int) -> None:
        self._count_header(end - start)
        self._header = (self._header[0] + data[start:end].decode("latin-1"), self._header[1])

    def _header_value(self, data: bytes, start: int, end: int) -> None:
        self._count_header(end - start)
        self._header = (self._header[0], self._header[1] + data[start:end].decode("latin-1"))

    def _header_ends(self) -> None:
        name, value = self._header
        self._header = ("", "")
        if name.lower() == "content-disposition":
            self._disposition = value

    def _headers_end(self) -> None:
        _, options = parse_options_header(self._disposition)
        self._name = options.get(b"name", b"").decode("utf-8", "replace")[:MAX_NAME]
        if self._name == "file":
            if self._filename is not None:
                raise invalid("file", "must come once")
            if b"filename" not in options:
                raise invalid("file", "must be a part with a filename")
            self._filename = _clean(options[b"filename"].decode("utf-8", "replace"))
            self._in_file = True
        elif meant := None if self._name in _FIELDS else typing_error(self._name, _FIELDS):
            raise invalid(self._name, f"is not known; did you mean {meant}?")
        elif self._name in self._fields:
            raise invalid(self._name, "must come once")
        elif len(self._fields) >= MAX_FIELDS:
            raise TandemError("invalid_request", f"the form may have at most {MAX_FIELDS} fields beside the file")
        else:
            self._fields[self._name] = b""

    def _data(self, data: bytes, start: int, end: int) -> None:
        if self._in_file:
            self._file_data.append(data[start:end])
            return
        value = self._fields[self._name] + data[start:end]
        if len(value) > MAX_FIELD_BYTES:
            raise invalid(self._name, f"may have at most {MAX_FIELD_BYTES} bytes")
        self._fields[self._name] = value

    def _ends(self) -> None:
        self._ended = True


def _clean(filename: str) -> str:
    """Only shown, never opened."""
    name = filename.replace("\\", "/").rsplit("/", 1)[-1]
    printable = "".join(character for character in name if character.isprintable())
    return printable[:MAX_FILENAME] or "file.jsonl"


def _too_large() -> TandemError:
    return TandemError("request_too_large", f"the file is larger than {MAX_FILE_BYTES} bytes; split it", param="file")
