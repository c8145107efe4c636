"""Errors as gRPC carries them: a status, and in the trailing metadata what HTTP has in body and headers, also as the
details that Google's clients read (google.rpc.Status)."""

from __future__ import annotations

from google.protobuf.duration_pb2 import Duration
from google.rpc.error_details_pb2 import BadRequest, ErrorInfo, RetryInfo
from google.rpc.status_pb2 import Status
from grpc import StatusCode

from tandem.common.errors import TandemError
from tandem.router.web.errors import MAX_MESSAGE_CHARACTERS, error_headers

DOMAIN = "tandem"
DETAILS_KEY = "grpc-status-details-bin"
MAX_PARAM_CHARACTERS = 256

Metadata = tuple[tuple[str, str | bytes], ...]


def status_of(error: TandemError) -> tuple[StatusCode, str, Metadata]:
    """Code, message and trailing metadata."""
    code = StatusCode[error.kind.grpc_code]
    message = error.message[:MAX_MESSAGE_CHARACTERS]
    headers = {name.decode(): value.decode() for name, value in error_headers(error)}
    metadata: list[tuple[str, str | bytes]] = [("tandem-error", error.code), *headers.items()]
    status = Status(code=code.value[0], message=message)
    status.details.add().Pack(ErrorInfo(reason=error.code.upper(), domain=DOMAIN))
    if error.param:
        metadata.append(("tandem-param", _ascii(error.param)))
        violation = BadRequest.FieldViolation(field=error.param[:MAX_PARAM_CHARACTERS], description=message)
        status.details.add().Pack(BadRequest(field_violations=[violation]))
    if (seconds := headers.get("retry-after")) is not None:
        status.details.add().Pack(RetryInfo(retry_delay=Duration(seconds=int(seconds))))
    metadata.append((DETAILS_KEY, status.SerializeToString()))
    return code, message, tuple(metadata)


def _ascii(text: str) -> str:
    """What metadata can hold."""
    return text[:MAX_PARAM_CHARACTERS].encode("unicode_escape").decode("ascii")
