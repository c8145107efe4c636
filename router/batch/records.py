"""What is kept about files and batches, and how OpenAI writes it."""

from __future__ import annotations

import secrets
from dataclasses import dataclass, field
from typing import Any, Literal

BATCH_WINDOW_S = 24 * 3600
COMPLETION_WINDOW = "24h"
KEPT_S = 30 * 24 * 3600
"""Files and the records of ended batches are dropped after this long, as OpenAI's."""

Purpose = Literal["batch", "batch_output"]
Status = Literal["validating", "in_progress", "finalizing", "completed", "failed", "cancelling", "cancelled", "expired"]
UNFINISHED: tuple[Status, ...] = ("validating", "in_progress", "finalizing", "cancelling")


@dataclass(frozen=True, slots=True)
class FileRecord:
    """One file of a tenant. Times are whole seconds since 1970."""

    id: str
    tenant: str
    filename: str
    purpose: Purpose
    bytes: int
    created_at: int
    expires_at: int

    def shape(self) -> dict[str, Any]:
        """JSON of /v1/files."""
        return {
            "id": self.id,
            "object": "file",
            "bytes": self.bytes,
            "created_at": self.created_at,
            "expires_at": self.expires_at,
            "filename": self.filename,
            "purpose": self.purpose,
            "status": "processed",
        }


@dataclass(frozen=True, slots=True)
class BatchError:
    """Why a batch failed as a whole."""

    code: str
    message: str
    line: int | None = None
    param: str | None = None


@dataclass(frozen=True, slots=True)
class Counts:
    total: int = 0
    completed: int = 0
    failed: int = 0


@dataclass(frozen=True, slots=True)
class BatchRecord:
    """One batch of a tenant and how far it is. Times are whole seconds since 1970."""

    id: str
    tenant: str
    endpoint: str
    input_file_id: str
    created_at: int
    output_name: str
    """Id of the output file once there is one; the file grows under this name while the batch runs."""
    error_name: str
    status: Status = "validating"
    output_expires_after_s: int = KEPT_S
    metadata: dict[str, str] = field(default_factory=dict)
    counts: Counts = Counts()
    errors: tuple[BatchError, ...] = ()
    output_file_id: str | None = None
    error_file_id: str | None = None
    in_progress_at: int | None = None
    finalizing_at: int | None = None
    cancelling_at: int | None = None
    ended_at: int | None = None

    @property
    def expires_at(self) -> int:
        return self.created_at + BATCH_WINDOW_S

    @property
    def unfinished(self) -> bool:
        return self.status in UNFINISHED

    def shape(self) -> dict[str, Any]:
        """JSON of /v1/batches."""

        def ended(status: Status) -> int | None:
            return self.ended_at if self.status == status else None

        return {
            "id": self.id,
            "object": "batch",
            "endpoint": self.endpoint,
            "errors": {"object": "list", "data": self.errors} if self.errors else None,
            "input_file_id": self.input_file_id,
            "completion_window": COMPLETION_WINDOW,
            "status": self.status,
            "output_file_id": self.output_file_id,
            "error_file_id": self.error_file_id,
            "created_at": self.created_at,
            "in_progress_at": self.in_progress_at,
            "expires_at": self.expires_at,
            "finalizing_at": self.finalizing_at,
            "completed_at": ended("completed"),
            "failed_at": ended("failed"),
            "expired_at": ended("expired"),
            "cancelling_at": self.cancelling_at,
            "cancelled_at": ended("cancelled"),
            "request_counts": self.counts,
            "metadata": self.metadata or None,
        }


def new_id(kind: Literal["file", "batch"]) -> str:
    """Hard to guess, safe as the name of a file."""
    return f"{kind}-{secrets.token_hex(12)}" if kind == "file" else f"{kind}_{secrets.token_hex(12)}"
