"""Who talks to whom: identities, endpoints, and whether a peer is on this host."""

from __future__ import annotations

import functools
from dataclasses import dataclass, field
from pathlib import Path

from tandem.common.secret import derive

_BOOT_ID = Path("/proc/sys/kernel/random/boot_id")


@dataclass(frozen=True, slots=True)
class PeerIdentity:
    worker_id: str
    epoch: int
    """Differs for every start of the process."""
    compatibility: bytes
    """Digest of everything both ends must share: model, dtype, layout, version."""
    key: bytes = field(default=b"", repr=False)
    """The key of `hand_over_key`: both ends prove that they have it. Empty: there is no secret."""


def hand_over_key(secret: bytes) -> bytes:
    """Empty without a secret."""
    return derive(secret, "hand-over") if secret else b""


@dataclass(frozen=True, slots=True)
class Endpoint:
    """Where a decode worker accepts KV; the fields of `KvEndpoint` in worker.proto."""

    worker_id: str
    worker_epoch: int
    host_id: str = ""
    unix_path: str = ""
    host: str = ""
    port: int = 0
    """0: no TCP."""


@functools.cache
def local_host_id() -> str:
    """Equal for processes under one kernel, containers included; empty where the system has no boot id."""
    try:
        return _BOOT_ID.read_text().strip()
    except OSError:
        return ""


def is_local(endpoint: Endpoint) -> bool:
    """Whether the unix path is worth a try: same kernel, and the socket file is visible from here. Another container
    can show a different worker under the same path, so the handshake checks the worker's id as well."""
    return bool(
        endpoint.unix_path
        and endpoint.host_id
        and endpoint.host_id == local_host_id()
        and Path(endpoint.unix_path).is_socket()
    )
