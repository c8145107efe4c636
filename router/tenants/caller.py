"""Who sends a request: the tenant, what it may do, and whose cached KV it may meet."""

from __future__ import annotations

import json
from dataclasses import dataclass
from functools import lru_cache

from tandem.common.errors import TandemError
from tandem.common.fairness import LAST_BAND

LOWEST_PRIORITY = -(2**31)
HIGHEST_PRIORITY = 2**31 - 1


@dataclass(frozen=True, slots=True)
class Rates:
    """A tenant's limits. None: there is none."""

    requests_per_minute: int | None = None
    tokens_per_minute: int | None = None
    """Prompt and output tokens, cached ones included."""
    max_concurrent: int | None = None
    """Requests in flight, waiting ones included."""

    @property
    def unlimited(self) -> bool:
        return self.requests_per_minute is None and self.tokens_per_minute is None and self.max_concurrent is None


UNLIMITED = Rates()


@dataclass(frozen=True, slots=True)
class Caller:
    """What holds for one request: the tenant as it was configured when the request came."""

    tenant: str
    sharing_group: str = ""
    """Tenants that name the same group reuse each other's cached KV. Empty: nobody else's."""
    weight: float = 1.0
    """Share of the service when tenants compete."""
    priority_min: int = LOWEST_PRIORITY
    """Priorities as requests give them: lower values go first."""
    priority_max: int = HIGHEST_PRIORITY
    rates: Rates = UNLIMITED
    models: frozenset[str] | None = None
    """The models that it may use; None: all."""
    kv_quota: float | None = None
    """Share of each tier of the KV store that it may fill; None: what holds for everybody."""
    admin: bool = False
    """Sees usage, metrics and accounts of every tenant."""
    batch: bool = False
    """Its requests are lines of a batch: they go into the last band, whatever they ask for."""

    @property
    def line(self) -> str:
        """Where its work waits for threads that tenants share. Batches have a line of their own: what a client waits
        for is not behind them."""
        return f"batches of {self.tenant}" if self.batch else self.tenant

    def cache_salt(self, wish: str) -> bytes:
        """Separates KV caches: between tenants or groups, and inside one by the request's own `cache_salt`."""
        if self.sharing_group:
            return _cache_salt("group", self.sharing_group, wish)
        return _cache_salt("tenant", self.tenant, wish)

    def priority(self, asked: int | None) -> int:
        """The band a request goes into. 0 and None are no wish: they become the nearest value that is allowed.

        Raises TandemError `permission_denied` for any other value outside the tenant's range.
        """
        if self.batch:
            return LAST_BAND
        if asked and not self.priority_min <= asked <= self.priority_max:
            raise TandemError(
                "permission_denied",
                f"priority must be between {self.priority_min} and {self.priority_max} for tenant `{self.tenant}`, "
                f"got {asked}; leave it out for the default.",
                param="priority",
            )
        return min(max(asked or 0, self.priority_min), self.priority_max)

    def check_model(self, name: str) -> None:
        """Raises TandemError `permission_denied`."""
        if self.models is not None and name not in self.models:
            raise TandemError(
                "permission_denied", f"Tenant `{self.tenant}` may not use the model `{name[:64]}`.", param="model"
            )


@lru_cache(maxsize=1024)  # asked for several times per request
def _cache_salt(kind: str, name: str, wish: str) -> bytes:
    return json.dumps([kind, name, wish]).encode()


ANYBODY = Caller("default", "default", admin=True)
"""Where no tenants are configured, there is one."""
