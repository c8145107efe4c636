"""Who holds which key: embedded in a process, served by one over gRPC, or in Redis (see `interfaces.Directory`).

    node ── publisher ──Uplink──> embedded | served | Redis ──Feed──> watcher (router replicas)

gRPC and Redis are imported only by what uses them.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from tandem.common.errors import ConfigError
from tandem.kvstore.directory.embedded import EmbeddedDirectory
from tandem.kvstore.directory.watcher import DirectoryWatcher
from tandem.kvstore.interfaces import Directory

if TYPE_CHECKING:
    import grpc

    from tandem.kvstore.directory.redis_directory import RedisDirectory
    from tandem.kvstore.directory.served import DirectoryClient

__all__ = [
    "DirectoryWatcher",
    "EmbeddedDirectory",
    "add_directory_service",
    "open_directory",
    "watch_directory",
]


def open_directory(url: str, secret: bytes = b"") -> Directory:
    """ "": embedded in this process. `redis://` and `rediss://`: Redis. `HOST:PORT` or `unix:PATH`: the gRPC address of
    a store node, which may ask for its `secret`. None of them has to be up yet. Raises ConfigError."""
    return _open(url, secret) if url else EmbeddedDirectory()


def watch_directory(url: str, secret: bytes = b"") -> DirectoryWatcher:
    """A local view of the directory at `url` (as in `open_directory`, not empty). Raises ConfigError."""
    feed = _open(url, secret)
    return DirectoryWatcher(feed, on_close=feed.close)


def add_directory_service(server: grpc.Server, embedded: EmbeddedDirectory) -> None:
    """Serves `embedded` to the DirectoryClients of other processes. No call takes a thread of the server for long."""
    from tandem.kvstore.directory.served import add_to_server

    add_to_server(server, embedded)


def _open(url: str, secret: bytes) -> RedisDirectory | DirectoryClient:
    scheme, separator, _ = url.partition("://")
    if scheme in ("redis", "rediss") and separator:
        from tandem.kvstore.directory.redis_directory import RedisDirectory

        return RedisDirectory(url)
    host, _, port = url.rpartition(":")
    if (url.startswith("unix:") and len(url) > len("unix:")) or (host and "/" not in url and _is_port(port)):
        from tandem.kvstore.directory.served import DirectoryClient

        return DirectoryClient(url, secret)
    raise ConfigError(
        f"kv_directory {url!r}: use redis://HOST:PORT/DB, rediss://..., or the gRPC address of a store node "
        "(HOST:PORT or unix:PATH)"
    )


def _is_port(text: str) -> bool:
    return text.isdecimal() and 0 < int(text) < 65_536
