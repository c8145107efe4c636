"""What `open_node` and `open_home` put together: nodes of two hosts, a shared secret, encryption at rest, replicas."""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tandem.common.errors import ConfigError
from tandem.kvstore.dataplane.client import RemoteHomeNode
from tandem.kvstore.directory import EmbeddedDirectory
from tandem.kvstore.interfaces import TierName
from tandem.kvstore.process.open import OpenNode, open_home, open_node
from tandem.kvstore.settings import StoreSettings
from tests.kvstore.chunks import NUM_LAYERS, is_sound, key, put, rows
from tests.kvstore.homes import connects

HOST_BYTES = 8 << 20
DEADLINE_S = 60.0
Open = Callable[..., OpenNode]


class _Shared:
    """One directory for several nodes of this process: it outlives each."""

    def __init__(self, directory: EmbeddedDirectory) -> None:
        self.register = directory.register
        self.publish = directory.publish
        self.lookup = directory.lookup
        self.nodes = directory.nodes

    def close(self) -> None: ...


@pytest.fixture
def open_on_own_host(monkeypatch: pytest.MonkeyPatch) -> Iterator[Open]:
    """Nodes that take each other for other hosts, so that they talk over TCP."""
    directory = EmbeddedDirectory()
    opened: list[OpenNode] = []
    numbers = itertools.count(1)

    def open_one(name: str, **settings: object) -> OpenNode:
        monkeypatch.setattr("tandem.kvstore.process.open.local_host_id", lambda: f"host of {name}")
        chosen = {"kv_host_bytes": HOST_BYTES, "kv_peer_listen": "127.0.0.1:0"} | settings
        node = open_node(StoreSettings(**chosen), name, next(numbers), directory=_Shared(directory))  # type: ignore[arg-type]
        opened.append(node)
        return node

    yield open_one
    for node in reversed(opened):
        node.node.check_integrity()
        node.close()
    directory.close()


def wait_for(condition: Callable[[], object]) -> None:
    deadline = time.monotonic() + DEADLINE_S
    while not condition():
        assert time.monotonic() < deadline, "did not become true in time"
        time.sleep(0.005)


def test_an_object_comes_from_another_host_layer_by_layer(open_on_own_host: Open, tmp_path: Path) -> None:
    secret = tmp_path / "secret"
    secret.write_text("0123456789abcdef")
    first, second = (open_on_own_host(name, secret_file=str(secret)) for name in ("a", "b"))
    for number in range(4):
        assert put(first.node, number, head_dim=64)
    keys = [key(number) for number in range(4)]
    wait_for(lambda: len(second.node.locate(keys)) == 4)
    with second.node.fetch(second.node.locate(keys)) as fetch:
        assert {source.link for source in fetch.sources} == {"peer:a"}
        assert fetch.wait(1, DEADLINE_S)
        assert fetch.wait(NUM_LAYERS, DEADLINE_S)
        wait_for(lambda: fetch.intact() == 4)
        assert all(is_sound(fetch, number, number) for number in range(4))
    assert first.server is not None
    assert first.server.stats().sent_bytes > 0
    assert first.server.stats().leased_ranges == 0


def test_without_the_secret_nothing_is_read(open_on_own_host: Open, tmp_path: Path) -> None:
    secret = tmp_path / "secret"
    secret.write_text("0123456789abcdef")
    first, second = open_on_own_host("a", secret_file=str(secret)), open_on_own_host("b")
    assert put(first.node, 0)
    wait_for(lambda: second.node.locate([key(0)]))
    with second.node.fetch(second.node.locate([key(0)])) as fetch:
        assert not fetch.wait(1, DEADLINE_S)
        assert fetch.intact() == 0


def test_a_node_that_dies_while_it_is_read_is_a_miss(open_on_own_host: Open) -> None:
    first, second = open_on_own_host("a"), open_on_own_host("b")
    for number in range(4):
        assert put(first.node, number)
    keys = [key(number) for number in range(4)]
    wait_for(lambda: len(second.node.locate(keys)) == 4)
    located = second.node.locate(keys)
    assert first.server is not None
    first.server.stop()
    with second.node.fetch(located) as fetch:
        assert not fetch.wait(NUM_LAYERS, DEADLINE_S)


def test_hot_objects_are_copied_to_another_host(open_on_own_host: Open, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tandem.kvstore.replication.replication.SETTLE_S", 0.0)
    monkeypatch.setattr("tandem.kvstore.replication.replication.ROUND_S", 0.05)
    first, second = (open_on_own_host(name, kv_copies=2, kv_directory="redis://127.0.0.1:1/0") for name in ("a", "b"))
    assert put(first.node, 0)
    assert put(first.node, 1)
    for _ in range(20):
        first.node.fetch(first.node.locate([key(0)])).close()
    wait_for(lambda: second.node.lookups.contains(key(0)))
    assert second.node.lookups.contains(key(1)) == []
    with second.node.fetch(second.node.locate([key(0)])) as fetch:
        assert is_sound(fetch, 0, 0)


def test_what_is_on_disk_is_encrypted_and_survives(tmp_path: Path) -> None:
    secret = tmp_path / "key"
    secret.write_text("ab" * 32)
    settings = StoreSettings(
        kv_host_bytes=HOST_BYTES,
        kv_disk=str(tmp_path / "disk"),
        kv_disk_bytes=32 << 20,
        kv_encryption_key_file=str(secret),
    )
    node = open_node(settings, "n", 1)
    assert put(node.node, 7)
    assert node.node.flush(DEADLINE_S)
    node.close()
    written = b"".join(path.read_bytes() for path in (tmp_path / "disk").rglob("*") if path.is_file())
    assert len(written) > len(rows(7, 0, 4096))
    assert rows(7, 0, 64) not in written
    again = open_node(settings, "n", 2)
    with again.node.fetch(again.node.locate([key(7)])) as fetch:
        assert fetch.wait(NUM_LAYERS, DEADLINE_S)
        assert fetch.sources[0].tier is TierName.DISK
        wait_for(lambda: fetch.intact() == 1)
        assert is_sound(fetch, 0, 7)
    again.close()
    secret.write_text("cd" * 32)
    stranger = open_node(settings, "n", 3)
    with stranger.node.fetch(stranger.node.locate([key(7)])) as fetch:
        assert not fetch.wait(1, DEADLINE_S)
    stranger.close()


def test_a_worker_gets_the_store_that_its_settings_ask_for(tmp_path: Path) -> None:
    assert open_home(StoreSettings(), "w", 1) is None
    embedded = open_home(StoreSettings(kv_host_bytes=HOST_BYTES), "w", 1)
    assert embedded is not None
    assert embedded.embedded is not None
    assert embedded.embedded.server is None
    assert embedded.node_id == "w"
    assert put(embedded.home, 0)
    embedded.close()
    served = open_node(StoreSettings(kv_host_bytes=HOST_BYTES), "n", 1, unix_path=str(tmp_path / "kv.sock"))
    worker = open_home(StoreSettings(kv_store_socket=str(tmp_path / "kv.sock")), "w", 1)
    assert worker is not None
    assert isinstance(worker.home, RemoteHomeNode)
    assert connects(worker.home, DEADLINE_S)
    assert worker.node_id == "n"
    assert put(worker.home, 0)
    wait_for(lambda: served.node.lookups.contains(key(0)) == [TierName.HOST])
    worker.close()
    served.close()


@pytest.mark.parametrize(
    ("settings", "complaint"),
    [
        ({"kv_disk": "/x"}, "kv_disk is set and kv_host_bytes is 0"),
        ({"kv_nixl": True}, "kv_nixl is set and kv_host_bytes is 0"),
        ({"kv_host_bytes": -1}, "kv_host_bytes"),
        ({"kv_host_bytes": 1, "kv_disk": "/x", "kv_disk_bytes": 0}, "kv_disk_bytes"),
        ({"kv_chunk_tokens": 0}, "kv_chunk_tokens"),
        ({"kv_host_bytes": 1, "kv_copies": 2}, "kv_directory"),
        ({"kv_host_bytes": 1, "kv_peer_listen": "host"}, "HOST:PORT"),
    ],
)
def test_settings_that_make_no_sense_are_named(settings: dict[str, object], complaint: str) -> None:
    with pytest.raises(ConfigError, match=complaint):
        StoreSettings(**settings)  # type: ignore[arg-type]
