"""Settings of a prefill worker."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from tandem.common.settings import Group
from tandem.worker.settings import WorkerConfig


@dataclass(frozen=True, slots=True, kw_only=True)
class PrefillConfig(WorkerConfig):
    """Nothing beyond an engine and its address: where KV goes is said by each request."""

    basics: ClassVar[Group]
    listen: str = "127.0.0.1:9100"
    """Address of the gRPC service: HOST:PORT, or unix:/path for routers on the same host."""
