"""Asks another process whether a constraint can be used, and survives the answer.

A hostile grammar costs the process of `constraint_process.py`, which is started again, and never the router or its
event loop. Answers are kept, bad ones too, so that sending the same bomb again costs nothing.
"""

from __future__ import annotations

import asyncio
import json
import os
import select
import signal
import subprocess
import sys
import threading
from collections import OrderedDict
from concurrent.futures import ThreadPoolExecutor

from tandem.common.errors import TandemError
from tandem.common.sampling import Constraint

PROCESSES = 2
"""Checks at once: one that runs long does not hold up the others. They are started when they are needed."""
MAX_WAITING = 64
"""More are refused, so that nobody waits for long behind somebody's bombs."""
MAX_KEPT = 128
"""Answers."""
PATIENCE_S = 30.0
"""For an answer on a busy machine; what a check may cost is bounded in processor time."""


class ConstraintCheck:
    """Checks for any number of event loops and threads."""

    def __init__(self) -> None:
        self._threads = ThreadPoolExecutor(PROCESSES, "constraint-check")
        self._mine = threading.local()
        self._known: OrderedDict[Constraint, str] = OrderedDict()
        self._waiting = 0

    async def problem(self, constraint: Constraint) -> str:
        """Empty if it can be used. Raises TandemError `overloaded`, `unavailable` where that cannot be said now."""
        known = self._known.get(constraint)
        if known is not None:
            self._known.move_to_end(constraint)
            return known
        if self._waiting >= MAX_WAITING:
            raise TandemError("overloaded", "too many schemas and grammars wait to be checked", retry_after_s=1.0)
        self._waiting += 1
        try:
            found = await asyncio.get_running_loop().run_in_executor(self._threads, self._ask, constraint)
        except OSError as error:
            raise TandemError("unavailable", f"constraints cannot be checked ({error})", retry_after_s=1.0) from error
        finally:
            self._waiting -= 1
        self._known[constraint] = found
        if len(self._known) > MAX_KEPT:
            self._known.popitem(last=False)
        return found

    def _ask(self, constraint: Constraint) -> str:
        """On a thread of ours, each of which has a process. Raises OSError where none can be had."""
        process: subprocess.Popen[bytes] | None = getattr(self._mine, "process", None)
        if process is None or process.poll() is not None:
            process = self._mine.process = subprocess.Popen(
                [sys.executable, "-m", "tandem.router.constraint_process"],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
            )
        assert process.stdin is not None
        assert process.stdout is not None
        try:
            process.stdin.write(json.dumps([constraint.kind, constraint.text]).encode() + b"\n")
            process.stdin.flush()
            line = _line(process.stdout.fileno())
        except BrokenPipeError:
            line = b""
        if line is None:
            process.kill()
            process.wait()
            raise TimeoutError(f"no answer within {PATIENCE_S:.0f} s")
        if line:
            found: str = json.loads(line)
            return found
        status = process.wait()
        if status >= 0:
            raise OSError(f"their process ended with status {status}")
        if status == -signal.SIGPROF:
            return "it takes too long to compile; make it smaller"
        return "it is nested too deeply or needs too much memory; make it smaller"


def _line(descriptor: int) -> bytes | None:
    """One line; empty where the other side has ended, None where nothing comes."""
    line = b""
    poll = select.poll()  # select.select() takes no descriptors above 1023
    poll.register(descriptor, select.POLLIN)
    while not line.endswith(b"\n"):
        if not poll.poll(PATIENCE_S * 1000):
            return None
        part = os.read(descriptor, 65536)
        if not part:
            return b""
        line += part
    return line


CHECK = ConstraintCheck()
"""One for all routers of this process."""
