"""Listens for workers of this host, and for peers of this and other hosts; one `Session` per connection."""

from __future__ import annotations

import logging
import socket
import threading
from pathlib import Path

from tandem.common.seldom import Seldom
from tandem.kvstore.dataplane.auth import ServerIdentity, data_plane_key
from tandem.kvstore.dataplane.interfaces import ServedNode
from tandem.kvstore.dataplane.nixl import NixlAgent
from tandem.kvstore.dataplane.session import Session
from tandem.kvstore.dataplane.stats import Counters, DataPlaneStats
from tandem.wire.listening import Listener

logger = logging.getLogger(__name__)

MAX_CONNECTIONS = 256
"""One thread each."""
_SCRATCH_BUFFERS = 4


class DataServer:
    """Thread-safe. Serves `node` on a unix socket (a path in a private directory), on TCP (port 0 picks one), or both.
    With a secret it talks only to those who know it; what follows is not encrypted."""

    def __init__(
        self,
        node: ServedNode,
        identity: ServerIdentity,
        *,
        unix_path: str = "",
        listen: tuple[str, int] | None = None,
        secret: bytes = b"",
        agent: NixlAgent | None = None,
    ) -> None:
        """`agent`: other hosts may read the arena through it."""
        self._node = node
        self._identity = identity
        self._key = data_plane_key(secret)
        self._complaints = Seldom(logger, logging.WARNING)
        self._counters = Counters()
        self._scratch = threading.Semaphore(_SCRATCH_BUFFERS)
        self._agent = agent
        self._lock = threading.Lock()
        self._sessions: set[Session] = set()
        self._stopping = False
        path = Path(unix_path) if unix_path else None
        self._listener = Listener(path, listen, "data plane connection", self._admit)

    def start(self) -> None:
        """Listens. Raises OSError when an address cannot be used, with the path as `filename` if it is the unix one."""
        self._listener.start()

    @property
    def port(self) -> int:
        """Of TCP, after `start`; 0 without."""
        return self._listener.port

    def stats(self) -> DataPlaneStats:
        with self._lock:
            connections = sum(session.alive for session in self._sessions)
        return self._counters.snapshot(connections)

    def stop(self) -> None:
        """Ends every connection and thread."""
        with self._lock:
            if self._stopping:
                return
            self._stopping = True
        self._listener.stop()
        with self._lock:
            sessions = list(self._sessions)
        for session in sessions:
            session.stop()

    def _admit(self, sock: socket.socket) -> None:
        session = Session(
            sock,
            self._node,
            self._identity,
            self._key,
            self._counters,
            self._complaints,
            self._scratch,
            self._agent,
            self._ended,
        )
        with self._lock:
            full = len(self._sessions) >= MAX_CONNECTIONS
            if not full:
                self._sessions.add(session)
        if full:
            self._counters.add("refused_connections")
            session.turn_away("overloaded", f"{MAX_CONNECTIONS} connections are open")
        else:
            session.start()

    def _ended(self, session: Session) -> None:
        with self._lock:
            self._sessions.discard(session)
