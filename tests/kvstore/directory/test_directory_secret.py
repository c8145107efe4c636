"""A directory behind a secret: those who know it use it, strangers see nothing and say why."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import grpc
import pytest

from tandem.common.credentials import add_port
from tandem.kvstore.directory import EmbeddedDirectory, add_directory_service, open_directory, watch_directory
from tandem.kvstore.interfaces import NodeInfo, ObjectKey

from .conftest import Wait

SECRET = b"a secret of enough bytes"
KEY = ObjectKey(b"k" * 32)


@pytest.fixture
def address(tmp_path: Path) -> Iterator[str]:
    server = grpc.server(ThreadPoolExecutor(4))
    directory = EmbeddedDirectory()
    add_directory_service(server, directory)
    path = f"unix:{tmp_path}/node.sock"
    add_port(server, path, SECRET)
    server.start()
    yield path
    server.stop(None).wait()
    directory.close()


@pytest.mark.parametrize("other", [b"", b"another secret, as long"])
def test_it_works_for_those_who_know_it(
    address: str, other: bytes, eventually: Wait, caplog: pytest.LogCaptureFixture
) -> None:
    member, stranger = open_directory(address, SECRET), open_directory(address, other)
    watcher, blind = watch_directory(address, SECRET), watch_directory(address, other)
    try:
        member.register(NodeInfo(node_id="node-0", epoch=1, host_id="host"), list)
        stranger.register(NodeInfo(node_id="rogue", epoch=1, host_id="host"), list)
        eventually(lambda: "node-0" in watcher.nodes())
        assert member.lookup([KEY]) == [()]
        eventually(lambda: "give both the same secret_file" in caplog.text)
        assert not stranger.nodes()
        assert not blind.nodes()
        assert "rogue" not in member.nodes()
    finally:
        for each in (member, stranger, watcher, blind):
            each.close()
