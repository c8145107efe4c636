"""Whether the process at the other end of a unix socket has ended."""

from __future__ import annotations

import os
import select
import socket
import struct

_END_S = 1.0


class PeerProcess:
    """`close` it. Nothing is known of TCP peers, on other systems, and of unseen or own processes."""

    def __init__(self, sock: socket.socket) -> None:
        self._descriptor = _process_of(sock)

    def has_ended(self) -> bool:
        """Whether it is known to have ended. Its sockets are closed a moment before its end can be seen, so this waits
        for that moment."""
        if self._descriptor is None:
            return False
        poll = select.poll()
        poll.register(self._descriptor, select.POLLIN)
        return bool(poll.poll(_END_S * 1000))

    def close(self) -> None:
        if self._descriptor is not None:
            os.close(self._descriptor)
            self._descriptor = None


def _process_of(sock: socket.socket) -> int | None:
    if sock.family != socket.AF_UNIX or not hasattr(os, "pidfd_open"):
        return None
    pid, _, _ = struct.unpack("3i", sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, struct.calcsize("3i")))
    if pid in (0, os.getpid()):
        return None
    try:
        return os.pidfd_open(pid)
    except OSError:  # gone already, or in a namespace that cannot be seen from here
        return None
