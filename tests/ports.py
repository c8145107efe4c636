"""Ports for processes that have to be told one before they start."""

from __future__ import annotations

import os
import socket

FIRST, LAST = 10_240, 32_767
"""Below the ports that Linux gives to those who ask for any: nobody else gets one of these by chance."""
_reserved: list[socket.socket] = []


def free_port() -> int:
    """Nobody listens there, and no other test that runs on this machine is given it while this process lives."""
    count = LAST - FIRST + 1
    for step in range(count):
        port = FIRST + (os.getpid() * 97 + len(_reserved) + step) % count
        name = socket.socket(socket.AF_UNIX)
        try:
            name.bind(f"\0tandem-test-port-{port}")  # kept: a name that goes with its process
            with socket.socket() as probe:
                probe.bind(("0.0.0.0", port))
        except OSError:
            name.close()
            continue
        _reserved.append(name)
        return port
    raise AssertionError("no port is free")
