"""A replica of round numbers, and ways to run it."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from tandem.planner.lengths import Lengths
from tandem.planner.objectives import Demand
from tandem.planner.pools import Limits, Option, OptionKey
from tandem.planner.queueing import Role


@dataclass(frozen=True)
class PlainReplica:
    """An 8B model on a device that is `speed` times as fast as a large accelerator."""

    speed: float = 1.0
    kv_tokens: float = 400_000.0

    def prefill_s(self, uncached_tokens: float, context_tokens: float = 0.0) -> float:
        return (0.003 + max(0.006, uncached_tokens * 4e-5) + context_tokens * 1e-8) / self.speed

    def decode_step_s(self, batch: float, kv_tokens: float) -> float:
        return (0.003 + max(0.006, batch * 4e-5) + kv_tokens * 5e-8) / self.speed

    def transfer_s(self, link: str, tokens: float) -> float:
        return 0.002 + tokens * 2.6e-6


SPEEDS = {"large": (1.0, 5.0, 700.0), "medium": (0.4, 2.2, 400.0), "small": (0.1, 0.8, 150.0)}
"""Speed, price per hour, watts."""

CHAT = Demand(1.0, Lengths.of([(200, 0.5), (1000, 0.3), (4000, 0.2)]), Lengths.of([(50, 0.5), (300, 0.5)]))


def options(classes: Iterable[str], roles: Iterable[Role], devices: int = 1) -> list[Option]:
    """One option for each class and role; a pool is named as its role."""
    return [
        Option(OptionKey(role.lower(), name), role, PlainReplica(SPEEDS[name][0]), *SPEEDS[name][1:], devices)
        for role in roles
        for name in classes
    ]


def stock(classes: Iterable[str], each: int) -> Limits:
    return Limits({(name, False): each for name in classes})


SPLIT = (Role.PREFILL, Role.DECODE)
