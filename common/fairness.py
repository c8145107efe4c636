"""What tenants got: weighted service counters (VTC), which `FairQueue` follows. Router and engine use them.

Pure: no clock, no I/O, no randomness. After VTC (Sheng et al., "Fairness in Serving Large Language Models") and DLPM
(Cao et al., "Locality-aware Fair Scheduling in LLM Serving").

Service is counted in tokens: uncached input x INPUT_COST + output x OUTPUT_COST + what an adapter costs, divided by the
tenant's weight. Every priority band has its own counters, because bands are strict: what a tenant got in one band does
not help or hurt those who wait in another.

The bound. Take two tenants with waiting requests in one band. Let Q be the quantum, U the most that requests of one
tenant can still be charged from the moment when they are chosen (their input, and the output to come), and R the most
that estimates of one tenant can still be corrected downwards. Then at any time their counters differ by at most

    Q + U + R

and over any time in which both have waiting requests, their service per weight differs by at most twice that. It holds
whatever the tenants did before: one that comes back after a rest starts at the band's floor (the least counter of those
who waited when somebody was last chosen), so that idle time earns nothing, and the use of an idle system costs nothing.
The tests prove it. Routers that share counters also see who waits at others, and leave them the room while they are
more than a quantum ahead (`ServiceCounters.ahead`); there, add what can be charged within the staleness.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TypeVar

LAST_BAND = 2**31 - 1
"""The priority of what nobody waits for, such as batches: it gets what earlier bands leave over."""
INPUT_COST = 1.0
OUTPUT_COST = 2.0
"""An output token keeps a slot of the batch for a whole step; a prompt token shares its step with hundreds."""
MAX_WEIGHT = 1000.0
"""The most that a tenant may have; 1 / MAX_WEIGHT is the least."""
MAX_ACCOUNTS = 4096
"""Counters kept. An idle one that is forgotten comes back at the floor: its tenant gains what it was ahead, at most the
bound."""

_ROUNDING = 1e-9

AccountKey = tuple[int, str]
"""Band and tenant."""
T = TypeVar("T")


class Account:
    """The service that one tenant got in one band, per weight.

    What happened since the last exchange with other routers is the map x -> max(x + added, at_least): charges add,
    lifts set a least value. Such maps compose, so routers can apply each other's in any order and miss nothing.
    """

    __slots__ = ("added", "at_least", "counter", "key", "waiting", "wrong")

    def __init__(self, key: AccountKey, floor: float) -> None:
        self.key = key
        self.counter = floor
        self.added = 0.0
        self.at_least = floor
        self.waiting = 0
        """Queued requests."""
        self.wrong = False
        """The total that others were told cannot be true: the next exchange puts `counter` in its place."""

    def charge(self, service: float) -> None:
        self.counter += service
        self.added += service
        self.at_least += service

    def lift(self, floor: float) -> None:
        if self.counter < floor:
            self.counter = floor
            self.at_least = max(self.at_least, floor)

    @property
    def changed(self) -> bool:
        return self.added != 0.0 or self.at_least > -math.inf

    def take(self) -> tuple[float, float]:
        """(added, at_least) since the last exchange, once."""
        taken = self.added, self.at_least
        self.added = 0.0
        self.at_least = -math.inf
        return taken

    def put_back(self, added: float, at_least: float) -> None:
        self.at_least = max(at_least + self.added, self.at_least, self.counter)
        self.added += added

    def merge(self, total: float, least: float = -math.inf, most: float = math.inf) -> bool:
        """`total`: what all routers made of it; everything that was taken here is in it. False: it is not between
        `least` and `most` and so cannot be true; it is not taken, and the next exchange says what it should be."""
        if least <= total <= most:
            self.counter = max(total + self.added, self.at_least)
            return True
        self.at_least = max(self.at_least, self.counter)
        self.wrong = not total < least
        return False


@dataclass(frozen=True, slots=True)
class Changes:
    """What one router did since its last exchange."""

    accounts: dict[AccountKey, tuple[float, float]]
    """(added, at_least) of every account that changed or has waiting requests."""
    least: dict[int, float]
    """Least counter, by band, of those who wait or were granted last. A band where nothing happens is absent."""
    waiting: frozenset[int] = frozenset()
    """The bands in which somebody waits."""
    wrong: frozenset[AccountKey] = frozenset()
    """Accounts whose shared total is too high to be true: `at_least` goes in its place."""


class ServiceCounters:
    """The accounts of all tenants. One per process; every queue of that process uses it."""

    def __init__(self, max_accounts: int = MAX_ACCOUNTS) -> None:
        self.alone = True
        """False while other routers take part: then the floors come from `merge`."""
        self.charged = 0.0
        """Service per weight charged here so far, corrections added, too. No counter is beyond the sum of it over all
        routers, as all begin at 0 and are only lifted to what others have."""
        self._max_accounts = max_accounts
        self._accounts: dict[AccountKey, Account] = {}
        self._floors: dict[int, float] = {}
        self._least: dict[int, float] = {}
        self._elsewhere: dict[int, float] = {}
        """Least counters, by band, of those who wait at other routers."""

    def __len__(self) -> int:
        return len(self._accounts)

    def account(self, tenant: str, band: int) -> Account:
        """A tenant without one gets it at the floor."""
        key = band, tenant
        account = self._accounts.get(key)
        if account is None:
            if len(self._accounts) >= self._max_accounts:
                self._forget()
            account = self._accounts[key] = Account(key, self._floors.get(band, 0.0))
        return account

    def enter(self, tenant: str, band: int) -> Account:
        """`tenant` sends a request. If it had none waiting, it starts no lower than the floor."""
        account = self.account(tenant, band)
        if not account.waiting:
            account.lift(self._floors.get(band, 0.0))
        return account

    def granted(self, band: int, least: float) -> None:
        """Somebody was chosen, and `least` was the lowest counter of those who waited, the chosen one among them."""
        self._least[band] = least
        if self.alone and least > self._floors.get(band, 0.0):
            self._floors[band] = least

    def charge(self, tenant: str, band: int, cost: float, weight: float) -> None:
        """`cost` is negative where an estimate was too high. A change of weight counts from here on."""
        self.account(tenant, band).charge(cost / weight)
        self.charged += abs(cost / weight)

    def floor(self, band: int) -> float:
        return self._floors.get(band, 0.0)

    def floors(self) -> dict[int, float]:
        """Floors by band, those above 0."""
        return dict(self._floors)

    def ahead(self, tenant: str, band: int) -> float:
        """How far it is ahead of those who wait at other routers. Negative: it is its turn; infinite: somebody waits
        there in a lower (earlier) band."""
        if not self._elsewhere:
            return -math.inf
        if min(self._elsewhere) < band:
            return math.inf
        return self.account(tenant, band).counter - self._elsewhere.get(band, math.inf)

    def values(self) -> dict[AccountKey, float]:
        return {key: account.counter for key, account in self._accounts.items()}

    # Sharing between routers

    def take_changes(self) -> Changes:
        """What has not been taken yet. It counts here all the same; `merge` must follow with totals that hold it."""
        accounts: dict[AccountKey, tuple[float, float]] = {}
        waiting: dict[int, float] = {}
        wrong: set[AccountKey] = set()
        for key, account in self._accounts.items():
            if account.waiting:
                waiting[key[0]] = min(waiting.get(key[0], math.inf), account.counter)
            if account.waiting or account.changed:
                accounts[key] = account.take()
                if account.wrong:
                    wrong.add(key)
                    account.wrong = False
        changes = Changes(accounts, self._least | waiting, frozenset(waiting), frozenset(wrong))
        self._least = {}
        return changes

    def put_back(self, changes: Changes) -> None:
        """The shared totals were lost and what was taken went with them: the next exchange says it again, and says of
        every account how far it had come."""
        for account in self._accounts.values():
            account.put_back(*changes.accounts.get(account.key, (0.0, -math.inf)))

    def merge(
        self,
        totals: Mapping[AccountKey, float],
        floors: Mapping[int, float],
        elsewhere: Mapping[int, float],
        *,
        most: float = math.inf,
        moved: float = math.inf,
    ) -> int:
        """Totals of all routers, in which everything taken so far is contained; the floors among them; and by band
        the least counter of those who wait at others. `most`: what all have charged ever; `moved`: what others have
        charged since the last exchange. Returns how many numbers were left out as they cannot be true."""
        refused = 0
        self._elsewhere = {band: least for band, least in elsewhere.items() if -most <= least <= most}
        for key, total in totals.items():
            account = self._accounts.get(key)
            if account is not None:
                expected = account.counter - account.added
                refused += not account.merge(total, max(-most, expected - moved - _ROUNDING * abs(expected)), most)
        for band, floor in floors.items():
            if floor <= most:
                self._floors[band] = max(floor, self._floors.get(band, 0.0))
            else:
                refused += 1
        return refused

    def ignore_elsewhere(self) -> None:
        """They do not take their turn: until the next `merge` they are not waited for."""
        self._elsewhere = {}

    def _forget(self) -> None:
        """Drops an eighth of the accounts: idle ones that are least ahead of their floor."""
        idle = [account for account in self._accounts.values() if not account.waiting]
        idle.sort(key=lambda account: account.counter - self.floor(account.key[0]))
        for account in idle[: max(1, self._max_accounts // 8)]:
            del self._accounts[account.key]
        bands = {band for band, _ in self._accounts}
        self._floors = {band: floor for band, floor in self._floors.items() if band in bands}
        self._least = {band: least for band, least in self._least.items() if band in bands}
