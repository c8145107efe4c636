"""What leaves a full tier. `docs/eviction.md` has the measurements behind the default.

Every policy implements `interfaces.EvictionPolicy`, counts in bytes, and remembers a bounded number of objects that
have left. `Quotas` goes around any of them. Policies that are not worth choosing are in `bench/policies/`.
"""

from __future__ import annotations

from collections.abc import Callable

from tandem.common.errors import ConfigError
from tandem.kvstore.eviction.lru import Lru
from tandem.kvstore.eviction.quotas import Quotas, Shares
from tandem.kvstore.eviction.reuse import Reuse
from tandem.kvstore.interfaces import EvictionPolicy

__all__ = ["DEFAULT_POLICY", "POLICIES", "Quotas", "Shares", "make_policy"]

POLICIES: dict[str, Callable[[int], EvictionPolicy]] = {
    "lru": lambda capacity_bytes: Lru(),
    "reuse": Reuse,
}
"""Makes an empty policy for a tier of so many bytes."""

DEFAULT_POLICY = "reuse"


def make_policy(name: str, capacity_bytes: int) -> EvictionPolicy:
    """Raises ConfigError for an unknown name."""
    build = POLICIES.get(name)
    if build is None:
        raise ConfigError(f"kv_eviction is {name!r}: choose one of {', '.join(POLICIES)}")
    return build(capacity_bytes)
