"""Whatever lies in the directory's Redis: a look-up misses at most, nothing is raised, and all is as before soon."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import pytest
import redis
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tandem.kvstore.directory import publisher, watch_directory
from tandem.kvstore.directory.redis_scripts import MAX_MEMBERS
from tandem.kvstore.interfaces import Directory
from tests.kvstore.directory.harness import DISK, Holder, key, truth

Wait = Callable[[Callable[[], object]], None]
NUMBERS = range(20)
RUBBISH: list[Any] = [
    "rubbish",
    "",
    "9" * 32,
    b"\xff\x00" * 100,
    "x" * 1_000_000,
    ["a list"],
    {"a set"},
    {"epoch": "9" * 20, "gen": "9" * 12, "seq": "1e300", "info": "x", "heard": "inf"},
    {"epoch": "nan", "gen": "", "seq": "-1", "info": b"\xc1", "heard": "nan"},
    {f"h{number:0>32}a": str(number) for number in range(3000)},
]


def shows(directory: Any, *holders: Holder) -> bool:
    found = directory.lookup([key(number) for number in NUMBERS])
    return [set(places) for places in found] == [truth(holders, number) for number in NUMBERS]


def only_true(directory: Directory, *holders: Holder) -> bool:
    """What is found is true; something may be missing."""
    found = directory.lookup([key(number) for number in NUMBERS])
    return all(set(places) <= truth(holders, number) for number, places in zip(NUMBERS, found, strict=True))


def joined(directory: Directory, name: str) -> Holder:
    node = Holder(name, epoch=time.time_ns())
    for number in NUMBERS[:10]:
        node.take(number)
    node.join(directory)
    assert directory.flush(60)  # type: ignore[attr-defined]
    return node


def put(client: redis.Redis, name: bytes, rubbish: Any) -> None:
    """At once: a beat between the two would bring the key back with a type of its own."""
    with client.pipeline() as both:
        both.delete(name)
        match rubbish:
            case list():
                both.rpush(name, *rubbish)
            case dict():
                both.hset(name, mapping=rubbish)
            case set():
                both.sadd(name, *rubbish)
            case _:
                both.set(name, rubbish)
        both.execute()


@pytest.fixture
def client(redis_url: str) -> redis.Redis:
    return redis.Redis.from_url(redis_url)


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(publisher, "BEAT_S", 0.05)


def heals(directory: Any, node: Holder, eventually: Wait) -> None:
    """What is said from now on is found; what was said is again once the node says everything."""
    directory.publish(node.info.node_id, [node.take(15, DISK)])
    eventually(lambda: set(directory.lookup([key(15)])[0]) == truth([node], 15))
    node.join(directory)
    assert directory.flush(60)
    eventually(lambda: shows(directory, node))
    eventually(lambda: set(directory.nodes()) == {node.info.node_id})


@pytest.mark.parametrize("rubbish", RUBBISH, ids=lambda rubbish: repr(rubbish)[:30])
def test_rubbish_at_every_key(redis_url: str, client, connect, eventually: Wait, rubbish: Any) -> None:  # type: ignore[no-untyped-def]
    directory = connect(redis_url)
    node = joined(directory, "a")
    watcher = watch_directory(redis_url)
    try:
        eventually(lambda: shows(watcher, node))
        for name in client.keys("tandem:kvdir:*"):
            put(client, name, rubbish)
        assert only_true(directory, node)
        heals(directory, node, eventually)
        eventually(lambda: shows(watcher, node))
    finally:
        watcher.close()


@pytest.mark.parametrize("kind", [b"k", b"held", b"node", b"alive", b"members", b"stream"])
def test_rubbish_at_one_kind_of_key(redis_url: str, client, connect, eventually: Wait, kind: bytes) -> None:  # type: ignore[no-untyped-def]
    directory = connect(redis_url)
    node = joined(directory, "a")
    for rubbish in RUBBISH:
        names = [name for name in client.keys("tandem:kvdir:*") if name.split(b":")[2] == kind]
        for name in names:
            put(client, name, rubbish)
        assert only_true(directory, node)
        heals(directory, node, eventually)


_fields = st.one_of(st.binary(max_size=60), st.just(b"h" + b"0" * 32 + b"a"))
_values = st.one_of(st.binary(max_size=40), st.floats().map(lambda number: str(number).encode()))


@settings(
    max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow]
)
@given(
    writes=st.lists(
        st.tuples(st.integers(0, 99), st.sampled_from(["field", "member", "entry", "set", "delete"]), _fields, _values),
        max_size=12,
    )
)
def test_any_writes_are_a_miss_at_most(redis_url: str, client, connect, eventually: Wait, writes: Any) -> None:  # type: ignore[no-untyped-def]
    client.flushall()
    directory = connect(redis_url)
    node = joined(directory, "a")
    for where, how, field, value in writes:
        names = sorted(client.keys("tandem:kvdir:*"))
        name = names[where % len(names)] if names else b"tandem:kvdir:members"
        kind = client.type(name)
        if how == "field" and kind == b"hash":
            client.hset(name, field, value)
        elif how == "member" and kind == b"set":
            client.sadd(name, field, value)
        elif how == "entry" and kind == b"stream":
            client.xadd(name, {b"node": field, b"epoch": value, b"seq": value, b"reset": b"1", b"events": field})
        elif how == "set":
            client.set(name, value)
        elif how == "delete":
            client.delete(name)
    assert len(directory.lookup([key(number) for number in NUMBERS])) == len(NUMBERS)
    heals(directory, node, eventually)
    directory.close()


@pytest.mark.parametrize("count", [MAX_MEMBERS - 10, 1_000_000])
def test_ghosts_among_the_members_go_and_hold_nobody_up(  # type: ignore[no-untyped-def]
    redis_url: str, client, connect, eventually: Wait, count: int
) -> None:
    directory = connect(redis_url)
    node = joined(directory, "a")
    for first in range(0, count, 10_000):
        client.sadd("tandem:kvdir:members", *(f"ghost {number}" for number in range(first, min(first + 10_000, count))))
    client.slowlog_reset()
    heals(directory, node, eventually)
    eventually(lambda: client.scard("tandem:kvdir:members") == 1)
    scripts = [entry for entry in client.slowlog_get(100) if entry["command"].startswith(b"EVALSHA")]
    assert all(entry["duration"] < 1_000_000 for entry in scripts), "microseconds"


def test_a_later_epoch_that_nobody_lives_in_does_not_keep_a_node_out(  # type: ignore[no-untyped-def]
    redis_url: str, client, connect, eventually: Wait
) -> None:
    """Left by a process whose clock was ahead, or made up."""
    directory = connect(redis_url)
    client.hset("tandem:kvdir:node:a", mapping={"epoch": "9" * 20, "gen": "0" * 12, "seq": "5"})
    node = joined(directory, "a")
    assert shows(directory, node)
    client.hset("tandem:kvdir:node:a", mapping={"epoch": "9" * 20, "gen": "0" * 12, "seq": "5"})
    client.set("tandem:kvdir:alive:a", "9" * 20 + "0" * 12)
    heals(directory, node, eventually)


def test_a_stream_whose_ids_are_used_up_goes_on(redis_url: str, client, connect, eventually: Wait) -> None:  # type: ignore[no-untyped-def]
    directory = connect(redis_url)
    node = joined(directory, "a")
    watcher = watch_directory(redis_url)
    try:
        eventually(lambda: shows(watcher, node))
        client.xadd("tandem:kvdir:stream", {"rub": "bish"}, id="18446744073709551615-18446744073709551615")
        directory.publish("a", [node.take(17)])
        assert directory.flush(60)
        eventually(lambda: shows(watcher, node))
        directory.publish("a", [node.take(18)])
        eventually(lambda: shows(watcher, node))
    finally:
        watcher.close()
