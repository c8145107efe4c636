"""Runs children on one machine until a signal, then drains them from the front to the back: all of `tandem serve`, or
the routers of `tandem router --routers N`.

Small on purpose: it imports neither torch nor the engine, so that nothing here competes with the workers.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import signal
import socket
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import yaml

from tandem.common import caretaker
from tandem.common.caretaker import RUN_FOLDER_VARIABLE
from tandem.common.ending import ending_signals
from tandem.common.scratch import scratch_folder
from tandem.common.settings import CONFIG_VARIABLE, plain, settings_of
from tandem.router.place import PLACE_VARIABLE, health_path
from tandem.runtime.child import PROBE_S, Child, ChildFailed, tell
from tandem.runtime.parent import SUPERVISOR_VARIABLE
from tandem.runtime.probe import Probe, grpc_probe, http_get, http_probe
from tandem.runtime.processes import ProcessSpec

READY_POLL_S = 0.05
READY_TIMEOUT_S = 2.0
HURRIED_STATUS = 130
"""Exit status after a second signal, as shells have it for Ctrl-C."""
STOP_MARGIN_S = 12.0
"""Time beyond the drain grace until a process that does not end is killed. A worker saves KV for up to 10 s."""
HUNG_MARGIN_S = 2.0
"""The same for a process that does not answer when it is asked to end: it finishes nothing."""
RESPAWN_S = 1.0


@dataclass(frozen=True, slots=True)
class Deployment:
    """What a supervisor runs."""

    processes: Callable[[Path], list[ProcessSpec]]
    """The children, given the run folder; in the order in which they are started, and ended from the end."""
    settings: type
    """Class of the settings that the user gave. Their variables are not for the children."""
    listening: socket.socket
    """Bound; the routers listen on it."""
    drain_grace_s: float
    secret: bytes
    """The secret of workers and store nodes, which are asked whether they are well."""
    ready_text: Callable[[float], str]
    """What the user is told, given the seconds since the start."""
    variables: Mapping[str, str] = field(default_factory=dict)
    """Variables of the children's environment."""


def supervise(deployment: Deployment) -> int:
    """The exit status: 0 after a signal, another one when a child could not be started."""
    return asyncio.run(Supervisor(deployment).run())


class Supervisor:
    """Starts the processes of a deployment, says when each is ready, and stops them in order: routers first. Runs on
    one event loop."""

    def __init__(self, deployment: Deployment) -> None:
        self._deployment = deployment
        self._children: dict[Child, str] = {}
        """The children with their commands."""
        self._signals = 0
        self._stop_asked = asyncio.Event()

    async def run(self) -> int:
        """Runs the children until a signal, or until one cannot be kept alive. Returns the exit status."""
        loop = asyncio.get_running_loop()
        for number in ending_signals():
            loop.add_signal_handler(number, self._signalled, number)
        stdin, keep_open = os.pipe()
        try:
            with scratch_folder() as run_folder:
                keeping = asyncio.create_task(_keep_caretaker(run_folder, stdin))
                try:
                    return await self._supervise(run_folder, stdin)
                finally:
                    keeping.cancel()
        finally:
            os.close(stdin)
            os.close(keep_open)

    async def _supervise(self, run_folder: Path, stdin: int) -> int:
        specs = self._deployment.processes(run_folder)
        self._children = {self._child(spec, specs, run_folder, stdin): spec.command for spec in specs}
        runs = {child: asyncio.create_task(child.run(), name=child.name) for child in self._children}
        announcer = asyncio.create_task(self._announce(run_folder))
        stop_asked = asyncio.create_task(self._stop_asked.wait())
        watched: set[asyncio.Task[object]] = {*runs.values(), stop_asked}
        status = 0
        try:
            await asyncio.wait(watched, return_when=asyncio.FIRST_COMPLETED)
            for run in runs.values():
                if run.done() and isinstance(error := run.exception(), ChildFailed):
                    _say(f"cannot {'go on' if announcer.done() else 'start'}: {error}")
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
            await asyncio.gather(*runs.values(), announcer, stop_asked, return_exceptions=True)
        return status

    def _child(self, spec: ProcessSpec, specs: Sequence[ProcessSpec], run_folder: Path, stdin: int) -> Child:
        path = run_folder / f"{spec.name}.yaml"
        path.write_text(yaml.safe_dump({name: plain(value) for name, value in spec.settings.items()}, sort_keys=False))
        argv = [sys.executable, "-m", "tandem.runtime.cli", spec.command, "--config", str(path)]
        environment = _environment(self._deployment, spec, run_folder)
        inherited: list[int] = []
        probe: Probe
        if spec.command == "router":
            listening = self._deployment.listening.fileno()
            count = sum(each.command == "router" for each in specs)
            environment[PLACE_VARIABLE] = f"{spec.place} {count} {listening}"
            inherited = [listening]
            probe = http_probe(health_path(run_folder, spec.name))
        else:
            probe = grpc_probe(str(spec.settings["listen"]), self._deployment.secret, PROBE_S)
        child = Child(
            spec.name,
            argv,
            environment,
            stdin,
            _say,
            probe=probe,
            inherited=inherited,
            has_substitute=lambda: self._has_substitute(child),
        )
        return child

    def _has_substitute(self, child: Child) -> bool:
        command = self._children[child]
        return any(
            each.ready.is_set() for each, role in self._children.items() if each is not child and role == command
        )

    def _of(self, *commands: str) -> list[Child]:
        return [child for child, command in self._children.items() if command in commands]

    async def _announce(self, run_folder: Path) -> None:
        """Tells of each child as it becomes ready, then of the whole."""
        started = time.monotonic()
        _say(f"starting {', '.join(child.name for child in self._children)}")

        async def announce(child: Child) -> None:
            """Says once that `child` is ready; a router is only when it sees all workers."""
            await child.ready.wait()
            if child in routers:
                while not await _sees_all(health_path(run_folder, child.name)):  # noqa: ASYNC110  # over HTTP
                    await asyncio.sleep(READY_POLL_S)
            if child not in routers or len(routers) > 1:
                _say(f"{child.name} is ready after {time.monotonic() - started:.1f} s")

        routers = self._of("router")
        await asyncio.gather(*map(announce, self._children))
        with contextlib.suppress(OSError):
            print(self._deployment.ready_text(time.monotonic() - started), flush=True)

    async def _stop_in_order(self, runs: Mapping[Child, asyncio.Task[None]], *, in_a_hurry: bool) -> None:
        """The routers first, so that nothing new comes in while they finish what they have; then the workers, which may
        still save KV; then the store node. All of them share one grace."""
        if not in_a_hurry:
            _say("stopping: waiting for running requests; once more to stop at once")
        for router in self._of("router"):
            router.retire()
        self._deployment.listening.close()  # once the routers let go of it, too, new connections are refused
        until = time.monotonic() + (0.0 if in_a_hurry else self._deployment.drain_grace_s)
        for stage in (self._of("router"), self._of("prefill", "decode"), self._of("kvstore")):
            await asyncio.gather(*(_end(child, runs[child], until) for child in stage))

    def _signalled(self, number: int) -> None:
        if number == signal.SIGHUP and self._signals:
            return  # a terminal that goes away says so more than once
        self._signals += 1
        self._stop_asked.set()
        if self._signals > 1:
            for child in self._children:
                child.kill()


async def _end(child: Child, run: asyncio.Task[None], until: float) -> None:
    """Until `until` and the margin the child may finish what it has; one that hangs has nothing to finish."""
    hangs = child.ready.is_set() and not await child.answers()
    child.stop()
    patience_s = HUNG_MARGIN_S if hangs else max(0.0, until - time.monotonic()) + STOP_MARGIN_S
    if not (await asyncio.wait([run], timeout=patience_s))[0]:
        if child.pid is not None:
            _say(f"{child.name} does not {'answer' if hangs else 'end'}; killing it")
        child.kill()
        await asyncio.wait([run])


async def _keep_caretaker(run_folder: Path, stdin: int) -> None:
    """Starts the process that tidies up after this one, and again should it die before."""
    while True:
        started = await asyncio.create_subprocess_exec(
            *(sys.executable, "-I", "-S", caretaker.__file__, str(run_folder)),
            stdin=stdin,
            stdout=asyncio.subprocess.DEVNULL,
            stderr=asyncio.subprocess.DEVNULL,
            start_new_session=True,
        )
        await started.wait()
        await asyncio.sleep(RESPAWN_S)


def _say(text: str) -> None:
    tell(f"[tandem] {text}")


def _environment(deployment: Deployment, spec: ProcessSpec, run_folder: Path) -> dict[str, str]:
    """Environment of a child. What this process has read itself is left out, as variables go before the child's file;
    two malloc arenas keep memory from being scattered."""
    read = {setting.variable for setting in settings_of(deployment.settings).values()}
    read |= {f"TANDEM_{name.upper()}" for name in spec.settings} | {CONFIG_VARIABLE}
    environment = {name: value for name, value in os.environ.items() if name not in read}
    return environment | {
        **deployment.variables,
        RUN_FOLDER_VARIABLE: str(run_folder),
        SUPERVISOR_VARIABLE: str(os.getpid()),
        "MALLOC_ARENA_MAX": environment.get("MALLOC_ARENA_MAX", "2"),
    }


async def _sees_all(path: Path) -> bool:
    """Whether a router is ready and sees every worker, prefill workers too: they are what the user asked for."""
    try:
        async with asyncio.timeout(READY_TIMEOUT_S):
            status, body = await http_get(path, "/readyz")
        return status == 200 and all(worker["connected"] for worker in json.loads(body)["workers"])
    except (OSError, TimeoutError, ValueError):
        return False
