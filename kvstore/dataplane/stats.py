"""What the data plane counts."""

from __future__ import annotations

import threading
from dataclasses import dataclass, fields, replace


@dataclass(frozen=True, slots=True)
class DataPlaneStats:
    """Since the start of the server, but for `connections`."""

    connections: int = 0
    """Open now."""
    refused_connections: int = 0
    """Wrong secret, other version, no room."""
    malformed_frames: int = 0
    leased_ranges: int = 0
    """Read by peers straight from the arena: through shared memory, or over NIXL."""
    sent_ranges: int = 0
    missed_ranges: int = 0
    """Asked for by a peer and not there."""
    sent_encoded: int = 0
    """Whole objects under another codec."""
    missed_encoded: int = 0
    sent_bytes: int = 0
    received_bytes: int = 0
    """Replicas."""


class Counters:
    """Safe from any thread."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._values = dict.fromkeys((field.name for field in fields(DataPlaneStats)), 0)

    def add(self, name: str, count: int = 1) -> None:
        with self._lock:
            self._values[name] += count

    def snapshot(self, connections: int) -> DataPlaneStats:
        with self._lock:
            return replace(DataPlaneStats(**self._values), connections=connections)
