"""Renders chats in processes of their own (`template_process.py`), for tenants in turn."""

from __future__ import annotations

import json
import os
import pickle
import select
import signal
import subprocess
import sys
import threading

from tandem.common.errors import TandemError
from tandem.router.text.literal_text import RenderedChat
from tandem.router.text.templates.process import CPU_S, MEMORY_BYTES, SIZE, Task
from tandem.router.text.templates.rendering import TemplateSource, not_rendered

PATIENCE_S = 30.0
"""Seconds to wait for an answer on a busy machine; what rendering may cost is bounded in processor time."""


class TemplateProcesses:
    """One process for each thread that asks. They are started when they are needed."""

    def __init__(self, source: TemplateSource, cpu_s: float = CPU_S) -> None:
        self._cpu_s = cpu_s
        self._source = pickle.dumps(source)
        self._mine = threading.local()
        self._all: list[subprocess.Popen[bytes]] = []

    def render(self, task: Task) -> RenderedChat:
        """Renders in a process. For any thread, which it blocks. Raises TandemError."""
        try:
            process = self._process()
            parts = _exchanged(process, pickle.dumps(task))
        except OSError as error:
            raise TandemError("unavailable", f"chats cannot be rendered ({error})", retry_after_s=1.0) from error
        if parts is None:
            raise not_rendered(self._reason(_ended(process)))
        head = json.loads(parts[0])
        if head:
            raise TandemError("invalid_request", head["problem"], param=head["param"])
        text, *renamed = (part.decode("utf-8", "surrogatepass") for part in parts[1:])
        return RenderedChat(text, renamed[0] if renamed else None)

    def close(self) -> None:
        for process in self._all:
            process.kill()
            process.wait()

    def _process(self) -> subprocess.Popen[bytes]:
        process: subprocess.Popen[bytes] | None = getattr(self._mine, "process", None)
        if process is None or process.poll() is not None:
            if process is not None:
                self._all.remove(process)
            process = self._mine.process = subprocess.Popen(
                [sys.executable, "-m", "tandem.router.text.templates.process", str(self._cpu_s)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
            )
            self._all.append(process)
            _send(process, self._source)
        return process

    def _reason(self, status: int) -> str:
        if status == -signal.SIGPROF:
            return f"it takes more than {self._cpu_s:g} s for them; make them shorter"
        if status == 1:
            return f"it takes more than {MEMORY_BYTES >> 20} MiB for them; make them shorter"
        return f"the process that renders them ended (status {status}); make them shorter"


def _exchanged(process: subprocess.Popen[bytes], question: bytes) -> list[bytes] | None:
    """The parts of the answer; None where there is none in time."""
    assert process.stdout is not None
    try:
        _send(process, question)
    except BrokenPipeError:
        return None
    parts: list[bytes] = []
    while (head := _read(process.stdout.fileno(), SIZE.size)) is not None:
        [size] = SIZE.unpack(head)
        if not size:
            return parts
        part = _read(process.stdout.fileno(), size)
        if part is None:
            return None
        parts.append(part)
    return None


def _send(process: subprocess.Popen[bytes], content: bytes) -> None:
    assert process.stdin is not None
    process.stdin.write(SIZE.pack(len(content)) + content)
    process.stdin.flush()


def _read(descriptor: int, size: int) -> bytes | None:
    """None where the other side has ended, or nothing comes."""
    poll = select.poll()  # select.select() takes no descriptors above 1023
    poll.register(descriptor, select.POLLIN)
    content = bytearray()
    while len(content) < size:
        if not poll.poll(PATIENCE_S * 1000):
            return None
        part = os.read(descriptor, min(size - len(content), 1 << 20))
        if not part:
            return None
        content += part
    return bytes(content)


def _ended(process: subprocess.Popen[bytes]) -> int:
    """Exit status of a process that does not answer any more."""
    try:
        return process.wait(timeout=1.0)
    except subprocess.TimeoutExpired:
        process.kill()
        return process.wait()
