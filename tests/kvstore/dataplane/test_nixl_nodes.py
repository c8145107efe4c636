"""Nodes of two hosts that read each other over NIXL: what `kv_nixl` puts together, and what rests after a fault."""

from __future__ import annotations

from pathlib import Path

import pytest

from tandem.common.errors import ConfigError
from tandem.kvstore.dataplane import nixl as nixl_module
from tandem.kvstore.process.open import OpenNode, open_node
from tandem.kvstore.settings import StoreSettings
from tests.kvstore.chunks import NUM_LAYERS, is_sound, key, put
from tests.kvstore.dataplane.fake_nixl import FakeNixl
from tests.kvstore.dataplane.test_nixl import REAL
from tests.kvstore.process.test_open_store import DEADLINE_S, HOST_BYTES, Open, open_on_own_host, wait_for

__all__ = ["open_on_own_host"]


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch) -> FakeNixl:
    library = FakeNixl()
    monkeypatch.setattr(nixl_module, "load_library", lambda: library)
    monkeypatch.setattr(nixl_module, "STALL_S", 0.05)
    return library


def fetch(second: OpenNode, count: int) -> bool:
    """Whether all of these objects arrive, sound."""
    keys = [key(number) for number in range(count)]
    wait_for(lambda: len(second.node.locate(keys)) == count)
    with second.node.fetch(second.node.locate(keys)) as fetched:
        if not fetched.wait(NUM_LAYERS, DEADLINE_S):
            return False
        wait_for(lambda: fetched.intact() == count)
        return all(is_sound(fetched, number, number) for number in range(count))


@pytest.mark.parametrize("library", ["fake", REAL])
def test_objects_of_another_host_come_over_nixl(
    open_on_own_host: Open, library: str, request: pytest.FixtureRequest, tmp_path: Path
) -> None:
    if library == "fake":
        request.getfixturevalue("fake")
    secret = tmp_path / "secret"
    secret.write_text("0123456789abcdef")
    first, second = (
        open_on_own_host(name, kv_nixl=True, secret_file=str(secret), kv_link_codec="raw") for name in ("a", "b")
    )
    for number in range(4):
        assert put(first.node, number, head_dim=64)
    assert fetch(second, 4)
    assert first.server is not None
    assert first.server.stats().sent_bytes == 0
    assert first.server.stats().leased_ranges >= 4
    wait_for(lambda: first.node.stats().leases == 0)


def test_one_side_alone_reads_over_the_connection(fake: FakeNixl, open_on_own_host: Open) -> None:
    first, second = open_on_own_host("a"), open_on_own_host("b", kv_nixl=True)
    assert put(first.node, 0)
    assert fetch(second, 1)
    assert fake.transfers == 0


def test_a_lost_read_fails_the_fetch_and_its_memory_rests_until_it_cannot_write(
    fake: FakeNixl, open_on_own_host: Open
) -> None:
    first, second = (open_on_own_host(name, kv_nixl=True, kv_link_codec="raw") for name in ("a", "b"))
    assert put(first.node, 0, head_dim=64)
    fake.script = ["hangs"]
    assert not fetch(second, 1)
    assert second.node.stats().leases == 1
    assert second.node.stats().detached == 1
    second.node.check_integrity()
    others = range(100, 400)  # far more than fits: all other host memory is used again
    for number in others:
        assert put(second.node, number)
    fake.finish()
    left = [number for number in others if second.node.lookups.contains(key(number))]
    assert 10 < len(left) < len(others)
    for number in left:
        with second.node.fetch(second.node.locate([key(number)])) as fetched:
            assert is_sound(fetched, 0, number)
    wait_for(lambda: fetch(second, 1))
    wait_for(lambda: second.node.stats().leases == 0)
    assert second.node.stats().detached == 0
    second.node.check_integrity()


def test_a_node_that_wants_it_in_vain_does_not_start(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(nixl_module, "PACKAGES", ("no_such_nixl",))
    settings = StoreSettings(kv_host_bytes=HOST_BYTES, kv_nixl=True, kv_directory="redis://127.0.0.1:1/0")
    with pytest.raises(ConfigError, match=r"kv_nixl.*pip install"):
        open_node(settings, "n", 1, unix_path=str(tmp_path / "kv.sock"))
