"""Errors as OpenAI writes them, and as Anthropic does."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from typing import Any

import msgspec

from tandem.common.errors import TandemError

MAX_MESSAGE_CHARACTERS = 500
ANTHROPIC_PATH = "/v1/messages"
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
"""By HTTP status."""
_PATH = re.compile(r" - at `(?:key in )?\$\.?(.{0,200}?)`$")
_MISSING = re.compile(r"required field `(\w{1,64})`")


def error_body(error: TandemError, path: str = "") -> dict[str, Any]:
    """`path`: of the request; Anthropic's clients get errors in their own shape."""
    if path == ANTHROPIC_PATH:
        return anthropic_error(error)
    return {
        "error": {
            "message": error.message[:MAX_MESSAGE_CHARACTERS],
            "type": error.kind.openai_type,
            "param": error.param,
            "code": error.code,
        }
    }


def anthropic_error(error: TandemError) -> dict[str, Any]:
    kind = _ANTHROPIC_TYPES.get(error.kind.http_status, "api_error")
    return {"type": "error", "error": {"type": kind, "message": error.message[:MAX_MESSAGE_CHARACTERS]}}


def renamed(error: TandemError, names: Sequence[tuple[str, str]]) -> TandemError:
    """The same error for a client of another API. `names`: prefixes of our field names, as patterns, and theirs."""
    old = error.param
    if old is None:
        return error
    for pattern, replacement in names:
        new, found = re.subn(rf"^{pattern}(?![a-z_])", replacement, old)
        if found:
            message = new + error.message.removeprefix(old) if error.message.startswith(old) else error.message
            return TandemError(error.code, message, param=new, retry_after_s=error.retry_after_s)
    return error


def error_headers(error: TandemError) -> list[tuple[bytes, bytes]]:
    headers: list[tuple[bytes, bytes]] = []
    retry_after_s = error.retry_after_s
    if retry_after_s is None and error.kind.http_status == 503:
        retry_after_s = 1.0
    if retry_after_s is not None:
        headers.append((b"retry-after", str(max(1, math.ceil(retry_after_s))).encode()))
    if error.kind.http_status == 401:
        headers.append((b"www-authenticate", b"Bearer"))
    return headers


def from_decode_error(error: Exception) -> TandemError:
    """A body that msgspec could not decode, as an error that names the field."""
    if not isinstance(error, msgspec.ValidationError):
        return TandemError("invalid_request", f"the body is not valid JSON: {str(error)[:120]}")
    message = str(error)
    found = _PATH.search(message)
    param = found.group(1) or None if found else None
    problem = message[: found.start()] if found else message
    missing = _MISSING.search(problem)
    if missing:
        param = f"{param}.{missing.group(1)}" if param else missing.group(1)
    if len(problem) > 160:  # an unknown enum value is quoted in full
        problem = problem[:80] + "..." + problem[-10:]
    return TandemError("invalid_request", f"{param or 'body'}: {problem}", param=param)
