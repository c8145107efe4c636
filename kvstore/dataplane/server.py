"""Listens for workers of this host, and for peers of this and other hosts; one `Session` per connection."""

from __future__ import annotations

import errno
import logging
import select
import socket
import threading
import time
from pathlib import Path

from tandem.kvstore.dataplane.auth import ServerIdentity
from tandem.kvstore.dataplane.interfaces import ServedNode
from tandem.kvstore.dataplane.session import Session
from tandem.kvstore.dataplane.stats import Counters, DataPlaneStats

logger = logging.getLogger(__name__)

MAX_CONNECTIONS = 256
"""One thread each."""
_SCRATCH_BUFFERS = 4
_BACKLOG = 128
_ACCEPT_RETRY_S = 0.1


class DataServer:
    """Thread-safe. Serves `node` on a unix socket (a path in a private directory), on TCP (port 0 picks one), or both.
    With a secret it talks only to those who know it; nothing is encrypted."""

    def __init__(
        self,
        node: ServedNode,
        identity: ServerIdentity,
        *,
        unix_path: str = "",
        listen: tuple[str, int] | None = None,
        secret: bytes = b"",
    ) -> None:
        if not unix_path and listen is None:
            raise ValueError("a DataServer needs unix_path or listen")
        self.port = 0
        """Of TCP, after `start`; 0 without."""
        self._node = node
        self._identity = identity
        self._unix_path = Path(unix_path) if unix_path else None
        self._listen = listen
        self._secret = secret
        self._counters = Counters()
        self._scratch = threading.Semaphore(_SCRATCH_BUFFERS)
        self._lock = threading.Lock()
        self._sessions: set[Session] = set()
        self._stopping = False
        self._listeners: list[socket.socket] = []
        self._wake_read, self._wake_write = socket.socketpair()
        self._thread = threading.Thread(target=self._accept_until_stopped, name="kv-accept", daemon=True)

    def start(self) -> None:
        """Listens. Raises OSError when an address cannot be used, with the path as `filename` if it is the unix one."""
        try:
            if self._unix_path:
                self._listeners.append(_listen_unix(self._unix_path))
            if self._listen:
                family = socket.AF_INET6 if ":" in self._listen[0] else socket.AF_INET
                self._listeners.append(socket.create_server(self._listen, family=family, backlog=_BACKLOG))
                self.port = self._listeners[-1].getsockname()[1]
        except OSError:
            self._stopping = True
            self._close_sockets()
            raise
        for listener in self._listeners:
            listener.setblocking(False)
        self._thread.start()

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
        self._wake_write.send(b"x")
        if self._thread.ident is not None:  # started
            self._thread.join()
        self._close_sockets()
        with self._lock:
            sessions = list(self._sessions)
        for session in sessions:
            session.stop()

    def _close_sockets(self) -> None:
        for listener in self._listeners:
            if listener.family == socket.AF_UNIX and self._unix_path:
                self._unix_path.unlink(missing_ok=True)
            listener.close()
        self._wake_read.close()
        self._wake_write.close()

    def _accept_until_stopped(self) -> None:
        poll = select.poll()
        by_descriptor = {listener.fileno(): listener for listener in self._listeners}
        for descriptor in (*by_descriptor, self._wake_read.fileno()):
            poll.register(descriptor, select.POLLIN)
        while not self._stopping:
            for descriptor, _ in poll.poll():
                listener = by_descriptor.get(descriptor)
                if listener is not None:
                    self._accept(listener)

    def _accept(self, listener: socket.socket) -> None:
        try:
            sock, _ = listener.accept()
        except (BlockingIOError, ConnectionAbortedError):
            return  # the client went away meanwhile
        except OSError:
            logger.exception("accepting a data plane connection failed")
            time.sleep(_ACCEPT_RETRY_S)  # out of descriptors, most likely: the socket stays readable
            return
        try:
            self._admit(sock)
        except OSError:
            logger.exception("a data plane connection could not be set up")
            sock.close()

    def _admit(self, sock: socket.socket) -> None:
        session = Session(sock, self._node, self._identity, self._secret, self._counters, self._scratch, self._ended)
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


def _listen_unix(path: Path) -> socket.socket:
    """Replaces a socket file that nobody listens on any more."""
    if path.is_socket():
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
            try:
                probe.connect(str(path))
            except ConnectionRefusedError:
                path.unlink()
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        listener.bind(str(path))
        path.chmod(0o600)
        listener.listen(_BACKLOG)
    except OSError as error:
        listener.close()
        raise OSError(error.errno or errno.EINVAL, error.strerror or str(error), str(path)) from error
    return listener
