"""What the engine's use of the KV store has come to, for metrics."""

from __future__ import annotations

import threading
from collections import Counter
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class StoreStats:
    """Totals since the start."""

    lookups: dict[str, int]
    """Look-ups by outcome: fetch (something is worth fetching), miss, recompute (computing is faster), slow,
    crowded."""
    loads: dict[str, int]
    """Loads by outcome: ok, or why less was loaded than was there: missing, slow, corrupt, mismatch, fidelity, stuck,
    cancelled, internal."""
    saves: dict[str, int]
    """Chunks by outcome: saved, lapsed, failed, dropped (too many at once), or the store's refusal."""
    loaded_tokens: dict[str, int]
    """Tokens by tier."""
    gates_missed: int
    """Steps that a loaded request had joined early, and in which its KV came too late."""
    load_s: float
    save_s: float


class StoreCounters:
    """Safe from any thread."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._lookups: Counter[str] = Counter()
        self._loads: Counter[str] = Counter()
        self._saves: Counter[str] = Counter()
        self._loaded_tokens: Counter[str] = Counter()
        self._gates_missed = 0
        self._load_s = 0.0
        self._save_s = 0.0

    def lookup(self, outcome: str) -> None:
        with self._lock:
            self._lookups[outcome] += 1

    def load(self, outcome: str, seconds: float, tokens: dict[str, int]) -> None:
        """Counts one `Loading`, the seconds it took and the tokens it brought, by tier."""
        with self._lock:
            self._loads[outcome] += 1
            self._load_s += seconds
            self._loaded_tokens.update(tokens)

    def save(self, outcome: str, seconds: float = 0.0) -> None:
        with self._lock:
            self._saves[outcome] += 1
            self._save_s += seconds

    def gate_missed(self) -> None:
        with self._lock:
            self._gates_missed += 1

    def snapshot(self) -> StoreStats:
        """The totals now. For any thread."""
        with self._lock:
            return StoreStats(
                lookups=dict(self._lookups),
                loads=dict(self._loads),
                saves=dict(self._saves),
                loaded_tokens=dict(self._loaded_tokens),
                gates_missed=self._gates_missed,
                load_s=self._load_s,
                save_s=self._save_s,
            )
