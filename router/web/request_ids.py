"""Ids that clients may give a request: its own, and that of the trace it belongs to."""

from __future__ import annotations

import re
import secrets

from tandem.router.fields.sampling import invalid

_SANE_REQUEST_ID = re.compile(r"[A-Za-z0-9._:\-]{1,128}")
_TRACEPARENT = re.compile(r"[0-9a-f]{2}-[0-9a-f]{32}-[0-9a-f]{16}-[0-9a-f]{2}")


def request_id_of(given: str) -> str:
    """The client's own where it is one; else a new one."""
    return given if _SANE_REQUEST_ID.fullmatch(given) else secrets.token_hex(16)


def named_in_body(given: str | None, otherwise: str) -> str:
    """The request's id, where the client has put one into the body. Raises TandemError `invalid_request`."""
    if given is None:
        return otherwise
    if not _SANE_REQUEST_ID.fullmatch(given):
        raise invalid("request_id", "must be 1 to 128 letters, digits, dots, colons, dashes or underscores")
    return given


def traceparent_of(given: str) -> str:
    """Empty where it is malformed."""
    return given if _TRACEPARENT.fullmatch(given) else ""
