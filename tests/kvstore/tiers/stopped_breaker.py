"""A circuit breaker whose time stands still, which counts what it lets through."""

from __future__ import annotations

from tandem.kvstore.tiers.breaker import Breaker


class StoppedBreaker(Breaker):
    def __init__(self) -> None:
        super().__init__(lambda: self.now)
        self.now = 0.0
        self.calls = 0

    def allows(self) -> bool:
        allowed = super().allows()
        self.calls += allowed
        return allowed
