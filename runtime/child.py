"""One child process of a supervisor: started, watched, its output passed on line by line, restarted after a crash and
when it answers no more."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import sys
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from tandem.common.caretaker import end_session
from tandem.runtime.parent import WHERE_SIGNAL
from tandem.runtime.probe import Probe

READY_PREFIXES = ("ready ", "tandem router ready: ")
"""A worker, and a router, print a line that starts so on stdout once they can be reached."""
ERROR_PREFIX = "error "
"""A child that cannot use its settings prints a line that starts so on stdout, and ends with status 2."""
CONFIG_ERROR_STATUS = 2
PROBE_EVERY_S = 2.0
PROBE_S = 5.0
"""Time for an answer."""
MAX_SILENT = 4
"""Probes without an answer, one after the other, until a child is taken to hang. Counted, not timed, as all processes
of a machine may have been stopped."""
MAX_FAILED_RESTARTS = 10
"""Starts in vain, one after the other, of a child that was ready before."""
_LINE_LIMIT = 1 << 20
_LOOK_S = 1.0
_WORDS_S = 2.0
"""Time for the last words of a process that has ended, should another one still hold its output."""


@dataclass(slots=True)
class BackOff:
    """How long to wait before the next start. Doubles with every early death, starts again after a healthy life."""

    first_s: float = 0.25
    longest_s: float = 15.0
    healthy_s: float = 20.0
    _next_s: float = 0.0

    def after(self, lived_s: float) -> float:
        """Seconds to wait after a process that lived `lived_s`."""
        if lived_s >= self.healthy_s or not self._next_s:
            self._next_s = self.first_s
        delay = self._next_s
        self._next_s = min(2 * delay, self.longest_s)
        return delay


class ChildFailed(Exception):
    """The child cannot be started: it refused its settings, or ended again and again without becoming ready."""

    def __init__(self, message: str, status: int = 1) -> None:
        """`status`: of the process that gives up because of it."""
        super().__init__(message)
        self.status = status


class Child:
    """`await run()` keeps the process alive until `stop`. One instance per child for the life of the supervisor."""

    def __init__(
        self,
        name: str,
        argv: Sequence[str],
        environment: Mapping[str, str],
        stdin: int,
        say: Callable[[str], None],
        *,
        probe: Probe | None = None,
        inherited: Sequence[int] = (),
        has_substitute: Callable[[], bool] = lambda: False,
        max_failed_starts: int = 3,
        back_off: BackOff | None = None,
    ) -> None:
        """`say` gets every line that is for the user's eyes. `stdin` is a file descriptor, see runtime/parent.py.

        probe: asked while it is ready. None: it is taken to be well as long as it lives.
        inherited: descriptors that it gets under the same numbers.
        has_substitute: whether another child does its work; then it is not given up once it was ready.
        """
        self.name = name
        self.ready = asyncio.Event()
        self._was_ready = False
        self._argv = argv
        self._environment = environment
        self._stdin = stdin
        self._say = say
        self._probe = probe
        self._inherited = inherited
        self._has_substitute = has_substitute
        self._max_failed_starts = max_failed_starts
        self._back_off = back_off or BackOff()
        self._process: asyncio.subprocess.Process | None = None
        self._stopping = asyncio.Event()
        self._refusal = ""
        self._recent: deque[str] = deque(maxlen=5)

    @property
    def pid(self) -> int | None:
        """None while it is not running."""
        process = self._process
        return process.pid if process is not None and process.returncode is None else None

    def mark_ready(self) -> None:
        self._was_ready = True
        self.ready.set()

    async def run(self) -> None:
        """Returns after `stop`, when the process has ended. Raises ChildFailed."""
        failed_starts = 0
        while not self._stopping.is_set():
            started = time.monotonic()
            status = await self._run_once()
            if self._stopping.is_set():
                return
            failed_starts = 0 if self.ready.is_set() else failed_starts + 1
            self.ready.clear()
            self._give_up_where_hopeless(status, failed_starts)
            delay = self._back_off.after(time.monotonic() - started)
            self._say(f"{self.name} {_describe(status)}; starting it again in {delay:g} s")
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(delay):
                    await self._stopping.wait()

    async def answers(self) -> bool:
        """Whether the child answers within `PROBE_S`."""
        if self._probe is None:
            return True
        try:
            async with asyncio.timeout(PROBE_S):
                return await self._probe()
        except (OSError, TimeoutError, ValueError):
            return False

    def _give_up_where_hopeless(self, status: int, failed_starts: int) -> None:
        """Raises ChildFailed."""
        if not failed_starts:
            return
        if self._was_ready:
            if failed_starts < MAX_FAILED_RESTARTS or self._has_substitute():
                return
        elif self._refusal:
            raise ChildFailed(self._refusal, CONFIG_ERROR_STATUS)
        elif status != CONFIG_ERROR_STATUS and failed_starts < self._max_failed_starts:
            return
        last_words = self._refusal or " | ".join(self._recent) or "it printed nothing"
        raise ChildFailed(f"{self.name} {_describe(status)} before it was ready: {last_words}")

    def retire(self) -> None:
        """Keeps it from being started again."""
        self._stopping.set()

    def stop(self) -> None:
        """Asks the process to drain and end, and keeps it from coming back."""
        self._stopping.set()
        self._send(signal.SIGTERM)

    def kill(self) -> None:
        self._stopping.set()
        self._send(signal.SIGKILL)

    def _send(self, number: signal.Signals) -> None:
        if self.pid is not None and self._process is not None:
            with contextlib.suppress(ProcessLookupError):
                self._process.send_signal(number)

    async def _run_once(self) -> int:
        process = self._process = await asyncio.create_subprocess_exec(
            *self._argv,
            env=dict(self._environment),
            stdin=self._stdin,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.PIPE,
            limit=_LINE_LIMIT,
            start_new_session=True,  # Ctrl-C in a terminal is for the supervisor alone
            pass_fds=self._inherited,
        )
        assert process.stdout is not None
        assert process.stderr is not None
        if self._stopping.is_set():
            self._send(signal.SIGTERM)
        words = [
            asyncio.create_task(self._pass_on(process.stdout, watch=True)),
            asyncio.create_task(self._pass_on(process.stderr, watch=False)),
        ]
        watch = asyncio.create_task(self._end_where_silent(process))
        try:
            status = await _ended(process)
            end_session(process.pid)  # what it started must not outlive it
            await asyncio.wait(words, timeout=_WORDS_S)
        finally:
            for task in (watch, *words):
                task.cancel()
            await asyncio.gather(watch, *words, return_exceptions=True)
        return status

    async def _end_where_silent(self, process: asyncio.subprocess.Process) -> None:
        """Kills a process that is ready and does not answer: its event loop hangs, or it was stopped."""
        await self.ready.wait()
        silent = 0
        while silent < MAX_SILENT:
            await asyncio.sleep(PROBE_EVERY_S)
            if self._stopping.is_set():
                return
            silent = 0 if await self.answers() else silent + 1
        if self._stopping.is_set():
            return
        self._say(f"{self.name} does not answer, {MAX_SILENT} probes of {PROBE_S:g} s each; killing it")
        with contextlib.suppress(ProcessLookupError):
            process.send_signal(WHERE_SIGNAL)
            await asyncio.sleep(0.5)
            process.kill()

    async def _pass_on(self, stream: asyncio.StreamReader, *, watch: bool) -> None:
        while True:
            try:
                line = await stream.readline()
            except ValueError:
                line = b"(a line too long to show)\n"
            if not line:
                return
            text = line.decode(errors="replace").rstrip()
            if watch and text.startswith(READY_PREFIXES):
                self.mark_ready()
                continue
            if watch and text.startswith(ERROR_PREFIX):
                self._refusal = text.removeprefix(ERROR_PREFIX)
                continue
            self._recent.append(text)
            tell(f"[{self.name}] {text}")


def tell(line: str) -> None:
    """Prints it on stderr. A terminal that was closed must not end what runs."""
    try:
        print(line, file=sys.stderr, flush=True)
    except (OSError, ValueError):
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, 2)
        os.close(nowhere)


async def _ended(process: asyncio.subprocess.Process) -> int:
    """Its status. `Process.wait` alone waits until nobody holds its output any more."""
    while process.returncode is None:
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(_LOOK_S):
                await process.wait()
    return process.returncode


def _describe(status: int) -> str:
    if status < 0:
        return f"was killed by {signal.Signals(-status).name}"
    return f"ended with status {status}"
