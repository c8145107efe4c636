"""Addresses of directories, and what opening one does not import."""

from __future__ import annotations

import subprocess
import sys

import pytest

from tandem.common.errors import ConfigError
from tandem.kvstore.directory import EmbeddedDirectory, open_directory, watch_directory
from tandem.kvstore.directory.redis_directory import RedisDirectory
from tandem.kvstore.directory.served import DirectoryClient


@pytest.mark.parametrize(
    ("url", "kind"),
    [
        ("", EmbeddedDirectory),
        ("redis://127.0.0.1:1/0", RedisDirectory),
        ("rediss://user:secret@127.0.0.1:1/0", RedisDirectory),
        ("127.0.0.1:1", DirectoryClient),
        ("store-0.example:7000", DirectoryClient),
        ("unix:/nowhere/at/all", DirectoryClient),
    ],
)
def test_the_url_says_which_directory_and_it_need_not_be_up(url: str, kind: type) -> None:
    directory = open_directory(url)
    try:
        assert type(directory) is kind
        assert directory.lookup([]) == []
    finally:
        directory.close()


@pytest.mark.parametrize(
    "url", ["localhost", "host:port", "host:0", "host:70000", "http://host:1", "unix:", ":1", "redis://host:port"]
)
def test_an_address_of_no_kind_is_refused_with_the_remedy(url: str) -> None:
    with pytest.raises(ConfigError, match=r"kv_directory .*redis://HOST:PORT"):
        open_directory(url)


def test_a_password_is_not_shown(caplog: pytest.LogCaptureFixture) -> None:
    with pytest.raises(ConfigError) as failure:
        open_directory("redis://user:secret@host:port")
    assert "secret" not in str(failure.value)


def test_a_watcher_needs_an_address() -> None:
    with pytest.raises(ConfigError):
        watch_directory("")


def test_the_embedded_directory_needs_neither_grpc_nor_redis_nor_torch() -> None:
    code = (
        "import sys, tandem.kvstore.directory, tandem.kvstore.replication.replication; "
        "print([name for name in ('grpc', 'redis', 'torch') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
