"""Lines of a batch: the requests in its input file, and the results that it appends to its two files.

The result files are the journal: a request is done when its result is a whole line there. So a crash costs what was
in flight, and nothing is run again or written twice. Everything here blocks; see `Storage.call`.
"""

from __future__ import annotations

import codecs
import os
import secrets
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import msgspec

from tandem.common.errors import TandemError
from tandem.common.private import private_opener
from tandem.router.batch.files import write_all
from tandem.router.batch.records import BatchError, Counts
from tandem.router.fields.strict import Fields
from tandem.router.web.request_fields import BodyReader, log_ignored

MAX_LINES = 50_000
MAX_CUSTOM_ID = 512
MAX_ERRORS = 20
"""Bad lines that are reported; there may be more."""


class _InputLine(Fields):
    custom_id: str
    method: str
    url: str
    body: dict[str, Any]


class _RequestOfLine(msgspec.Struct):
    body: msgspec.Raw


class _ResultLine(msgspec.Struct):
    custom_id: str


_INPUT = BodyReader(_InputLine)
_REQUEST = msgspec.json.Decoder(_RequestOfLine)
_RESULT = msgspec.json.Decoder(_ResultLine)


@dataclass(frozen=True, slots=True)
class Line:
    """One request of the input file, by place."""

    custom_id: str
    offset: int
    length: int


def read_lines(file: BinaryIO, endpoint: str, max_line_bytes: int) -> tuple[list[Line], list[BatchError]]:
    """Every request, or what is wrong with the file."""
    lines: list[Line] = []
    errors: list[BatchError] = []
    seen: set[str] = set()
    offset = number = 0
    while len(errors) < MAX_ERRORS:
        raw = file.readline(max_line_bytes + 1)
        if not raw:
            break
        number += 1
        if number == 1 and raw.startswith(codecs.BOM_UTF8):  # editors on Windows put it there
            offset, raw = len(codecs.BOM_UTF8), raw.removeprefix(codecs.BOM_UTF8)
        if len(raw) > max_line_bytes:
            errors.append(BatchError("request_too_large", f"the line is longer than {max_line_bytes} bytes", number))
            break
        if raw.strip():
            found = _checked(raw, endpoint, seen, number)
            if isinstance(found, BatchError):
                errors.append(found)
            else:
                seen.add(found)
                lines.append(Line(found, offset, len(raw)))
        if len(lines) > MAX_LINES:
            errors.append(BatchError("too_many_lines", f"a batch may have at most {MAX_LINES} requests; split it"))
            break
        offset += len(raw)
    if not lines and not errors:
        errors.append(BatchError("empty_file", "the input file holds no request"))
    return lines, errors


def _checked(raw: bytes, endpoint: str, seen: Collection[str], number: int) -> str | BatchError:
    """The line's custom_id."""
    try:
        line, ignored = _INPUT.read(raw)
        log_ignored(ignored, "batches")
    except TandemError as wrong:
        problem = wrong.message.replace("the body is", "the line is", 1) if wrong.param is None else wrong.message
        return BatchError("invalid_json_line", problem, number, wrong.param)
    if not 0 < len(line.custom_id) <= MAX_CUSTOM_ID:
        problem = f"custom_id must have 1 to {MAX_CUSTOM_ID} characters"
        return BatchError("invalid_custom_id", problem, number, "custom_id")
    if line.custom_id in seen:
        return BatchError(
            "duplicate_custom_id", f"custom_id {line.custom_id[:64]!r} is used before", number, "custom_id"
        )
    if line.method != "POST":
        return BatchError("invalid_method", f"method must be POST, not {line.method[:16]!r}", number, "method")
    if line.url != endpoint:
        problem = f"url must be the batch's endpoint {endpoint}, not {line.url[:64]!r}"
        return BatchError("mismatched_endpoint", problem, number, "url")
    return line.custom_id


def request_json(file: BinaryIO, line: Line) -> bytes:
    """The body of a request, as it stands in a line that `read_lines` has found good."""
    raw = os.pread(file.fileno(), line.length, line.offset)
    return bytes(_REQUEST.decode(raw).body)


def answered_line(custom_id: str, request_id: str, status: int, body: bytes) -> bytes:
    """The result of a request that got an answer, good or bad."""
    response = {"status_code": status, "request_id": request_id, "body": msgspec.Raw(body)}
    return _encoded(custom_id, response, None)


def unanswered_line(custom_id: str, code: str, message: str) -> bytes:
    return _encoded(custom_id, None, {"code": code, "message": message})


def _encoded(custom_id: str, response: dict[str, Any] | None, error: dict[str, str] | None) -> bytes:
    value = {
        "id": f"batch_req_{secrets.token_hex(12)}",
        "custom_id": custom_id,
        "response": response,
        "error": error,
    }
    return msgspec.json.encode(value) + b"\n"


class Results:
    """The output and error files of one batch while it runs, whichever process began them."""

    def __init__(self, output: Path, errors: Path) -> None:
        self.done: set[str] = set()
        """custom_ids with a result."""
        self._output = _Journal(output, self.done)
        self._errors = _Journal(errors, self.done)

    def counts(self, total: int) -> Counts:
        return Counts(total, self._output.lines, self._errors.lines)

    def add(self, custom_id: str, line: bytes, *, failed: bool) -> None:
        """Raises OSError where the disk is full: then there is no result."""
        (self._errors if failed else self._output).append(line)
        self.done.add(custom_id)

    def finish(self) -> tuple[int, int]:
        """Sizes of both files, which are on the disk now."""
        return self._output.finish(), self._errors.finish()

    def close(self) -> None:
        self._output.close()
        self._errors.close()


class _Journal:
    def __init__(self, path: Path, done: set[str]) -> None:
        """Adds what it finds to `done`, and cuts off what a crash left after the last whole line."""
        self._file = os.fdopen(private_opener(path, os.O_RDWR | os.O_CREAT | os.O_APPEND), "a+b", buffering=0)
        self.lines = 0
        self._size = 0
        with path.open("rb") as before:
            for raw in before:
                try:
                    custom_id = _RESULT.decode(raw).custom_id if raw.endswith(b"\n") else ""
                except (msgspec.MsgspecError, UnicodeDecodeError):
                    break
                if not custom_id:
                    break
                done.add(custom_id)
                self.lines += 1
                self._size += len(raw)
        self._file.truncate(self._size)

    def append(self, line: bytes) -> None:
        """Writes one whole line. Raises OSError where that fails, and then none of it stays."""
        try:
            write_all(self._file.fileno(), line)
        except OSError:
            self._file.truncate(self._size)
            raise
        self.lines += 1
        self._size += len(line)

    def finish(self) -> int:
        os.fsync(self._file.fileno())
        return self._size

    def close(self) -> None:
        self._file.close()
