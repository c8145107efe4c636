"""A server of one protocol: listens, and gives every connection a thread."""

from __future__ import annotations

import socket
import threading
from collections.abc import Callable
from pathlib import Path

from tandem.wire.handshake import refuse
from tandem.wire.link import Link, Patience
from tandem.wire.listening import Listener
from tandem.wire.protocol import Protocol, Reason


class Server:
    """`start`, then `stop` once. Needs `unix_path` (in a private directory), `tcp` (host, port; port 0 picks one) or
    both. With a `key` nobody is told anything before proving it."""

    def __init__(
        self,
        unix_path: Path | None,
        tcp: tuple[str, int] | None,
        protocol: Protocol,
        patience: Patience,
        *,
        key: bytes,
        max_connections: int,
        serve: Callable[[Link], None],
        turned_away: Callable[[], None] = lambda: None,
    ) -> None:
        """`serve` is called on the thread of a connection, which lasts until it returns; `turned_away` for each one
        beyond `max_connections`. Raises ValueError without an address."""
        self._protocol = protocol
        self._patience = patience
        self._key = key
        self._max_connections = max_connections
        self._serve = serve
        self._turned_away = turned_away
        self._lock = threading.Lock()
        self._connections: dict[Link, threading.Thread] = {}
        self.is_stopping = False
        self.listener = Listener(unix_path, tcp, f"{protocol.name} connection", self._accepted)

    def start(self) -> None:
        """Listens. Raises OSError when an address cannot be used, with the path as `filename` if it is the unix one."""
        self.listener.start()

    @property
    def num_connections(self) -> int:
        with self._lock:
            return len(self._connections)

    def stop(self) -> None:
        """Ends every connection and thread. Waits for what `serve` is doing; not from there."""
        with self._lock:
            if self.is_stopping:
                return
            self.is_stopping = True
        self.listener.stop()
        with self._lock:
            connections = list(self._connections.items())
        for link, _ in connections:
            link.shutdown()
        for _, thread in connections:
            thread.join()

    def _accepted(self, sock: socket.socket) -> None:
        link = Link(sock, self._protocol, self._patience)
        thread = threading.Thread(target=self._run, args=(link,), name="kv-connection", daemon=True)
        with self._lock:
            full = len(self._connections) >= self._max_connections
            if not full:
                self._connections[link] = thread
        if full:
            self._turned_away()
            if not self._key:
                refuse(link, Reason("overloaded", f"{self._max_connections} connections are open"))
            link.close()
            return
        try:
            thread.start()
        except RuntimeError as error:  # the system has no more threads: others may end
            with self._lock:
                del self._connections[link]
            raise OSError(f"no thread for it: {error}") from error

    def _run(self, link: Link) -> None:
        try:
            self._serve(link)
        finally:
            link.close()
            with self._lock:
                del self._connections[link]
