"""Runs router and workers as child processes on one machine, until a signal; then drains from the front to the back.

Small on purpose: it imports neither torch nor the engine, so that nothing here competes with the workers.
"""

from __future__ import annotations

import asyncio
import json
import os
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path

import yaml

from tandem.common.secret import write_secret
from tandem.common.settings import CONFIG_VARIABLE, plain, settings_of
from tandem.runtime.child import Child, ChildFailed
from tandem.runtime.parent import RUN_DIRECTORY_VARIABLE
from tandem.runtime.plan import ChildPlan, plan_children, ready_text, served_name
from tandem.runtime.running import RUN_PREFIX, announce, run_folders
from tandem.runtime.secret import FILE
from tandem.runtime.settings import ServeConfig

READY_POLL_S = 0.05
READY_TIMEOUT_S = 2.0
HURRIED_STATUS = 130
"""Exit status after a second signal, as shells have it for Ctrl-C."""
STOP_MARGIN_S = 5.0
"""Beyond the drain grace, until a process that does not end is killed."""
_LONGEST_DIRECTORY = 70
"""A unix socket's path may have 107 bytes."""


class Supervisor:
    def __init__(self, config: ServeConfig, port: int, secret: bytes) -> None:
        self._config = config
        self._secret = secret
        self._port = port
        self._url = f"http://{_reachable(config.host)}:{port}"
        self._children: list[Child] = []
        self._signals = 0
        self._stop_asked = asyncio.Event()

    async def run(self) -> int:
        """Returns the exit status: 0 after a signal, 1 when a child could not be started."""
        loop = asyncio.get_running_loop()
        for number in (signal.SIGINT, signal.SIGTERM):
            loop.add_signal_handler(number, self._signalled)
        run_directory = _private_directory()
        stdin, keep_open = os.pipe()
        try:
            return await self._supervise(run_directory, stdin)
        finally:
            os.close(stdin)
            os.close(keep_open)
            shutil.rmtree(run_directory, ignore_errors=True)

    async def _supervise(self, run_directory: Path, stdin: int) -> int:
        secret_file = run_directory / FILE
        write_secret(secret_file, self._secret)
        self._config = replace(self._config, secret_file=str(secret_file))
        plans = plan_children(self._config, run_directory, self._port)
        node = next((str(plan.settings["listen"]) for plan in plans if plan.command == "kvstore"), "")
        announce(run_directory, self._url, served_name(self._config), node, str(secret_file))
        self._children = [self._child(plan, run_directory, stdin) for plan in plans]
        runs = [asyncio.create_task(child.run(), name=child.name) for child in self._children]
        announcer = asyncio.create_task(self._announce())
        stop_asked = asyncio.create_task(self._stop_asked.wait())
        watched: set[asyncio.Task[object]] = {*runs, stop_asked}
        status = 0
        try:
            await asyncio.wait(watched, return_when=asyncio.FIRST_COMPLETED)
            for run in runs:
                if run.done() and isinstance(error := run.exception(), ChildFailed):
                    _say(f"cannot start: {error}")
                    status = error.status
                    break
                elif run.done() and (error := run.exception()) is not None:
                    raise error
            await self._stop_in_order(runs, in_a_hurry=status != 0)
            if self._signals > 1:
                _say("stopped at once; requests that were running are lost")
                status = HURRIED_STATUS
            elif status == 0:
                _say("stopped")
        finally:
            announcer.cancel()
            stop_asked.cancel()
            for child in self._children:
                child.kill()
            await asyncio.gather(*runs, announcer, stop_asked, return_exceptions=True)
        return status

    def _child(self, plan: ChildPlan, run_directory: Path, stdin: int) -> Child:
        path = run_directory / f"{plan.name}.yaml"
        path.write_text(yaml.safe_dump({name: plain(value) for name, value in plan.settings.items()}, sort_keys=False))
        argv = [sys.executable, "-m", "tandem.runtime.cli", plan.command, "--config", str(path)]
        return Child(plan.name, argv, _environment(self._config, plan, run_directory), stdin, _say)

    async def _announce(self) -> None:
        """Tells of each child as it becomes ready, then of the whole."""
        started = time.monotonic()
        router = self._children[-1]
        _say(f"starting {', '.join(child.name for child in self._children)}")

        async def announce(child: Child) -> None:
            await child.ready.wait()
            _say(f"{child.name} is ready after {time.monotonic() - started:.1f} s")

        waits = [asyncio.create_task(announce(child)) for child in self._children[:-1]]
        await asyncio.gather(*waits, self._router_ready(router))
        print(ready_text(self._config, self._url, time.monotonic() - started), flush=True)

    async def _router_ready(self, router: Child) -> None:
        await router.ready.wait()
        while not await _all_connected(_reachable(self._config.host), self._port):  # noqa: ASYNC110  # over HTTP
            await asyncio.sleep(READY_POLL_S)

    async def _stop_in_order(self, runs: Sequence[asyncio.Task[None]], *, in_a_hurry: bool) -> None:
        """The router first, so that nothing new comes in while it finishes what it has; then the workers, which may
        still save KV; then the store node."""
        patience = STOP_MARGIN_S + (0.0 if in_a_hurry else self._config.drain_grace_s)
        if not in_a_hurry:
            _say("stopping: waiting for running requests; once more to stop at once")
        router = self._children[-1]
        router.stop()
        await self._wait_or_kill([router], runs[-1:], patience)
        num_stores = sum(child.name == "kvstore" for child in self._children)
        for stage in (slice(num_stores, -1), slice(0, num_stores)):
            for child in self._children[stage]:
                child.stop()
            await self._wait_or_kill(self._children[stage], runs[stage], patience)

    async def _wait_or_kill(
        self, children: Iterable[Child], runs: Sequence[asyncio.Task[None]], patience_s: float
    ) -> None:
        if not runs:
            return
        _, late = await asyncio.wait(runs, timeout=patience_s)
        if late:
            for child in children:
                if child.pid is not None:
                    _say(f"{child.name} does not end; killing it")
                child.kill()
            await asyncio.wait(late)

    def _signalled(self) -> None:
        self._signals += 1
        self._stop_asked.set()
        if self._signals > 1:
            for child in self._children:
                child.kill()


def _say(text: str) -> None:
    print(f"[tandem] {text}", file=sys.stderr, flush=True)


def _environment(config: ServeConfig, plan: ChildPlan, run_directory: Path) -> dict[str, str]:
    """Environment of a child. What this process has read itself is left out, as variables go before the child's file;
    two malloc arenas keep memory from being scattered."""
    read = {setting.variable for setting in settings_of(ServeConfig).values()}
    read |= {f"TANDEM_{name.upper()}" for name in plan.settings} | {CONFIG_VARIABLE}
    environment = {name: value for name, value in os.environ.items() if name not in read}
    environment |= {
        RUN_DIRECTORY_VARIABLE: str(run_directory),
        "OMP_NUM_THREADS": str(config.num_threads),
        "MALLOC_ARENA_MAX": environment.get("MALLOC_ARENA_MAX", "2"),
    }
    return environment


def _private_directory() -> Path:
    """Mode 0700, with a path short enough for unix sockets."""
    folder = next((each for each in run_folders() if len(str(each)) <= _LONGEST_DIRECTORY), None)
    return Path(tempfile.mkdtemp(prefix=RUN_PREFIX, dir=folder))


def _reachable(host: str) -> str:
    """An address of this machine for a server that listens on `host`."""
    return {"0.0.0.0": "127.0.0.1", "": "127.0.0.1", "::": "[::1]"}.get(host, host)


async def _all_connected(host: str, port: int) -> bool:
    """Whether the router is ready and sees every worker, prefill workers too: they are what the user asked for."""
    try:
        async with asyncio.timeout(READY_TIMEOUT_S):
            reader, writer = await asyncio.open_connection(host.strip("[]"), port)
            try:
                writer.write(f"GET /readyz HTTP/1.1\r\nHost: {host}\r\nConnection: close\r\n\r\n".encode())
                head, _, body = (await reader.read()).partition(b"\r\n\r\n")
            finally:
                writer.close()
        return head.split()[1:2] == [b"200"] and all(worker["connected"] for worker in json.loads(body)["workers"])
    except (OSError, TimeoutError, ValueError):
        return False
