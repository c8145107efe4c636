"""Pools as the planner sees them: ways to run a replica, limits, and a plan of how many of each."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum

from tandem.common.errors import ConfigError
from tandem.planner.objectives import Replica
from tandem.planner.queueing import MAX_BATCH, TOKEN_BUDGET, Latency, Role


@dataclass(frozen=True, slots=True, order=True)
class OptionKey:
    """Replicas of one pool on one class of hardware, bought in one way."""

    pool: str
    hardware: str
    spot: bool = False

    def __str__(self) -> str:
        return f"{self.pool}/{self.hardware}{' (spot)' if self.spot else ''}"


@dataclass(frozen=True, slots=True)
class Option:
    """One way to run replicas of a pool."""

    key: OptionKey
    role: Role
    replica: Replica
    price_per_hour: float
    """For a replica, all its devices together. Any currency."""
    watts: float
    """Likewise."""
    devices: int = 1
    token_budget: int = TOKEN_BUDGET
    max_batch: int = MAX_BATCH

    def __post_init__(self) -> None:
        """Raises ConfigError: the field that makes no sense."""
        for name, value in (("price", self.price_per_hour), ("watts", self.watts)):
            if not 0 <= value < math.inf:
                raise ConfigError(f"{self.key}: {name} {value} must be finite and not negative")
        if self.devices < 1:
            raise ConfigError(f"{self.key}: a replica needs at least one device, not {self.devices}")

    @property
    def stock(self) -> tuple[str, bool]:
        """What its devices are taken from: (class, spot)."""
        return self.key.hardware, self.key.spot


@dataclass(frozen=True, slots=True)
class PoolBounds:
    """How many replicas a pool may have, over all classes."""

    min_replicas: int = 0
    max_replicas: int = 1000

    def __post_init__(self) -> None:
        """Raises ConfigError."""
        if not 0 <= self.min_replicas <= self.max_replicas:
            raise ConfigError(f"minReplicas {self.min_replicas} must be between 0 and maxReplicas {self.max_replicas}")


@dataclass(frozen=True, slots=True)
class Limits:
    """What may be used in all."""

    inventory: Mapping[tuple[str, bool], int] = field(default_factory=dict)
    """Devices by (class, spot); a class that is not named has none."""
    max_cost_per_hour: float = math.inf
    max_watts: float = math.inf


class LimitKind(StrEnum):
    """What can keep a plan from serving more."""

    INVENTORY = "InventoryExhausted"
    COST = "CostLimit"
    POWER = "PowerLimit"
    REPLICAS = "MaxReplicas"
    SLO = "SloOutOfReach"
    NO_POOL = "NoPool"


@dataclass(frozen=True, slots=True)
class Limit:
    """One thing that binds, with what would lift it."""

    kind: LimitKind
    subject: str
    text: str


@dataclass(frozen=True, slots=True)
class PoolShare:
    """What one option contributes to a plan, and what the model predicts for it."""

    key: OptionKey
    role: Role
    replicas: int
    rate: float
    """Requests per second that come its way."""
    capacity: float
    """Requests per second that it carries within the SLO."""
    latency: Latency
    binds: str
    """Which goal a higher rate would miss first: ttft, tpot, kv or batch."""


@dataclass(frozen=True, slots=True)
class PoolPlan:
    """How many replicas of each option, and why."""

    counts: Mapping[OptionKey, int]
    requested: float
    served: float
    """Requests per second within the SLO; less than `requested` where limits bind."""
    cost_per_hour: float
    watts: float
    ttft_s: float
    """Predicted at the SLO's percentile for what is served; likewise `tpot_s`."""
    tpot_s: float
    shares: tuple[PoolShare, ...] = ()
    limited_by: tuple[Limit, ...] = ()
    exact: bool = True
    """Whether the search proved that nothing is cheaper; False where it stopped at its bound."""

    @property
    def feasible(self) -> bool:
        """Whether it serves everything within the limits."""
        return not self.limited_by and self.served >= self.requested * (1 - 1e-9)

    @property
    def replicas(self) -> int:
        return sum(self.counts.values())

    @property
    def message(self) -> str:
        """The plan in a sentence."""
        parts = ", ".join(f"{n} x {key}" for key, n in sorted(self.counts.items()) if n) or "nothing"
        if self.feasible:
            return f"{parts}: {self.requested:.4g} requests/s for {self.cost_per_hour:.2f} per hour"
        why = "; ".join(limit.text for limit in self.limited_by) or "no limit is known"
        return f"{parts}: serves {self.served:.4g} of {self.requested:.4g} requests/s; {why}"
