"""One child process of `tandem serve`: started, watched, its output passed on line by line, restarted after a crash."""

from __future__ import annotations

import asyncio
import contextlib
import signal
import sys
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

READY_PREFIXES = ("ready ", "tandem router ready: ")
"""A worker, and a router, print a line that starts so on stdout once they can be reached."""
ERROR_PREFIX = "error "
"""A child that cannot use its settings prints a line that starts so on stdout, and ends with status 2."""
CONFIG_ERROR_STATUS = 2
_LINE_LIMIT = 1 << 20


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
    """The child cannot be started: it refused its settings, or ended again and again without ever becoming ready."""

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
        max_failed_starts: int = 3,
        back_off: BackOff | None = None,
    ) -> None:
        """`say` gets every line that is for the user's eyes. `stdin` is a file descriptor, see runtime/parent.py."""
        self.name = name
        self.ready = asyncio.Event()
        self._was_ready = False
        self._argv = argv
        self._environment = environment
        self._stdin = stdin
        self._say = say
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
            if not self._was_ready:
                failed_starts += 1
                if self._refusal:
                    raise ChildFailed(self._refusal, CONFIG_ERROR_STATUS)
                if status == CONFIG_ERROR_STATUS or failed_starts >= self._max_failed_starts:
                    last_words = " | ".join(self._recent) or "it printed nothing"
                    raise ChildFailed(f"{self.name} {_describe(status)} before it was ready: {last_words}")
            delay = self._back_off.after(time.monotonic() - started)
            self._say(f"{self.name} {_describe(status)}; starting it again in {delay:g} s")
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(delay):
                    await self._stopping.wait()

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
        )
        assert process.stdout is not None
        assert process.stderr is not None
        if self._stopping.is_set():
            self._send(signal.SIGTERM)
        await asyncio.gather(self._pass_on(process.stdout, watch=True), self._pass_on(process.stderr, watch=False))
        status = await process.wait()
        self.ready.clear()
        return status

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
            print(f"[{self.name}] {text}", file=sys.stderr, flush=True)


def _describe(status: int) -> str:
    if status < 0:
        return f"was killed by {signal.Signals(-status).name}"
    return f"ended with status {status}"
