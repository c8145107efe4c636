"""`--routers N`: N router processes that share one port. The parent only starts, restarts and stops them.

The kernel spreads connections over the replicas (SO_REUSEPORT). The parent imports nothing that starts threads, so that
it may fork; children notice its death by the end of a pipe.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import shutil
import signal
import socket
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

from tandem.common.errors import ConfigError
from tandem.router.settings import RouterConfig

RESTART_FIRST_S = 0.25
RESTART_LONGEST_S = 10.0
HEALTHY_S = 20.0
CONFIG_ERROR_STATUS = 2


@dataclass(frozen=True, slots=True)
class Replica:
    """What a router process knows of its place among others."""

    index: int = 0
    count: int = 1
    folder: Path | None = None
    """For the replicas' sockets. None where there is one replica."""
    parent_pipe: int = -1
    """Reaches its end when the parent dies; -1: there is none."""


ALONE = Replica()


def process_name(replica: Replica) -> str:
    """In logs and metrics."""
    return "router" if replica.count == 1 else f"router-{replica.index}"


def listen(host: str, port: int, *, shared: bool = False) -> socket.socket:
    """A bound TCP socket; `shared`: others of this user may bind the same port. Raises ConfigError."""
    sock = socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET, socket.SOCK_STREAM)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    if shared:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
    try:
        sock.bind((host, port))
    except OSError as error:
        sock.close()
        raise ConfigError(f"--port {port}: cannot listen on {host}:{port} ({error.strerror})") from error
    sock.set_inheritable(True)
    return sock


def run_replicas(config: RouterConfig, serve: Callable[[RouterConfig, Replica], None]) -> None:
    """Runs `serve` in `config.routers` processes until SIGTERM or SIGINT; a second signal ends at once.

    Raises ConfigError where the port cannot be had, SystemExit with the status of a replica that refuses its settings.
    """
    listen(config.host, config.port).close()  # refused where a stranger has it, even one that would share
    reserved = listen(config.host, config.port, shared=True)
    config = replace(config, port=reserved.getsockname()[1])
    folder = Path(tempfile.mkdtemp(prefix="tandem-router-"))
    try:
        _Parent(config, serve, folder).run()
    finally:
        reserved.close()
        shutil.rmtree(folder, ignore_errors=True)


class _Parent:
    def __init__(self, config: RouterConfig, serve: Callable[[RouterConfig, Replica], None], folder: Path) -> None:
        self._config = config
        self._serve = serve
        self._folder = folder
        self._read_end, self._write_end = os.pipe()
        self._children: dict[int, tuple[int, float]] = {}
        """Process id -> index, when it was started."""
        self._due: dict[int, float] = {}
        """Index -> when it starts again."""
        self._pause = [RESTART_FIRST_S] * config.routers
        self._stopping = False
        self._status = 0

    def run(self) -> None:
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self._on_signal)
        for index in range(self._config.routers):
            self._start(index)
        while self._children or (self._due and not self._stopping):
            self._reap()
            now = time.monotonic()
            for index in [index for index, at in self._due.items() if at <= now]:
                del self._due[index]
                if not self._stopping:
                    self._start(index)
            time.sleep(0.05)
        if self._status:
            raise SystemExit(self._status)

    def _start(self, index: int) -> None:
        sys.stdout.flush()
        sys.stderr.flush()
        pid = os.fork()
        if pid:
            self._children[pid] = (index, time.monotonic())
            return
        status = 1
        try:
            for number in (signal.SIGTERM, signal.SIGINT):
                signal.signal(number, signal.SIG_DFL)
            os.close(self._write_end)
            replica = Replica(index, self._config.routers, self._folder, self._read_end)
            self._serve(self._config, replica)
            status = 0
        except ConfigError as error:
            print(f"tandem router: {error}", file=sys.stderr)
            status = CONFIG_ERROR_STATUS
        except BaseException:
            sys.excepthook(*sys.exc_info())
        finally:
            with contextlib.suppress(OSError, ValueError):
                sys.stdout.flush()
                sys.stderr.flush()
            os._exit(status)  # never back into the parent's code

    def _reap(self) -> None:
        while self._children:
            pid, waited = os.waitpid(-1, os.WNOHANG)
            if pid == 0:
                return
            index, started = self._children.pop(pid)
            status = os.waitstatus_to_exitcode(waited)
            if self._stopping:
                self._status = self._status or max(status, 0)
            elif status == CONFIG_ERROR_STATUS:
                self._status = status
                self._stop()
            else:
                if time.monotonic() - started >= HEALTHY_S:
                    self._pause[index] = RESTART_FIRST_S
                print(
                    f"router replica {index} ended ({status}); it starts again in {self._pause[index]:g} s",
                    file=sys.stderr,
                    flush=True,
                )
                self._due[index] = time.monotonic() + self._pause[index]
                self._pause[index] = min(2 * self._pause[index], RESTART_LONGEST_S)

    def _on_signal(self, number: int, _: object) -> None:
        if self._stopping:
            for pid in self._children:
                os.kill(pid, signal.SIGKILL)
            os._exit(1)
        self._stop()

    def _stop(self) -> None:
        self._stopping = True
        for pid in self._children:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGTERM)


def on_parent_death(replica: Replica, stop: Callable[[], None]) -> None:
    """Calls `stop` once the parent is gone. Call it on the event loop."""
    if replica.parent_pipe >= 0:
        loop = asyncio.get_running_loop()

        def gone() -> None:
            loop.remove_reader(replica.parent_pipe)
            stop()

        loop.add_reader(replica.parent_pipe, gone)
