"""Errors as OpenAI writes them, and as Anthropic does."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import msgspec
from msgspec.inspect import DictType, ListType, LiteralType, StructType, Type, UnionType

from tandem.common.errors import TandemError

MAX_MESSAGE_CHARACTERS = 500
ANTHROPIC_PATH = "/v1/messages"
ANTHROPIC_HEADER = b"anthropic-version"
_ANTHROPIC_TYPES = {
    400: "invalid_request_error",
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    413: "request_too_large",
    429: "rate_limit_error",
    503: "overloaded_error",
    504: "timeout_error",
}
"""Anthropic's types of errors, by HTTP status."""
_PATH = re.compile(r" - at `(?:key in )?\$\.?(.{0,200}?)`$")
_MISSING = re.compile(r"required field `(\w{1,64})`")
_STEP = re.compile(r"\[[^\]]*\]|[^.\[]+")
"""One step of a path such as `messages[0].role`."""


def error_body(error: TandemError) -> dict[str, Any]:
    """JSON of an error in OpenAI's shape."""
    return {
        "error": {
            "message": error.message[:MAX_MESSAGE_CHARACTERS],
            "type": error.kind.openai_type,
            "param": error.param,
            "code": error.code,
        }
    }


def anthropic_error(error: TandemError, request_id: str) -> dict[str, Any]:
    """JSON of an error in Anthropic's shape."""
    status = error.kind.http_status
    kind = _ANTHROPIC_TYPES.get(status, "invalid_request_error" if status < 500 else "api_error")
    message = error.message[:MAX_MESSAGE_CHARACTERS]
    return {"type": "error", "error": {"type": kind, "message": message}, "request_id": request_id}


@contextmanager
def renaming(names: Sequence[tuple[str, str]]) -> Iterator[None]:
    """Errors of what is done in it name the fields of another API. `names`: prefixes of our field names, as patterns,
    and theirs."""
    try:
        yield
    except TandemError as error:
        raise _renamed(error, names) from error


def _renamed(error: TandemError, names: Sequence[tuple[str, str]]) -> TandemError:
    old = error.param
    if old is None:
        return error
    new = renamed(old, names)
    message = new + error.message.removeprefix(old) if error.message.startswith(old) else error.message
    return TandemError(error.code, message, param=new, retry_after_s=error.retry_after_s)


def renamed(field: str, names: Sequence[tuple[str, str]]) -> str:
    """`field` as another API calls it, see `renaming`."""
    for pattern, replacement in names:
        new, found = re.subn(rf"^{pattern}(?![a-z_])", replacement, field)
        if found:
            return new
    return field


def error_headers(error: TandemError) -> list[tuple[bytes, bytes]]:
    """Headers that an error has in its answer."""
    headers: list[tuple[bytes, bytes]] = []
    retry_after_s = error.retry_after_s
    if retry_after_s is None and error.kind.http_status == 503:
        retry_after_s = 1.0
    if retry_after_s is not None:
        headers.append((b"retry-after", str(max(1, math.ceil(retry_after_s))).encode()))
    if error.kind.http_status == 401:
        headers.append((b"www-authenticate", b"Bearer"))
    return headers


def from_decode_error(error: Exception, body: Any = None) -> TandemError:
    """A body that msgspec could not decode, as an error that names the field.

    `body`: its type. Where a field takes a few words only, the error lists them.
    """
    if not isinstance(error, msgspec.ValidationError):
        return TandemError("invalid_request", f"the body is not valid JSON: {str(error)[:120]}")
    message = str(error)
    found = _PATH.search(message)
    param = found.group(1) or None if found else None
    problem = message[: found.start()] if found else message
    missing = _MISSING.search(problem)
    if missing:
        param = f"{param}.{missing.group(1)}" if param else missing.group(1)
        return TandemError("invalid_request", f"{param} is required", param=param)
    if problem.startswith("Invalid enum value") and param and (words := _words(body, param)):
        these = f"one of {', '.join(words)}" if len(words) > 1 else words[0]
        return TandemError("invalid_request", f"{param} must be {these}", param=param)
    if len(problem) > 160:  # an unknown enum value is quoted in full
        problem = problem[:80] + "..." + problem[-10:]
    return TandemError("invalid_request", f"{param or 'body'}: {problem}", param=param)


def _words(body: Any, path: str) -> list[str]:
    """What the field at `path` of a body may be; empty where that is no short list."""
    kinds = [msgspec.inspect.type_info(body)]
    for step in _STEP.findall(path):
        kinds = [inner for kind in _alternatives(kinds) for inner in _inside(kind, step)]
    return [str(word) for kind in _alternatives(kinds) if isinstance(kind, LiteralType) for word in kind.values]


def _alternatives(kinds: Sequence[Type]) -> list[Type]:
    return [each for kind in kinds for each in (kind.types if isinstance(kind, UnionType) else (kind,))]


def _inside(kind: Type, step: str) -> list[Type]:
    """`step`: the name of a field, `[3]` or `[...]`."""
    if isinstance(kind, StructType):
        return [field.type for field in kind.fields if field.encode_name == step]
    if isinstance(kind, ListType):
        return [kind.item_type]
    return [kind.value_type] if isinstance(kind, DictType) else []
