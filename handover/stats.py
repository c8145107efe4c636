"""Counters of one client pool or server."""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class TransportStats:
    """A snapshot. bytes / transfer_s is the rate while moving; counters only grow, open_* are gauges."""

    bytes: int
    """Payload of Rows frames sent, or received and checked."""
    rows: int
    """Token rows, counted once per layer."""
    frames: int
    """Rows frames."""
    transfer_s: float
    """Sender: fill, checksum and send. Receiver: read, checksum and sink."""
    outcomes: Mapping[str, int]
    """Ended streams: "done" or a Reason code."""
    checksum_failures: int
    late_frames: int
    """Rows for a stream that had ended; dropped."""
    callback_errors: int
    """Exceptions raised by a sink or a listener; logged."""
    open_streams: int
    open_connections: int


class Counters:
    """Thread-safe; the owner takes a snapshot."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._bytes = 0
        self._rows = 0
        self._frames = 0
        self._transfer_s = 0.0
        self._outcomes: Counter[str] = Counter()
        self._checksum_failures = 0
        self._late_frames = 0
        self._callback_errors = 0

    def moved(self, num_bytes: int, num_rows: int, seconds: float) -> None:
        with self._lock:
            self._bytes += num_bytes
            self._rows += num_rows
            self._frames += 1
            self._transfer_s += seconds

    def ended(self, outcome: str) -> None:
        with self._lock:
            self._outcomes[outcome] += 1
            self._checksum_failures += outcome == "checksum"

    def late_frame(self) -> None:
        with self._lock:
            self._late_frames += 1

    def callback_error(self) -> None:
        with self._lock:
            self._callback_errors += 1

    def snapshot(self, open_streams: int, open_connections: int) -> TransportStats:
        with self._lock:
            return TransportStats(
                bytes=self._bytes,
                rows=self._rows,
                frames=self._frames,
                transfer_s=self._transfer_s,
                outcomes=dict(self._outcomes),
                checksum_failures=self._checksum_failures,
                late_frames=self._late_frames,
                callback_errors=self._callback_errors,
                open_streams=open_streams,
                open_connections=open_connections,
            )
