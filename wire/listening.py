"""A unix socket, a TCP socket or both, and one thread that accepts connections: under the hand-over's server and under
the store's data plane."""

from __future__ import annotations

import errno
import logging
import select
import socket
import threading
import time
from collections.abc import Callable
from pathlib import Path

from tandem.common.addresses import family_of
from tandem.common.seldom import Seldom

logger = logging.getLogger(__name__)

_BACKLOG = 128
_ACCEPT_RETRY_S = 0.1


class Listener:
    """`start`, then `stop` once."""

    def __init__(
        self, unix_path: Path | None, tcp: tuple[str, int] | None, what: str, accepted: Callable[[socket.socket], None]
    ) -> None:
        """Port 0 picks one. `what` names connections in the log. `accepted` is called on the listener's thread, owns
        the socket, and must not block; the socket of a call that raises OSError is closed. Raises ValueError without
        an address."""
        if unix_path is None and tcp is None:
            raise ValueError(f"there is no address to listen on for {what}")
        self.unix_path = unix_path
        self.host, self.port = "", 0
        """TCP address after `start`, as it was listened on: the host may be a wildcard. Port 0: no TCP."""
        self._tcp = tcp
        self._what = what
        self._accepted = accepted
        self._sockets: list[socket.socket] = []
        self._complaints = Seldom(logger, logging.ERROR)
        self._stopping = False
        self._wake_read, self._wake_write = socket.socketpair()
        self._thread = threading.Thread(target=self._run, name="kv-accept", daemon=True)

    def start(self) -> None:
        """Raises OSError when an address cannot be used, with the path as `filename` if it is the unix one."""
        try:
            if self.unix_path:
                self._sockets.append(_listen_unix(self.unix_path))
            if self._tcp:
                family = family_of(*self._tcp)
                self._sockets.append(socket.create_server(self._tcp, family=family, backlog=_BACKLOG))
                self.host, self.port = self._sockets[-1].getsockname()[:2]
        except OSError:
            self._close()
            raise
        for listening in self._sockets:
            listening.setblocking(False)
        self._thread.start()

    def stop(self) -> None:
        """No connection is accepted after this."""
        self._stopping = True
        if self._thread.ident is not None:  # started
            self._wake_write.send(b"x")
            self._thread.join()
        self._close()

    def _close(self) -> None:
        for listening in self._sockets:
            if listening.family == socket.AF_UNIX and self.unix_path:
                self.unix_path.unlink(missing_ok=True)
            listening.close()
        self._sockets.clear()
        self._wake_read.close()
        self._wake_write.close()

    def _run(self) -> None:
        poll = select.poll()
        by_descriptor = {listening.fileno(): listening for listening in self._sockets}
        for descriptor in (*by_descriptor, self._wake_read.fileno()):
            poll.register(descriptor, select.POLLIN)
        while not self._stopping:
            for descriptor, _ in poll.poll():
                listening = by_descriptor.get(descriptor)
                if listening is not None:
                    self._accept(listening)

    def _accept(self, listening: socket.socket) -> None:
        try:
            sock, _ = listening.accept()
        except (BlockingIOError, ConnectionAbortedError):
            return  # the client went away meanwhile
        except OSError as error:
            self._complaints.log("accepting a %s failed: %s", self._what, error)
            time.sleep(_ACCEPT_RETRY_S)  # out of descriptors, most likely: the socket stays readable
            return
        try:
            self._accepted(sock)
        except OSError as error:
            self._complaints.log("a %s could not be set up: %s", self._what, error)
            sock.close()


def _listen_unix(path: Path) -> socket.socket:
    """Replaces a socket file that nobody listens on any more."""
    if path.is_socket():
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
            try:
                probe.connect(str(path))
            except ConnectionRefusedError:
                path.unlink()
    listening = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        listening.bind(str(path))
        path.chmod(0o600)
        listening.listen(_BACKLOG)
    except OSError as error:
        listening.close()
        raise OSError(error.errno or errno.EINVAL, error.strerror or str(error), str(path)) from error
    return listening
