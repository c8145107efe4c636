"""Every error a user can meet, with its HTTP status and gRPC code in one table.

Raised anywhere; turned into an OpenAI-shaped body by `router/web/errors.py`, into a gRPC status by the servers, and
sent between processes as `WorkerError{code, message, retriable}`.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class ErrorKind:
    """One row of the table."""

    http_status: int
    grpc_code: str
    """Name of a member of grpc.StatusCode; a name, so that processes without gRPC need not load it."""
    openai_type: str
    retriable: bool
    """Whether the same request may succeed elsewhere or a moment later."""


ERROR_KINDS: dict[str, ErrorKind] = {
    "invalid_request": ErrorKind(400, "INVALID_ARGUMENT", "invalid_request_error", False),
    "context_length_exceeded": ErrorKind(400, "INVALID_ARGUMENT", "invalid_request_error", False),
    "invalid_api_key": ErrorKind(401, "UNAUTHENTICATED", "authentication_error", False),
    "permission_denied": ErrorKind(403, "PERMISSION_DENIED", "permission_error", False),
    "model_not_found": ErrorKind(404, "NOT_FOUND", "invalid_request_error", False),
    "not_found": ErrorKind(404, "NOT_FOUND", "invalid_request_error", False),
    "method_not_allowed": ErrorKind(405, "UNIMPLEMENTED", "invalid_request_error", False),
    "request_too_large": ErrorKind(413, "RESOURCE_EXHAUSTED", "invalid_request_error", False),
    "rate_limit_exceeded": ErrorKind(429, "RESOURCE_EXHAUSTED", "rate_limit_error", True),
    "overloaded": ErrorKind(503, "RESOURCE_EXHAUSTED", "overloaded_error", True),
    "unavailable": ErrorKind(503, "UNAVAILABLE", "unavailable_error", True),
    "worker_lost": ErrorKind(503, "UNAVAILABLE", "unavailable_error", True),
    "deadline_exceeded": ErrorKind(504, "DEADLINE_EXCEEDED", "timeout_error", True),
    "cancelled": ErrorKind(499, "CANCELLED", "cancelled_error", False),
    # One request's own, as long as it does not befall others too: another worker would fail with it as well.
    "computation_failed": ErrorKind(500, "INTERNAL", "server_error", False),
    "internal": ErrorKind(500, "INTERNAL", "server_error", False),
}


class TandemError(Exception):
    """An error with a row in `ERROR_KINDS`.

    `param` names the request field at fault (OpenAI's `error.param`); `retry_after_s` becomes `Retry-After`.
    """

    def __init__(
        self, code: str, message: str, *, param: str | None = None, retry_after_s: float | None = None
    ) -> None:
        super().__init__(message)
        self.code = code if code in ERROR_KINDS else "internal"
        self.message = message
        self.param = param
        self.retry_after_s = retry_after_s

    @property
    def kind(self) -> ErrorKind:
        return ERROR_KINDS[self.code]


class ConfigError(Exception):
    """A setting, file or model folder that cannot be used. The message names it and the remedy; the CLI prints it
    without a traceback and exits with status 2."""
