"""Who talks to whom: identities, endpoints, and whether a peer is on this host."""

from __future__ import annotations

import functools
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

_BOOT_ID = Path("/proc/sys/kernel/random/boot_id")


@dataclass(frozen=True, slots=True)
class PeerIdentity:
    """One end of connections, as the other end gets to know it."""

    name: str
    """Id of the worker or node."""
    epoch: int = 0
    """Differs for every start of the process."""
    compatibility: bytes = b""
    """Digest of everything both ends must share: model, dtype, layout, version."""
    key: bytes = field(default=b"", repr=False)
    """Key of `wire.protocol.Protocol.key`, which both ends prove that they have. Empty: there is no secret."""


class Place(Protocol):
    """Where somebody listens."""

    @property
    def host_id(self) -> str:
        """Id of the host that has the unix socket; empty where there is none."""

    @property
    def unix_path(self) -> str: ...

    @property
    def host(self) -> str: ...

    @property
    def port(self) -> int:
        """0: no TCP."""


@dataclass(frozen=True, slots=True)
class Endpoint:
    """Where a decode worker accepts KV, a `Place`; the fields of `KvEndpoint` in worker.proto."""

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


def is_local(place: Place) -> bool:
    """Whether the unix path is worth a try: same kernel, and the socket file is visible from here. Another container
    can show another process under the same path, so who answers there must be asked as well."""
    return bool(
        place.unix_path and place.host_id and place.host_id == local_host_id() and Path(place.unix_path).is_socket()
    )
