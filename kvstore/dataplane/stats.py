"""What the data plane counts."""

from __future__ import annotations

from dataclasses import dataclass


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
