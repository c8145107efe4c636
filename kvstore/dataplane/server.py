"""Listens for workers of this host, and for peers of this and other hosts; one `Connection` for each of theirs."""

from __future__ import annotations

import logging
import threading
from dataclasses import replace
from pathlib import Path

from tandem.common.counters import Counters
from tandem.common.seldom import Seldom
from tandem.kvstore.dataplane.connection import Connection
from tandem.kvstore.dataplane.interfaces import ServedNode
from tandem.kvstore.dataplane.nixl import NixlAgent
from tandem.kvstore.dataplane.protocol import DATA_PLANE, PATIENCE
from tandem.kvstore.dataplane.stats import DataPlaneStats
from tandem.wire.link import Link
from tandem.wire.peers import PeerIdentity
from tandem.wire.serving import Server

logger = logging.getLogger(__name__)

MAX_CONNECTIONS = 256
"""One thread each."""
_SCRATCH_BUFFERS = 4


class DataServer:
    """Thread-safe. Serves `node` on a unix socket (a path in a private directory), on TCP (port 0 picks one), or both.
    With a key in `identity` it talks only to those who have it; what follows is not encrypted."""

    def __init__(
        self,
        node: ServedNode,
        identity: PeerIdentity,
        *,
        unix_path: str = "",
        listen: tuple[str, int] | None = None,
        agent: NixlAgent | None = None,
    ) -> None:
        """`agent`: other hosts may read the arena through it."""
        self._node = node
        self._identity = identity
        self._complaints = Seldom(logger, logging.WARNING)
        self._counters = Counters(DataPlaneStats())
        self._scratch = threading.Semaphore(_SCRATCH_BUFFERS)
        self._agent = agent
        self._server = Server(
            Path(unix_path) if unix_path else None,
            listen,
            DATA_PLANE,
            PATIENCE,
            key=identity.key,
            max_connections=MAX_CONNECTIONS,
            serve=self._serve,
            turned_away=lambda: self._counters.add(refused_connections=1),
        )

    def start(self) -> None:
        """Listens. Raises OSError when an address cannot be used, with the path as `filename` if it is the unix one."""
        self._server.start()

    def stop(self) -> None:
        """Ends every connection and thread."""
        self._server.stop()

    @property
    def port(self) -> int:
        """Port of TCP, after `start`; 0 without."""
        return self._server.listener.port

    def stats(self) -> DataPlaneStats:
        return replace(self._counters.snapshot(), connections=self._server.num_connections)

    def _serve(self, link: Link) -> None:
        Connection(link, self._node, self._identity, self._counters, self._complaints, self._scratch, self._agent).run()
