"""Workers' home nodes in tests."""

from __future__ import annotations

import time

from tandem.kvstore.dataplane.client import RemoteHomeNode


def connects(home: RemoteHomeNode, timeout_s: float) -> bool:
    """Whether it is connected to its node, after `timeout_s` at most."""
    deadline = time.monotonic() + timeout_s
    while not home.connected and time.monotonic() < deadline:
        time.sleep(0.005)
    return home.connected
