"""Where a router learns which workers there are: from a list, a file that is watched, a DNS name.

Kubernetes and Ray become further sources: what `WorkerSource` asks for, and a line in `open_sources`.
"""

from __future__ import annotations

import asyncio
import contextlib
import re
import socket
from collections.abc import Awaitable, Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import msgspec

from tandem.common.errors import ConfigError
from tandem.common.yaml_file import read_document
from tandem.proto import worker_pb2

FILE_POLL_S = 1.0
"""How often a file is looked at."""
MAX_FILE_BYTES = 1 << 20
MAX_WORKERS = 1024
"""Workers of one source."""
NAME_POLL_S = 10.0
"""How often a name is looked up; headless services of Kubernetes are good for 30 s."""
NAME_PAUSE_S = 0.5
"""Least time between two look-ups, however many workers are lost."""
NAME_TIMEOUT_S = 5.0
NAME_PREFIX = "dns:"
_ADDRESS = re.compile(r"unix(-abstract)?:.+|.+:(\d{1,5})")


@dataclass(frozen=True, slots=True, order=True)
class Target:
    """One worker, as a source names it."""

    role: worker_pb2.Role.ValueType
    address: str
    """Where gRPC finds it: HOST:PORT or unix:/path."""


class WorkerSource(Protocol):
    """A list of workers that may change. Used on the event loop."""

    name: str
    """What people read, such as `file workers.yaml`."""
    wanted: frozenset[Target]
    """The latest list that could be used."""
    problem: str
    """Why there is no newer one; empty: all is well."""

    async def watch(self, changed: Callable[[], None]) -> None:
        """Follows the list until it is cancelled. Calls `changed` after `wanted` or `problem` has changed."""

    def look_again(self) -> None:
        """A worker was lost: the list may be old."""


class StaticSource:
    """A list that stays as it is: the settings `decode_workers` and `prefill_workers`."""

    name = "settings"
    problem = ""

    def __init__(self, targets: Iterable[Target]) -> None:
        self.wanted = frozenset(targets)

    async def watch(self, changed: Callable[[], None]) -> None:
        return

    def look_again(self) -> None:
        return


class _WorkersFile(msgspec.Struct, forbid_unknown_fields=True):
    decode: list[str]
    prefill: list[str] = []


class FileSource:
    """A YAML file with addresses by role, `decode` and `prefill`. Read again once it has changed and then stayed as it
    is for a look: half of a file can be a good one that lacks workers."""

    def __init__(self, path: Path) -> None:
        """Raises ConfigError for a file that cannot be used."""
        self.name = f"file {path}"
        self.problem = ""
        self._path = path
        self._read = _stamp(path)
        self.wanted = read_workers(path)

    async def watch(self, changed: Callable[[], None]) -> None:
        """Looks at the file until it is cancelled."""
        before = self._read
        while True:
            await asyncio.sleep(FILE_POLL_S)
            now = await asyncio.to_thread(_stamp, self._path)
            if now == before and now != self._read:
                self._read = now
                try:
                    self.wanted, self.problem = await asyncio.to_thread(read_workers, self._path), ""
                except ConfigError as error:
                    self.problem = str(error)
                changed()
            before = now

    def look_again(self) -> None:
        """The file says what it says whoever is lost."""


def _stamp(path: Path) -> tuple[int, ...]:
    """What tells a file from an earlier state of it; empty: there is none."""
    try:
        found = path.stat()
    except OSError:
        return ()
    return found.st_ino, found.st_mtime_ns, found.st_ctime_ns, found.st_size


def read_workers(path: Path) -> frozenset[Target]:
    """The workers that a file lists. Raises ConfigError that names file, line, field and remedy."""
    with contextlib.suppress(OSError):
        if path.stat().st_size > MAX_FILE_BYTES:
            raise ConfigError(f"--workers-file {path}: larger than {MAX_FILE_BYTES} bytes")
    file = read_document(path, "--workers-file")
    listed = file.read(_WorkersFile)
    targets: set[Target] = set()
    for name, role, addresses in (
        ("decode", worker_pb2.ROLE_DECODE, listed.decode),
        ("prefill", worker_pb2.ROLE_PREFILL, listed.prefill),
    ):
        for index, address in enumerate(addresses):
            if address.startswith(NAME_PREFIX) or not _is_address(address):
                raise file.error(f"{name}[{index}]", f"must be HOST:PORT or unix:/path, got {address[:100]!r}")
            targets.add(Target(role, address))
    if len(targets) > MAX_WORKERS:
        raise file.error("decode", f"must have {MAX_WORKERS} workers at most together with prefill, got {len(targets)}")
    return frozenset(targets)


Resolve = Callable[[str, int], Awaitable[Iterable[str]]]
"""Addresses HOST:PORT behind a name. Raises OSError where there are none."""


async def resolve(host: str, port: int) -> list[str]:
    """All addresses of `host`, IPv4 and IPv6, with the port, as gRPC takes them. Raises OSError."""
    found = await asyncio.get_running_loop().getaddrinfo(host, port, type=socket.SOCK_STREAM)
    addresses = [(family == socket.AF_INET6, str(address[0])) for family, _, _, _, address in found]
    return [f"[{address}]:{port}" if is_six else f"{address}:{port}" for is_six, address in addresses]


class NameSource:
    """All addresses of a DNS name. Looked up regularly, and when a worker is lost; a look-up that fails keeps those
    that are known."""

    def __init__(
        self,
        role: worker_pb2.Role.ValueType,
        host: str,
        port: int,
        find: Resolve = resolve,
        every_s: float = NAME_POLL_S,
    ) -> None:
        self.name = f"name {host}:{port}"
        self.wanted: frozenset[Target] = frozenset()
        self.problem = ""
        self._role = role
        self._host, self._port = host, port
        self._find = find
        self._every_s = every_s
        self._due = asyncio.Event()

    async def watch(self, changed: Callable[[], None]) -> None:
        """Looks the name up until it is cancelled."""
        while True:
            self._due.clear()
            before = self.wanted, self.problem
            await self._look()
            if before != (self.wanted, self.problem):
                changed()
            await asyncio.sleep(min(NAME_PAUSE_S, self._every_s))
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(self._every_s):
                    await self._due.wait()

    def look_again(self) -> None:
        self._due.set()

    async def _look(self) -> None:
        try:
            async with asyncio.timeout(NAME_TIMEOUT_S):
                found = frozenset(Target(self._role, address) for address in await self._find(self._host, self._port))
        except TimeoutError:
            self.problem = f"no answer within {NAME_TIMEOUT_S:g} s"
        except (OSError, UnicodeError) as error:  # a label that is too long is a UnicodeError
            self.problem = getattr(error, "strerror", None) or str(error)
        else:
            if 0 < len(found) <= MAX_WORKERS:
                self.wanted, self.problem = found, ""
            else:
                self.problem = f"{len(found)} addresses; 1 to {MAX_WORKERS} are used"


def open_sources(decode: Iterable[str], prefill: Iterable[str], workers_file: Path | None) -> list[WorkerSource]:
    """The sources of a router's settings: addresses and `dns:HOST:PORT` by role, and a file. Raises ConfigError."""
    listed: list[Target] = []
    sources: list[WorkerSource] = []
    for role, setting, addresses in (
        (worker_pb2.ROLE_DECODE, "decode_workers", decode),
        (worker_pb2.ROLE_PREFILL, "prefill_workers", prefill),
    ):
        for address in addresses:
            if not _is_address(address):
                raise ConfigError(f"{setting} {address[:100]!r}: must be HOST:PORT, unix:/path or dns:HOST:PORT")
            if address.startswith(NAME_PREFIX):
                host, _, port = address.removeprefix(NAME_PREFIX).lstrip("/").rpartition(":")
                if not host:
                    raise ConfigError(f"{setting} {address[:100]!r}: a name is missing; it must be dns:HOST:PORT")
                sources.append(NameSource(role, host.strip("[]"), int(port)))
            else:
                listed.append(Target(role, address))
    if workers_file is not None:
        sources.append(FileSource(workers_file))
    return [StaticSource(listed), *sources] if listed else sources


def _is_address(text: str) -> bool:
    match = _ADDRESS.fullmatch(text)
    return match is not None and (match[2] is None or 0 < int(match[2]) <= 65535)
