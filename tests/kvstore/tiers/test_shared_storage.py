"""Folder and object store: several processes on one storage, damaged files, a service that is down, a real S3."""

from __future__ import annotations

import errno
import os
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from moto.server import ThreadedMotoServer
from obstore.store import LocalStore, MemoryStore, S3Store

from tandem.common.errors import ConfigError
from tandem.kvstore.interfaces import StoreIntegrityError
from tandem.kvstore.tiers import object_store, open_tier
from tandem.kvstore.tiers.disk import DiskTier
from tandem.kvstore.tiers.folder import ABANDONED_AFTER_S, FolderTier
from tandem.kvstore.tiers.object_store import ObjectStoreTier
from tandem.kvstore.tiers.redis_tier import RedisTier
from tests.kvstore.tiers.conftest import Opener
from tests.kvstore.tiers.disk_writer import key_of
from tests.kvstore.tiers.stopped_breaker import StoppedBreaker
from tests.kvstore.tiers.test_disk import get, put
from tests.kvstore.tiers.test_every_tier import run_machine
from tests.ports import free_port

CAPACITY = 16 << 20


def test_processes_that_share_a_folder_see_each_others_objects(tmp_path: Path) -> None:
    ours, theirs = FolderTier(tmp_path, CAPACITY), FolderTier(tmp_path, CAPACITY)
    assert put(ours, 1, b"content")
    assert get(theirs, 1) == b"content"
    assert theirs.delete(key_of(1))
    assert get(ours, 1) is None
    assert ours.used_bytes == 0
    store = ObjectStoreTier(LocalStore(tmp_path), CAPACITY)
    assert put(store, 2, b"same format")
    assert get(ours, 2) == b"same format"
    for tier in (ours, theirs, store):
        tier.close()


@pytest.mark.parametrize("size", [0, 10, 4095, 4096, 5000])
def test_a_truncated_file_is_a_miss(tmp_path: Path, size: int) -> None:
    tier = FolderTier(tmp_path, CAPACITY)
    assert put(tier, 1, bytes(10_000))
    (path,) = tmp_path.glob("??/*")
    os.truncate(path, size)
    assert get(tier, 1) is None
    with pytest.raises(StoreIntegrityError):
        tier.check_integrity()
    assert put(tier, 1, b"again")
    assert get(tier, 1) == b"again"
    tier.check_integrity()
    tier.close()


def test_a_file_under_another_objects_name_is_a_miss(tmp_path: Path) -> None:
    tier = FolderTier(tmp_path, CAPACITY)
    assert put(tier, 1, b"one")
    assert put(tier, 2, b"two")
    one, two = (tier._path(key_of(number)) for number in (1, 2))
    one.replace(two)
    assert get(tier, 2) is None
    tier.close()


def test_a_full_disk_leaves_no_file_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tier = FolderTier(tmp_path, CAPACITY)

    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "full")

    monkeypatch.setattr(Path, "rename", full)
    assert not put(tier, 1, b"content")
    monkeypatch.undo()
    assert [path for path in tmp_path.rglob("*") if path.is_file()] == []
    assert tier.used_bytes == 0
    assert put(tier, 1, b"content")
    tier.close()


def test_what_a_dead_writer_left_is_removed_after_a_while(tmp_path: Path) -> None:
    old, fresh = tmp_path / "old.part", tmp_path / "fresh.part"
    for path in (old, fresh):
        path.write_bytes(b"unfinished")
    past = time.time() - ABANDONED_AFTER_S - 1
    os.utime(old, (past, past))
    FolderTier(tmp_path, CAPACITY).close()
    assert fresh.exists()
    assert not old.exists()


def test_a_damaged_object_in_a_store_is_a_miss() -> None:
    memory = MemoryStore()
    tier = ObjectStoreTier(memory, CAPACITY)
    assert put(tier, 1, bytes(10_000))
    path = next(meta["path"] for page in memory.list() for meta in page)
    whole = memory.get(path).bytes().to_bytes()
    for damaged in (b"", whole[:100], whole[:4096], whole[:5000], b"?" + whole[1:]):
        memory.put(path, damaged)
        again = ObjectStoreTier(memory, CAPACITY)
        assert get(again, 1) is None
        again.close()
    tier.close()


def test_a_dead_service_costs_almost_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {
        "AWS_ENDPOINT_URL": f"http://127.0.0.1:{free_port()}",
        "AWS_ACCESS_KEY_ID": "id",
        "AWS_SECRET_ACCESS_KEY": "secret",
        "AWS_REGION": "us-east-1",
    }.items():
        monkeypatch.setenv(name, value)
    breakers: list[StoppedBreaker] = []
    monkeypatch.setattr(object_store, "Breaker", lambda: breakers.append(StoppedBreaker()) or breakers[-1])
    tier = open_tier("s3://bucket/prefix", CAPACITY)
    for number in range(100):
        assert get(tier, number) is None
        assert not put(tier, number, b"x")
    assert [breaker.calls for breaker in breakers] == [1]
    assert list(tier.objects()) == []
    tier.close()


@pytest.fixture(scope="module")
def s3() -> Iterator[str]:
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    yield f"http://{host}:{port}"
    server.stop()


def s3_opener(endpoint: str, bucket: str) -> Opener:
    import boto3

    keys = {"aws_access_key_id": "id", "aws_secret_access_key": "secret"}
    boto3.client("s3", endpoint_url=endpoint, region_name="us-east-1", **keys).create_bucket(Bucket=bucket)

    def opener(capacity: int) -> ObjectStoreTier:
        store = S3Store.from_url(
            f"s3://{bucket}/some/prefix",
            endpoint=endpoint,
            region="us-east-1",
            access_key_id="id",
            secret_access_key="secret",
            client_options={"allow_http": True},
        )
        return ObjectStoreTier(store, capacity)

    return opener


@pytest.mark.slow
def test_a_real_s3_server_agrees_with_a_dictionary(s3: str) -> None:
    count = iter(range(1000))
    run_machine(lambda: s3_opener(s3, f"bucket{next(count)}"), examples=4, steps=15)


@pytest.mark.slow
def test_a_real_s3_server_takes_an_object_of_several_parts(s3: str) -> None:
    tier = s3_opener(s3, "large")(64 << 20)
    content = os.urandom(12_000_000)
    assert put(tier, 1, content)
    assert get(tier, 1) == content
    tier.close()


def test_urls_open_their_tier_and_others_are_clear_errors(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for url, kind in (
        (f"disk:{tmp_path}/disk", DiskTier),
        (f"folder://{tmp_path}/folder", FolderTier),
        (f"redis://127.0.0.1:{free_port()}", RedisTier),
        (f"unix://{tmp_path}/none.sock", RedisTier),
    ):
        tier = open_tier(url, CAPACITY)
        assert isinstance(tier, kind)
        tier.close()
    for url, message in (
        ("ftp://x", "disk:/PATH, folder:/PATH, redis://"),
        ("disk:", "names no folder"),
        ("", "is no tier"),
        (f"folder:{__file__}/x", "kv_remote: cannot use the folder"),
    ):
        with pytest.raises(ConfigError, match=message):
            open_tier(url, CAPACITY)
    with pytest.raises(ConfigError, match="greater than 0, not 0"):
        open_tier(f"disk:{tmp_path}", 0)
    monkeypatch.setitem(sys.modules, "obstore.store", None)
    with pytest.raises(ConfigError, match=r'pip install "tandem-llm\[s3\]"'):
        open_tier("s3://bucket/prefix", CAPACITY)
