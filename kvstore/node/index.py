"""The books of one tier: which objects it holds, who may not lose them, and which leaves next.

Pure (no I/O, no clock of its own), not thread-safe: the node calls it under its lock.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

from tandem.kvstore.eviction import Quotas, Shares
from tandem.kvstore.interfaces import EvictionPolicy, ObjectInfo, ObjectKey, TierName
from tandem.kvstore.node.stats import TierCounters

PolicyFactory = Callable[[int], EvictionPolicy]
"""Makes an empty policy for a tier of so many bytes."""


@dataclass(slots=True, eq=False)
class Resident:
    """One object in one tier."""

    key: ObjectKey
    info: ObjectInfo
    leases: int = 0
    """Holds on the bytes: while there is one, they stay."""
    pinned: bool = False
    """It has pins, so the policy does not know it (and need not step over it)."""


@dataclass(frozen=True, slots=True)
class Pin:
    hard: bool
    expires_at: float | None


class Shelf:
    """The residents of one tier with their quotas, policies and pins."""

    def __init__(self, name: TierName, capacity_bytes: int, shares: Shares, policy_factory: PolicyFactory) -> None:
        self.name = name
        self.capacity_bytes = capacity_bytes
        self.quotas = Quotas(capacity_bytes, shares, new_policy=policy_factory)
        self.counters = TierCounters()
        self.bytes = 0
        self.hard_pinned_bytes = 0
        self._residents: dict[ObjectKey, Resident] = {}
        self._pins: dict[ObjectKey, dict[str, Pin]] = {}
        """Pins of each key by owner; keys without pins are not listed. The order is that of the first pin."""

    def __len__(self) -> int:
        return len(self._residents)

    def __iter__(self) -> Iterator[Resident]:
        return iter(self._residents.values())

    def get(self, key: ObjectKey) -> Resident | None:
        return self._residents.get(key)

    def add(self, resident: Resident) -> None:
        """Raises ValueError if the key is there."""
        if resident.key in self._residents:
            raise ValueError(f"{resident.key.hex()} is on the {self.name} shelf already")
        self._residents[resident.key] = resident
        self.bytes += resident.info.size
        self.quotas.insert(resident.key, resident.info)

    def hit(self, resident: Resident) -> None:
        self.quotas.hit(resident.key)

    def remove(self, resident: Resident) -> None:
        """It leaves, with its pins. Raises KeyError if it is not a resident."""
        if not self._holds(resident):
            raise KeyError(resident.key.hex())
        del self._residents[resident.key]
        self.bytes -= resident.info.size
        if resident.pinned:
            self._drop_pins(resident)
            self.quotas.unreserve(resident.info.owner, resident.info.size)
            resident.pinned = False
        else:
            self.quotas.remove(resident.key)

    def evict_for(self, owner: str, size: int) -> Resident | None:
        """Takes out the object that leaves so that `owner` can store `size` bytes; None: nothing may leave. Softly
        pinned objects leave last, the one whose pin is oldest first."""
        key = self.quotas.evict_for(owner, size, self._may_leave)
        if key is not None:
            resident = self._residents.pop(key)
            self.bytes -= resident.info.size
        else:
            soft = self._softly_pinned(None if self.quotas.fits(owner, size) else owner)
            if soft is None:
                return None
            resident = soft
            self.remove(resident)
        self.counters.evictions += 1
        self.counters.evicted_bytes += resident.info.size
        return resident

    # Pins

    def pin(self, resident: Resident, owner: str, pin: Pin) -> bool:
        """Replaces the pin that `owner` has on it. False: hard pins would take more than half of the tier."""
        pins = self._pins.get(resident.key, {})
        size = resident.info.size
        was_hard = any(each.hard for each in pins.values())
        is_hard = pin.hard or any(each.hard for name, each in pins.items() if name != owner)
        if is_hard and not was_hard and self.hard_pinned_bytes + size > self.capacity_bytes // 2:
            return False
        self.hard_pinned_bytes += size * (int(is_hard) - int(was_hard))
        self._pins.setdefault(resident.key, {})[owner] = pin
        if not resident.pinned:
            resident.pinned = True
            self.quotas.remove(resident.key)
            self.quotas.reserve(resident.info.owner, size)
        return True

    def unpin(self, resident: Resident, owner: str) -> bool:
        """False: `owner` has no pin on it."""
        pins = self._pins.get(resident.key)
        if pins is None or owner not in pins:
            return False
        was_hard = any(each.hard for each in pins.values())
        del pins[owner]
        if was_hard and not any(each.hard for each in pins.values()):
            self.hard_pinned_bytes -= resident.info.size
        if not pins:
            del self._pins[resident.key]
            resident.pinned = False
            self.quotas.unreserve(resident.info.owner, resident.info.size)
            self.quotas.insert(resident.key, resident.info)
        return True

    def end_pins(self, now: float) -> int:
        """Removes the pins whose time is up; how many."""
        ended = [
            (key, owner)
            for key, pins in self._pins.items()
            for owner, pin in pins.items()
            if pin.expires_at is not None and pin.expires_at <= now
        ]
        for key, owner in ended:
            self.unpin(self._residents[key], owner)
        return len(ended)

    def is_hard_pinned(self, key: ObjectKey) -> bool:
        return any(pin.hard for pin in self._pins.get(key, {}).values())

    def pins(self, key: ObjectKey) -> dict[str, Pin]:
        """Its pins by owner."""
        return dict(self._pins.get(key, {}))

    def count_pins(self) -> tuple[int, int]:
        """Soft and hard ones."""
        pins = [pin.hard for by_owner in self._pins.values() for pin in by_owner.values()]
        return len(pins) - sum(pins), sum(pins)

    def check_integrity(self) -> list[str]:
        """Everything that is wrong."""
        wrong: list[str] = []
        if self.bytes != sum(resident.info.size for resident in self):
            wrong.append(f"{self.bytes} bytes are counted, the residents have others")
        if len(self.quotas) != sum(1 for resident in self if not resident.pinned):
            wrong.append(f"the policy has {len(self.quotas)} residents, {len(self)} are there, pinned ones included")
        for key in self._pins.keys() - self._residents.keys():
            wrong.append(f"{key.hex()} is pinned and not there")
        for resident in self:
            if resident.leases < 0:
                wrong.append(f"{resident.key.hex()} has {resident.leases} leases")
            if resident.pinned != (resident.key in self._pins):
                wrong.append(f"{resident.key.hex()} is marked as pinned: {resident.pinned}")
        hard = sum(resident.info.size for resident in self if self.is_hard_pinned(resident.key))
        if hard != self.hard_pinned_bytes:
            wrong.append(f"{self.hard_pinned_bytes} bytes are counted as hard pinned, it is {hard}")
        return [f"{self.name}: {each}" for each in wrong]

    def _holds(self, resident: Resident) -> bool:
        return self._residents.get(resident.key) is resident

    def _may_leave(self, key: ObjectKey) -> bool:
        return self._residents[key].leases == 0

    def _softly_pinned(self, owner: str | None) -> Resident | None:
        for key, pins in self._pins.items():
            resident = self._residents[key]
            if resident.leases or any(pin.hard for pin in pins.values()):
                continue
            if owner is None or resident.info.owner == owner:
                return resident
        return None

    def _drop_pins(self, resident: Resident) -> None:
        if self.is_hard_pinned(resident.key):
            self.hard_pinned_bytes -= resident.info.size
        del self._pins[resident.key]
