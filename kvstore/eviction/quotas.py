"""Bytes per owner in one tier: who has to make room, so that no tenant loses its KV to another's."""

from __future__ import annotations

import heapq
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from types import MappingProxyType

from tandem.common.errors import ConfigError
from tandem.kvstore.eviction.ghosts import MAX_GHOSTS
from tandem.kvstore.interfaces import EvictionPolicy, ObjectInfo, ObjectKey

EVERYBODY = "*"
"""Stands in `kv_quotas` for owners that it does not name."""


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
        """Reads the setting `kv_quotas`. Raises ConfigError."""
        return cls(quotas.get(EVERYBODY, 1.0), {owner: share for owner, share in quotas.items() if owner != EVERYBODY})

    def of(self, owner: str) -> float:
        return self.owners.get(owner, self.everybody)


class Quotas:
    """Counts bytes per owner and chooses victims, with a policy for each owner. No owner holds more than its share of
    `capacity_bytes`, and

    - an owner whose new object does not fit into its quota evicts only its own objects;
    - an owner within its quota may evict others when the tier is full, and then the owner with most bytes, the new
      object included, loses one: who holds no more than an equal part of the tier loses nothing to others.

    Each owner has a policy of its own, so that nobody's objects are searched for somebody else's victim. All of them
    together remember at most `MAX_GHOSTS` objects that have left.

    The caller's part: `insert`, `hit`, `remove` as with any policy; `reserve` and `unreserve` around a write that has
    its memory but is not inserted yet; `evict_for(owner, size, ...)` until `fits(owner, size)` and there is room.
    Not thread-safe. O(log owners) beside what the policy takes; a search through all owners where the largest has
    nothing that may leave.
    """

    def __init__(
        self, capacity_bytes: int, shares: Shares | None = None, *, new_policy: Callable[[int], EvictionPolicy]
    ) -> None:
        """`shares` None: no limits. `new_policy` gets the bytes that its objects may take."""
        self._capacity_bytes = capacity_bytes
        self._shares = shares or Shares()
        self._new_policy = new_policy
        self._policies: dict[str, EvictionPolicy] = {}
        self._ghosts_each = MAX_GHOSTS
        self._used: dict[str, int] = {}
        self._largest: list[tuple[int, str]] = []
        """A heap of (-bytes, owner): for each owner an entry with its bytes or more; of no use while there is one."""
        self._residents: dict[ObjectKey, tuple[str, int]] = {}

    @property
    def used(self) -> Mapping[str, int]:
        """Bytes by owner, writes under way included; owners without any are not listed."""
        return MappingProxyType(self._used)

    def limit_bytes(self, owner: str) -> int:
        """What `owner` may hold."""
        return int(self._capacity_bytes * self._shares.of(owner))

    def fits(self, owner: str, size: int) -> bool:
        """Whether `owner` may hold `size` bytes more, as far as its quota goes."""
        share = self._shares.of(owner)
        return share == 1.0 or self._used.get(owner, 0) + size <= int(self._capacity_bytes * share)

    def reserve(self, owner: str, size: int) -> None:
        """Charges `owner` for bytes that are not inserted."""
        before = self._used.get(owner, 0)
        self._used[owner] = before + size
        owners = len(self._used)
        if owners == 1:
            return
        if len(self._largest) > 2 * owners + 64 or (owners == 2 and not before):
            self._largest = [(-used, name) for name, used in self._used.items()]
            heapq.heapify(self._largest)
        else:
            heapq.heappush(self._largest, (-before - size, owner))

    def unreserve(self, owner: str, size: int) -> None:
        """Takes a charge back. What its policy has learned goes with an owner's last byte, if there are others."""
        left = self._used.get(owner, 0) - size
        if left > 0:
            self._used[owner] = left
            return
        self._used.pop(owner, None)
        if len(self._policies) > 1 and self._policies.pop(owner, None) is not None:
            self._share_ghosts()

    def insert(self, key: ObjectKey, info: ObjectInfo) -> None:
        """The object entered the tier; one with its key is replaced."""
        self.remove(key)
        self._residents[key] = (info.owner, info.size)
        self.reserve(info.owner, info.size)
        policy = self._policies.get(info.owner)
        if policy is None:
            policy = self._policies[info.owner] = self._new_policy(self.limit_bytes(info.owner))
            policy.remember(self._ghosts_each)
            self._share_ghosts()
        policy.insert(key, info)

    def hit(self, key: ObjectKey) -> None:
        """It was read. Unknown keys are ignored."""
        resident = self._residents.get(key)
        if resident is not None:
            self._policies[resident[0]].hit(key)

    def remove(self, key: ObjectKey) -> None:
        """It left for another reason than `evict_for`. Unknown keys are ignored."""
        resident = self._residents.get(key)
        if resident is not None:
            self._policies[resident[0]].remove(key)
            self._left(key)

    def evict_for(self, owner: str, size: int, may_leave: Callable[[ObjectKey], bool]) -> ObjectKey | None:
        """Takes out what leaves so that `owner` can store `size` bytes: an object of its own if they exceed its quota,
        else one of the owner with most bytes, or of the next one if all of its objects have to stay. None: nothing may
        leave."""
        if not self.fits(owner, size):
            return self._evict_from(owner, may_leave)
        largest = self._largest_owner(owner, size)
        victim = self._evict_from(largest, may_leave)
        if victim is not None:
            return victim
        for name in sorted(self._policies, key=lambda name: (-self._bytes_with(name, owner, size), name)):
            if name != largest and (victim := self._evict_from(name, may_leave)) is not None:
                return victim
        return None

    def __len__(self) -> int:
        return len(self._residents)

    def _largest_owner(self, owner: str, size: int) -> str:
        """The one with most bytes, counting `size` more of `owner`."""
        if len(self._used) == 1:
            return next(iter(self._used))
        while self._largest:
            negative, name = self._largest[0]
            used = self._used.get(name, 0)
            if -negative == used:
                return owner if self._used.get(owner, 0) + size > used else name
            if used:
                heapq.heapreplace(self._largest, (-used, name))
            else:
                heapq.heappop(self._largest)
        return owner

    def _bytes_with(self, name: str, owner: str, size: int) -> int:
        return self._used.get(name, 0) + (size if name == owner else 0)

    def _evict_from(self, name: str, may_leave: Callable[[ObjectKey], bool]) -> ObjectKey | None:
        policy = self._policies.get(name)
        victim = policy.evict(may_leave) if policy is not None else None
        if victim is not None:
            self._left(victim)
        return victim

    def _left(self, key: ObjectKey) -> None:
        owner, size = self._residents.pop(key)
        self.unreserve(owner, size)

    def _share_ghosts(self) -> None:
        """Halves what each policy remembers whenever their number doubles."""
        each = MAX_GHOSTS >> (len(self._policies) - 1).bit_length()
        if each != self._ghosts_each:
            self._ghosts_each = each
            for policy in self._policies.values():
                policy.remember(each)
