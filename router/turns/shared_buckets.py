"""Rate-limit buckets that several routers fill and empty; `SharedService` carries them to and fro."""

from __future__ import annotations

import asyncio
import contextlib
import math
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

from tandem.common.fairness import Account
from tandem.router.turns.limits import LocalBuckets

MAX_BUCKETS = 20_000
"""Kept here; beyond it full ones are forgotten. Only buckets in use are anything but full."""
_ROUNDING = 1e-9


@dataclass(frozen=True, slots=True)
class BucketChange:
    """What happened to one bucket since the last exchange. Times are on the clock of `SharedBuckets`."""

    added_s: float
    """Seconds that it takes longer to be full."""
    full_at: float
    """It is full then at the earliest; -inf: whenever."""
    fill_s: float
    """Seconds from empty to full."""
    asked_s: float = 0.0
    """Wanted for requests that wait, if there is so much."""


@dataclass(slots=True)
class Places:
    """Requests of one tenant in flight, where it has a limit on them."""

    here: int = 0
    elsewhere: int = 0
    asked: int = 0
    """Places for those that wait to be let in."""
    granted: int = 0
    """Let in, and not here yet."""
    most: int = 0


class _Bucket:
    __slots__ = ("asked_s", "fill_s", "full_at", "lease_s", "own_full_at")

    def __init__(self, key: str, now: float) -> None:
        self.full_at = Account((0, key), now)
        """When it is full, by what all routers took."""
        self.own_full_at = now
        """When it is full, by what this router took: nobody can say that it is full earlier."""
        self.fill_s = 0.0
        self.asked_s = 0.0
        """Wanted by requests that wait for the next exchange."""
        self.lease_s = 0.0
        """Granted to them: taken from the shared bucket already, and not used yet."""

    @property
    def until(self) -> float:
        return max(self.full_at.counter, self.own_full_at)

    def charge(self, seconds: float, now: float) -> None:
        """Takes `seconds` worth of filling: from the lease first, the rest from the bucket."""
        leased = max(0.0, min(seconds, self.lease_s))
        self.lease_s -= leased
        if seconds != leased:
            self.full_at.charge(seconds - leased)
        self.own_full_at = max(now, self.own_full_at) + seconds

    def give_back(self) -> None:
        """What was granted and is not used."""
        if self.lease_s:
            self.full_at.charge(-self.lease_s)
            self.lease_s = 0.0


class SharedBuckets:
    """The `Buckets` of `limits.Limits`, shared. Where there are several routers, a request asks for what it takes and
    waits for the next exchange, which is then made at once; Redis grants what is left. So together they give no more
    than one router would. Where Redis does not answer in time each goes by what it knows: that is counted, and
    everybody waits the longer for it.

    What all routers together owe is bounded by what each can give in one interval: `routers` + 1 times a full bucket.
    What a tenant owes beyond (requests larger than a bucket, output beyond the estimate) is remembered by the router
    that let it through, which keeps the shared bucket empty for as long.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        """`clock`: seconds that never go back."""
        self.alone = True
        """Redis is away, or has not been met yet."""
        self.routers = 1
        """Known to be alive, this one among them."""
        self.wanted: Callable[[], None] = lambda: None
        """Called when the others should hear of it soon."""
        self._places: dict[str, Places] = {}
        """Places by tenant."""
        self._news = asyncio.Event()
        """Set when the next exchange is over."""
        self._asking: list[asyncio.Event] = []
        self._clock = clock
        self._buckets: dict[str, _Bucket] = {}
        self._share = LocalBuckets(clock)

    def __len__(self) -> int:
        return len(self._buckets)

    def take(self, key: str, amount: float, rate: float, burst: float) -> float:
        """Takes `amount` from what all routers share, or from this router's part of it while Redis is away; see
        `Buckets`."""
        if self._divided:
            wait_s = self._share.take(key, amount, rate / self.routers, burst / self.routers)
            if wait_s == 0.0:
                self._bucket(key, rate, burst).charge(amount / rate, self._clock())
            return wait_s
        bucket, now = self._bucket(key, rate, burst), self._clock()
        missing = min(amount, burst) - (burst - (bucket.until - now - bucket.lease_s) * rate)
        if missing > _ROUNDING * burst:
            return missing / rate
        bucket.charge(amount / rate, now)
        if self.routers > 1:  # it counts, too, should Redis go away now
            self._share.add(key, -amount, rate / self.routers, burst / self.routers)
        return 0.0

    def add(self, key: str, amount: float, rate: float, burst: float) -> None:
        if self.routers > 1:
            self._share.add(key, amount, rate / self.routers, burst / self.routers)
        self._bucket(key, rate, burst).charge(-amount / rate, self._clock())

    def level(self, key: str, rate: float, burst: float) -> float:
        """What is left in the bucket; negative: it is owed."""
        if self._divided:
            return self._share.level(key, rate / self.routers, burst / self.routers)
        bucket = self._buckets.get(key)
        return burst - max(0.0, bucket.until - self._clock()) * rate if bucket is not None else burst

    def in_flight(self, tenant: str, here: int) -> int:
        """Requests in flight at all routers as last heard; while Redis is away the others are taken to have as many as
        this one."""
        if self._divided:
            return here * self.routers
        places = self._places.get(tenant)
        return here + (places.elsewhere if places is not None else 0)

    def set_in_flight(self, tenant: str, here: int) -> None:
        """Notes how many requests are in flight here, for the next exchange; a new one uses up a granted place."""
        places = self._places.setdefault(tenant, Places())
        if here > places.here and places.granted:
            places.granted -= 1
        places.here = here

    def may_decide(self, key: str, amount: float, rate: float, burst: float) -> bool:
        """True without others, with a lease that is large enough, or where the bucket is too empty in any case."""
        if not self._shares:
            return True
        bucket, now = self._bucket(key, rate, burst), self._clock()
        needed_s = min(amount, burst) / rate
        left_s = bucket.fill_s - (bucket.until - now)
        return bucket.lease_s >= needed_s - _ROUNDING * bucket.fill_s or left_s + bucket.lease_s < needed_s

    def ask(self, key: str, amount: float, rate: float, burst: float) -> None:
        self._bucket(key, rate, burst).asked_s += min(amount, burst) / rate

    def may_start(self, tenant: str, here: int, most: int) -> bool:
        places = self._places.get(tenant)
        return not self._shares or self.in_flight(tenant, here) >= most or (places is not None and places.granted > 0)

    def ask_to_start(self, tenant: str, most: int) -> None:
        places = self._places.setdefault(tenant, Places())
        places.asked += 1
        places.most = most

    async def hear(self, timeout_s: float) -> None:
        """Wants an exchange and waits for its news, `timeout_s` at the most."""
        news = self._news
        self.wanted()
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(timeout_s):
                await news.wait()

    @property
    def _shares(self) -> bool:
        return not self.alone and self.routers > 1

    @property
    def _divided(self) -> bool:
        return self.alone and self.routers > 1

    def _bucket(self, key: str, rate: float, burst: float) -> _Bucket:
        """It is full now at the earliest: what was full before earns nothing."""
        now = self._clock()
        bucket = self._buckets.get(key)
        if bucket is None:
            if len(self._buckets) >= MAX_BUCKETS:
                self._buckets = {
                    each: kept for each, kept in self._buckets.items() if kept.full_at.changed or kept.until > now
                }
            bucket = self._buckets[key] = _Bucket(key, now)
        bucket.full_at.lift(now)
        bucket.fill_s = burst / rate
        return bucket

    # For SharedService

    def take_changes(self, everything: bool = True) -> dict[str, BucketChange]:
        """Changes of buckets that changed and, with `everything`, of all that are not full."""
        now = self._clock()
        changes: dict[str, BucketChange] = {}
        for key, bucket in self._buckets.items():
            bucket.give_back()
            if bucket.full_at.changed or bucket.asked_s or (everything and bucket.until > now):
                added_s, at_least = bucket.full_at.take()
                at_least = max(at_least, min(bucket.own_full_at, now + bucket.fill_s))
                changes[key] = BucketChange(added_s, at_least, bucket.fill_s, bucket.asked_s)
                bucket.asked_s = 0.0
        self._asking.append(self._news)
        self._news = asyncio.Event()
        return changes

    def take_places(self, everything: bool = True) -> dict[str, Places]:
        """Places of tenants that want some and, with `everything`, of all that have or had some."""
        taken: dict[str, Places] = {}
        for tenant, places in list(self._places.items()):
            if not everything and not places.asked:
                continue
            taken[tenant] = replace(places)
            places.asked = places.granted = 0
            if not places.here and not taken[tenant].asked:
                del self._places[tenant]
        return taken

    def place(self, tenant: str, elsewhere: int, granted: int) -> None:
        """What an exchange brought."""
        if (places := self._places.get(tenant)) is not None:
            places.elsewhere = elsewhere
            places.granted += granted

    def put_back(self, changes: Mapping[str, BucketChange]) -> None:
        for key, bucket in self._buckets.items():
            change = changes.get(key)
            bucket.full_at.put_back(*((0.0, -math.inf) if change is None else (change.added_s, change.full_at)))

    def merge(self, totals: Mapping[str, tuple[float, float]], at: float) -> None:
        """`totals`: seconds, counted from `at`, until the buckets are full, and what was granted of what was asked."""
        for key, (total, granted) in totals.items():
            if (bucket := self._buckets.get(key)) is not None:
                bucket.full_at.merge(at + total)
                bucket.lease_s += granted

    def tell(self) -> None:
        """The exchange that `take_changes` began is over, well or not: whoever waits for it looks again."""
        for news in self._asking:
            news.set()
        self._asking = []

    def most_s(self, change: BucketChange) -> float:
        """Farther than that from being full a shared bucket cannot be."""
        return (self.routers + 1) * change.fill_s
