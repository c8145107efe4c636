"""Bytes per owner in one tier, with isolated eviction: a tenant that is at its quota evicts only itself."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from types import MappingProxyType

from tandem.common.errors import ConfigError
from tandem.kvstore.interfaces import EvictionPolicy, ObjectInfo, ObjectKey

EVERYBODY = "*"
"""Stands in `kv_quotas` for owners that it does not name."""
_ONE_POLICY = ""
"""Name of the one policy where there is no limit."""


@dataclass(frozen=True, slots=True)
class Shares:
    """How much of a tier an owner may fill, above 0 and up to 1 (no limit). Raises ConfigError."""

    everybody: float = 1.0
    owners: Mapping[str, float] = field(default_factory=dict)
    """Those for whom another share holds."""

    def __post_init__(self) -> None:
        if not 0.0 < self.everybody <= 1.0:
            raise ConfigError(
                f"kv_quotas: {EVERYBODY} is {self.everybody}: give a share above 0 and up to 1 (1: no limit)"
            )
        for owner, share in self.owners.items():
            if not 0.0 < share <= 1.0:
                raise ConfigError(f"kv_quotas: {owner} is {share}: give a share above 0 and up to 1 (1: no limit)")

    @classmethod
    def read(cls, quotas: Mapping[str, float]) -> Shares:
        """From the setting `kv_quotas`. Raises ConfigError."""
        return cls(quotas.get(EVERYBODY, 1.0), {owner: share for owner, share in quotas.items() if owner != EVERYBODY})

    def of(self, owner: str) -> float:
        return self.owners.get(owner, self.everybody)

    @property
    def limited(self) -> bool:
        return self.everybody < 1.0 or any(share < 1.0 for share in self.owners.values())


class Quotas:
    """Counts bytes per owner and chooses victims; itself an `EvictionPolicy`, around any other.

    Where no owner has a limit there is one policy for everybody. Otherwise no owner holds more than its share of
    `capacity_bytes`, and

    - an owner whose new object does not fit into its quota evicts only its own objects;
    - an owner within its quota may evict others when the tier is full, and then the owner with most bytes loses an
      object: who holds less than all others is safe.

    Each owner then has a policy of its own, so that nobody's objects are searched for somebody else's victim.

    The caller's part: `insert`, `hit`, `remove` as with any policy; `reserve` and `unreserve` around a write that has
    its memory but is not inserted yet; `evict_for(owner, size, ...)` until `fits(owner, size)` and there is room.
    Not thread-safe.
    """

    def __init__(
        self, capacity_bytes: int, shares: Shares | None = None, *, new_policy: Callable[[int], EvictionPolicy]
    ) -> None:
        """`shares` None: no limits. `new_policy` gets the bytes that its objects may take."""
        self._capacity_bytes = capacity_bytes
        self._shares = shares or Shares()
        self._limited = self._shares.limited
        self._new_policy = new_policy
        self._policies: dict[str, EvictionPolicy] = {}
        self._used: dict[str, int] = {}
        self._residents: dict[ObjectKey, tuple[str, int]] = {}

    @property
    def used(self) -> Mapping[str, int]:
        """Bytes by owner, writes under way included; owners without any are not listed."""
        return MappingProxyType(self._used)

    def limit_bytes(self, owner: str) -> int:
        """What `owner` may hold."""
        return int(self._capacity_bytes * self._shares.of(owner))

    def fits(self, owner: str, size: int) -> bool:
        """Whether `owner` may hold `size` bytes more."""
        return not self._limited or self._used.get(owner, 0) + size <= self.limit_bytes(owner)

    def reserve(self, owner: str, size: int) -> None:
        self._used[owner] = self._used.get(owner, 0) + size

    def unreserve(self, owner: str, size: int) -> None:
        left = self._used.get(owner, 0) - size
        if left > 0:
            self._used[owner] = left
            return
        self._used.pop(owner, None)
        if self._limited:
            self._policies.pop(owner, None)

    def insert(self, key: ObjectKey, info: ObjectInfo) -> None:
        self.remove(key)
        self._residents[key] = (info.owner, info.size)
        self.reserve(info.owner, info.size)
        name = self._policy_name(info.owner)
        policy = self._policies.get(name)
        if policy is None:
            policy = self._policies[name] = self._new_policy(self.limit_bytes(info.owner))
        policy.insert(key, info)

    def hit(self, key: ObjectKey) -> None:
        resident = self._residents.get(key)
        if resident is not None:
            self._policies[self._policy_name(resident[0])].hit(key)

    def remove(self, key: ObjectKey) -> None:
        resident = self._residents.get(key)
        if resident is not None:
            self._policies[self._policy_name(resident[0])].remove(key)
            self._left(key)

    def evict(self, may_leave: Callable[[ObjectKey], bool]) -> ObjectKey | None:
        """An object of the owner with most bytes, or of the next one if all of its objects have to stay."""
        for name in sorted(self._policies, key=lambda owner: (-self._used.get(owner, 0), owner)):
            victim = self._evict_from(name, may_leave)
            if victim is not None:
                return victim
        return None

    def evict_for(self, owner: str, size: int, may_leave: Callable[[ObjectKey], bool]) -> ObjectKey | None:
        """Makes room for `size` bytes of `owner`: an object of its own if they exceed its quota, else of anybody."""
        if self.fits(owner, size):
            return self.evict(may_leave)
        return self._evict_from(owner, may_leave)

    def __len__(self) -> int:
        return len(self._residents)

    def _policy_name(self, owner: str) -> str:
        return owner if self._limited else _ONE_POLICY

    def _evict_from(self, name: str, may_leave: Callable[[ObjectKey], bool]) -> ObjectKey | None:
        policy = self._policies.get(name)
        victim = policy.evict(may_leave) if policy is not None else None
        if victim is not None:
            self._left(victim)
        return victim

    def _left(self, key: ObjectKey) -> None:
        owner, size = self._residents.pop(key)
        self.unreserve(owner, size)
