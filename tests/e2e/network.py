"""Hosts of their own on one machine: namespaces of the kernel, each with a network card, a name and a boot id.

A cut is silent: packets go to a card that nobody has, as when a switch or a cable is lost, and nothing is refused.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import shutil
import subprocess
import tempfile
import uuid
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import TracebackType

_SWITCH = "switch"
_TOOLS = ("unshare", "nsenter", "ip", "tc")
_NOBODY = "02:00:00:00:00:01"
"""A card's address that no card has."""
_CLONE_NEWNET = 0x40000000
_BURST_BYTES = 32 << 10
_COMMAND_S = 30.0
_HOLDER = """
set -e
ip link set lo up
hostname "$1"
mount --bind "$2/boot_id" /proc/sys/kernel/random/boot_id
mount --bind "$2/hosts" /etc/hosts
echo made
exec cat
"""
"""Keeps the namespaces of one host until its input ends, with whoever made it."""


class NoNamespaces(Exception):
    """This machine or user cannot have hosts of its own; the message says why."""


class Network:
    """`with Network(("a", "b")) as network`: hosts that reach each other over IPv4 and IPv6."""

    def __init__(self, hosts: Sequence[str], family: int = 4) -> None:
        """`family`: 4 or 6, of the addresses that names stand for. Raises NoNamespaces."""
        if missing := [tool for tool in _TOOLS if shutil.which(tool) is None]:
            raise NoNamespaces(f"there is no {missing[0]} on this machine")
        self._family = family
        self._folder = Path(tempfile.mkdtemp(prefix="tandem-net-"))
        self._holders: dict[str, subprocess.Popen[str]] = {}
        self._numbers: dict[str, int] = {}
        self._names: dict[str, list[str]] = {host: [host] for host in hosts}
        """Under which each is found."""
        self._cuts: set[tuple[str, str]] = set()
        self._library = ctypes.CDLL(None, use_errno=True)
        try:
            self._make(_SWITCH)
            self.run(_SWITCH, "ip", "link", "add", "bridge", "type", "bridge")
            self.run(_SWITCH, "ip", "link", "set", "bridge", "up")
            for host in hosts:
                self._make(host)
                self._plug_in(host)
                self.move(host)
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> Network:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.close()

    def close(self) -> None:
        """Gives the namespaces up; they last until the last process inside has ended."""
        for holder in self._holders.values():
            holder.communicate()
        self._holders.clear()
        shutil.rmtree(self._folder, ignore_errors=True)

    @property
    def hosts(self) -> list[str]:
        return list(self._names)

    # On a host

    def command(self, host: str, *command: str) -> list[str]:
        """What runs `command` on `host`. Paths must be absolute: the working directory is another one there."""
        return ["nsenter", "--target", str(self._holders[host].pid), "--net", "--mount", "--uts", *command]

    def run(self, host: str, *command: str) -> str:
        """What `command` prints. Raises NoNamespaces where it fails."""
        done = subprocess.run(
            self.command(host, *command), capture_output=True, text=True, timeout=_COMMAND_S, check=False
        )
        if done.returncode:
            raise NoNamespaces(f"{' '.join(command)}: {done.stderr.strip()}")
        return done.stdout

    @contextlib.contextmanager
    def inside(self, host: str) -> Iterator[None]:
        """Sockets that this thread opens within are those of `host`."""
        with open("/proc/thread-self/ns/net") as home, open(f"/proc/{self._holders[host].pid}/ns/net") as there:
            self._enter(there.fileno())
            try:
                yield
            finally:
                self._enter(home.fileno())

    def _enter(self, descriptor: int) -> None:
        if self._library.setns(descriptor, _CLONE_NEWNET):
            number = ctypes.get_errno()
            raise OSError(number, os.strerror(number))

    # Addresses

    def address(self, host: str) -> str:
        """IPv4."""
        return f"10.77.0.{self._numbers[host]}"

    def address6(self, host: str) -> str:
        return f"fd77::{self._numbers[host]:x}"

    def move(self, host: str) -> None:
        """Gives `host` addresses that nobody had before, and takes those it had. Its names follow."""
        if host in self._numbers:
            for other in [other for other in self.hosts if self._key(host, other) in self._cuts]:
                self.heal(host, other)
            self.run(host, "ip", "address", "flush", "dev", "eth0")
        self._numbers[host] = max(self._numbers.values(), default=0) + 1
        self.run(host, "ip", "address", "add", f"{self.address(host)}/24", "dev", "eth0")
        self.run(host, "ip", "address", "add", f"{self.address6(host)}/64", "dev", "eth0", "nodad")
        self._write_names()

    def point(self, name: str, *hosts: str) -> None:
        """From now on `name` stands for these hosts, and for no others."""
        for host, names in self._names.items():
            names[:] = [each for each in names if each != name] + [name] * (host in hosts)
        self._write_names()

    def _write_names(self) -> None:
        """In place: every host has this very file."""
        lines = ["127.0.0.1 localhost", "::1 localhost"]
        for host, names in self._names.items():
            if host in self._numbers:
                address = self.address(host) if self._family == 4 else self.address6(host)
                lines.append(f"{address} {' '.join(names)}")
        (self._folder / "hosts").write_text("\n".join(lines) + "\n")

    # What goes wrong on the way

    def cut(self, host: str, *others: str) -> None:
        """Nothing passes any more between `host` and these (none named: anybody), either way, and nobody is told."""
        for other in others or [each for each in self.hosts if each != host]:
            self._cuts.add(self._key(host, other))
            for here, there in ((host, other), (other, host)):
                for address in (self.address(there), self.address6(there)):
                    self.run(
                        here, "ip", "neigh", "replace", address, "lladdr", _NOBODY, "nud", "permanent", "dev", "eth0"
                    )

    def heal(self, host: str, *others: str) -> None:
        """Takes back `cut`."""
        for other in others or [each for each in self.hosts if each != host]:
            if self._key(host, other) not in self._cuts:
                continue
            self._cuts.discard(self._key(host, other))
            for here, there in ((host, other), (other, host)):
                for address in (self.address(there), self.address6(there)):
                    self.run(here, "ip", "neigh", "del", address, "dev", "eth0")

    def limit(self, host: str, mbit: float | None, queue_ms: float = 100.0) -> None:
        """Bounds what `host` sends, and what it is sent, to `mbit` a second each; packets beyond `queue_ms` are lost.
        None: as fast as the machine."""
        for place, device in ((host, "eth0"), (_SWITCH, self._port(host))):
            if mbit is None:
                with contextlib.suppress(NoNamespaces):  # there was no limit
                    self.run(place, "tc", "qdisc", "del", "dev", device, "root")
                continue
            burst = max(_BURST_BYTES, round(mbit * 1e6 / 8 / 100))  # 10 ms
            shape = ("rate", f"{mbit:g}mbit", "burst", str(burst), "latency", f"{queue_ms:g}ms")
            self.run(place, "tc", "qdisc", "replace", "dev", device, "root", "tbf", *shape)

    # Making

    def _make(self, host: str) -> None:
        folder = self._folder / host
        folder.mkdir()
        (folder / "boot_id").write_text(f"{uuid.uuid4()}\n")
        shared = self._folder / "hosts"
        shared.touch()
        (folder / "hosts").hardlink_to(shared)
        holder = subprocess.Popen(
            ["unshare", "--net", "--mount", "--uts", "sh", "-c", _HOLDER, "sh", host, str(folder)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        self._holders[host] = holder
        assert holder.stdout is not None
        if holder.stdout.readline() != "made\n":
            _, error = holder.communicate()
            raise NoNamespaces(error.strip() or "namespaces are refused")

    def _plug_in(self, host: str) -> None:
        """Takes a cable from the switch to the host."""
        card = ("peer", "name", "eth0", "netns", str(self._holders[host].pid))
        self.run(_SWITCH, "ip", "link", "add", self._port(host), "type", "veth", *card)
        self.run(_SWITCH, "ip", "link", "set", self._port(host), "master", "bridge", "up")
        self.run(host, "ip", "link", "set", "eth0", "up")

    def _port(self, host: str) -> str:
        return f"to-{host}"[:15]

    @staticmethod
    def _key(host: str, other: str) -> tuple[str, str]:
        return min(host, other), max(host, other)
