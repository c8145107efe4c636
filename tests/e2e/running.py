"""A process of the platform that a test starts, listens to and kills."""

from __future__ import annotations

import contextlib
import queue
import signal
import subprocess
import threading
import time
from collections.abc import Callable, Iterable, Mapping, Sequence

READY_S = 180.0
END_S = 180.0


class Running:
    """One process; `run` may be called again after it has ended."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.log: list[str] = []
        """Lines on stderr of all its lives."""
        self._process: subprocess.Popen[str] | None = None
        self._output: queue.Queue[str] = queue.Queue()

    @property
    def pid(self) -> int:
        assert self._process is not None
        return self._process.pid

    @property
    def running(self) -> bool:
        return self._process is not None and self._process.poll() is None

    def run(self, command: Sequence[str], variables: Mapping[str, str]) -> None:
        self._output = queue.Queue()
        self._process = subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=variables
        )
        assert self._process.stdout is not None
        assert self._process.stderr is not None
        for stream, take in ((self._process.stdout, self._output.put), (self._process.stderr, self.log.append)):
            threading.Thread(target=_pump, args=(stream, take), daemon=True).start()

    def wait_ready(self, word: str = "ready") -> None:
        """Until a line of its output has `word`."""
        end = time.monotonic() + READY_S
        while True:
            with contextlib.suppress(queue.Empty):
                if word in self._output.get(timeout=0.1):
                    return
            if not self.running or time.monotonic() > end:
                raise AssertionError(f"{self.name} did not become ready:\n" + "\n".join(self.log[-40:]))

    def kill(self, number: int = signal.SIGKILL) -> None:
        """Sends the signal and waits for the end."""
        if self._process is not None:
            if self._process.poll() is None:
                self._process.send_signal(number)
            try:
                self._process.wait(END_S)
            except subprocess.TimeoutExpired:
                self._process.kill()
                raise

    def logged(self, text: str, since: int = 0) -> bool:
        return any(text in line for line in self.log[since:])


def _pump(stream: Iterable[str], take: Callable[[str], object]) -> None:
    with contextlib.suppress(ValueError):  # closed
        for line in stream:
            take(line.rstrip("\n"))
