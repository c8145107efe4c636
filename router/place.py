"""What a router process knows of its place among several on one port, and the socket on which it listens.

`--routers N` are N children of a supervisor (runtime/supervisor.py), which holds the socket that they share: what
connects while one of them dies or hangs is taken by the others.
"""

from __future__ import annotations

import errno
import os
import socket
from dataclasses import dataclass
from pathlib import Path

from tandem.common.addresses import family_of
from tandem.common.caretaker import RUN_FOLDER_VARIABLE
from tandem.common.errors import ConfigError

PLACE_VARIABLE = "TANDEM_SUPERVISOR_PLACE"
"""Set by a supervisor: index, count and the descriptor of the socket, with blanks between them."""


@dataclass(frozen=True, slots=True)
class RouterPlace:
    """Number of this router among its siblings, and what its supervisor gave it."""

    index: int = 0
    count: int = 1
    folder: Path | None = None
    """The supervisor's, for sockets of this process. None: there is no supervisor."""
    listening: int = -1
    """Descriptor of a bound socket. -1: there is none yet."""

    @property
    def health_path(self) -> Path | None:
        """Where this process answers HTTP to its supervisor."""
        return None if self.folder is None else health_path(self.folder, process_name(self))


ALONE = RouterPlace()


def place_of_this_process() -> RouterPlace:
    """What the supervisor says of it, if there is one."""
    place = os.environ.get(PLACE_VARIABLE)
    if place is None:
        return ALONE
    index, count, listening = map(int, place.split())
    return RouterPlace(index, count, Path(os.environ[RUN_FOLDER_VARIABLE]), listening)


def process_name(place: RouterPlace) -> str:
    """What it is called in logs and metrics."""
    return "router" if place.count == 1 else f"router-{place.index}"


def health_path(folder: Path, name: str) -> Path:
    return folder / f"{name}.http"


def bind(host: str, port: int) -> socket.socket:
    """A TCP socket that does not listen yet: who connects is refused. Raises ConfigError, where somebody listens on
    the port as well."""
    try:
        family = family_of(host, port)
        with socket.create_server((host, port), family=family) as probe:
            port = probe.getsockname()[1]
        sock = socket.socket(family, socket.SOCK_STREAM)
        try:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            sock.bind((host, port))
        except OSError:
            sock.close()
            raise
        return sock
    except OSError as error:
        raise cannot_listen(host, port, error) from error


def cannot_listen(host: str, port: int, error: OSError) -> ConfigError:
    if error.errno == errno.EADDRINUSE:
        return ConfigError(f"--port {port}: in use on {host} already; choose another one, or 0 for any free one")
    return ConfigError(f"--host {host} --port {port}: cannot be listened on ({error.strerror or error})")
