"""Asks another process to prepare a constraint and to say whether it can be used, and survives the answer.

A hostile grammar costs the process of `constraint_process.py`, which is started again, and never the router or its
event loop. Answers are kept, bad ones too, so that sending the same bomb again costs nothing.
"""

from __future__ import annotations

import contextlib
import os
import select
import signal
import subprocess
import sys
import threading
import time
from collections import OrderedDict
from dataclasses import dataclass, field
from typing import Literal

import msgspec

from tandem.common.errors import TandemError
from tandem.common.fair_work import FairWork
from tandem.router.structured.prepare import SchemaOptions
from tandem.router.tenants.caller import Caller

PROCESSES = 3
"""Checks at once: one that runs long does not hold up the others. They are started when they are needed."""
SHARE = 2
"""Those that one tenant may keep busy, so that another's check starts at once."""
MAX_WAITING = 32
"""Checks of one tenant; more are refused, so that nobody waits for long behind bombs of their own."""
MAX_KEPT = 128
"""Answers."""
PATIENCE_S = 30.0
"""Seconds to wait for an answer on a busy machine; what a check may cost is bounded in processor time."""
PROMPT_S = 0.15
"""A check that takes longer yields to all else that the machine does."""
YIELDING = 10
"""How much nicer than this its process is from then on: it cannot become quicker again."""
SLOW_S = 60.0
"""Whose check took longer asks such a process for so long."""
MAX_SLOW = 1024
"""Callers that are remembered for it."""
_TRIES = 2
_NESTED = frozenset({signal.SIGSEGV, signal.SIGBUS, signal.SIGABRT})


@dataclass(frozen=True, slots=True)
class Question:
    """A constraint to be prepared and checked: one JSON line to the process."""

    kind: Literal["json_schema", "regex", "lark"]
    text: str
    tokenizer: str = ""
    """Path of the model's tokenizer.json, with which output is tried. Empty: it is not."""
    options: SchemaOptions = field(default_factory=SchemaOptions)
    """What counts for a schema."""
    prefix: str = "s"
    """Beginning of the names of rules that a schema becomes; lower case."""


@dataclass(frozen=True, slots=True)
class Answer:
    """What the process found out about one question."""

    problem: str = ""
    """Empty: it can be used."""
    expression: str = ""
    """Right side of a schema's rule, in Lark: `%json` and the prepared schema, or one of `rules`."""
    rules: tuple[str, ...] = ()
    ignored: tuple[str, ...] = ()
    """Places in a schema that the output is not held to."""
    mask_s: float = 0.0
    """Processor time to find what may come next, on average."""


_DECODER = msgspec.json.Decoder(Answer)


class ConstraintCheck:
    """Checks for any number of event loops and threads."""

    def __init__(self) -> None:
        self._work = FairWork("constraint-check", PROCESSES, max_waiting=MAX_WAITING, share=SHARE)
        self._mine = threading.local()
        self._lock = threading.Lock()
        self._known: OrderedDict[Question, Answer] = OrderedDict()
        self._slow: OrderedDict[str, float] = OrderedDict()
        """Callers whose checks take long, and until when (s)."""

    async def answer(self, question: Question, caller: Caller) -> Answer:
        """The answer to `question`, in `caller`'s turn. Raises TandemError `overloaded`, `unavailable` where none can
        be had now."""
        if (known := self._remembered(question)) is not None:
            return known
        try:
            return await self._work.run(caller.line, caller.weight, self._found, question, caller.line)
        except OSError as error:
            raise TandemError("unavailable", f"constraints cannot be checked ({error})", retry_after_s=1.0) from error

    def _found(self, question: Question, caller: str) -> Answer:
        """Asks a process, on a thread of ours. Raises OSError."""
        if (known := self._remembered(question)) is not None:  # somebody asked the same before its turn came
            return known
        found = self._ask(question, caller)
        with self._lock:
            self._known[question] = found
            if len(self._known) > MAX_KEPT:
                self._known.popitem(last=False)
        return found

    def _remembered(self, question: Question) -> Answer | None:
        with self._lock:
            known = self._known.get(question)
            if known is not None:
                self._known.move_to_end(question)
            return known

    def _ask(self, question: Question, caller: str) -> Answer:
        """Raises OSError where no process can be started."""
        for _ in range(_TRIES):
            yields = time.monotonic() < self._slow.get(caller, 0.0)
            process = self._process(yields)
            line = _begun(process, msgspec.json.encode(question) + b"\n")
            if line and not _readable(process, PROMPT_S):
                self._note_slow(caller, process)
            line = line and _line(process)
            if line is None:
                process.kill()
                process.wait()
                return Answer(f"it cannot be checked within {PATIENCE_S:.0f} s; make it smaller")
            if line:
                return _DECODER.decode(line)
            status = -process.wait()
            if status == signal.SIGPROF:
                return Answer("it takes too long to compile, or to find what may come next; make it smaller")
            if status in _NESTED:
                return Answer("it is nested too deeply or needs too much memory; make it smaller")
        return Answer(f"it ended the process that checks it, {_TRIES} times (status {-status}); make it smaller")

    def _note_slow(self, caller: str, process: subprocess.Popen[bytes]) -> None:
        """What `process` does for `caller` takes long."""
        with self._lock:
            self._slow[caller] = time.monotonic() + SLOW_S
            self._slow.move_to_end(caller)
            if len(self._slow) > MAX_SLOW:
                self._slow.popitem(last=False)
        processes = self._processes
        if processes.get(False) is process:
            if (other := processes.get(True)) is not None:
                other.kill()
                other.wait()
            processes[True] = processes.pop(False)
            _yield(process)

    @property
    def _processes(self) -> dict[bool, subprocess.Popen[bytes]]:
        """Those of this thread, by whether they yield."""
        if not hasattr(self._mine, "processes"):
            self._mine.processes = {}
        found: dict[bool, subprocess.Popen[bytes]] = self._mine.processes
        return found

    def _process(self, yields: bool) -> subprocess.Popen[bytes]:
        process = self._processes.get(yields)
        if process is None or process.poll() is not None:
            process = self._processes[yields] = subprocess.Popen(
                [sys.executable, "-m", "tandem.router.asks.constraint_process"],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
            )
            if yields:
                _yield(process)
        return process


def _yield(process: subprocess.Popen[bytes]) -> None:
    nice = os.getpriority(os.PRIO_PROCESS, 0) + YIELDING
    with contextlib.suppress(OSError):
        for thread in os.listdir(f"/proc/{process.pid}/task"):
            os.setpriority(os.PRIO_PROCESS, int(thread), nice)


def _begun(process: subprocess.Popen[bytes], question: bytes) -> bytes | None:
    """The empty line that it says when it has all that it needs, and begins: see `_line`."""
    assert process.stdin is not None
    try:
        process.stdin.write(question)
        process.stdin.flush()
    except BrokenPipeError:
        return b""
    return _line(process, at_once=1)


def _line(process: subprocess.Popen[bytes], at_once: int = 65536) -> bytes | None:
    """One line, with which all ends that is there; empty where the other side has ended, None where nothing comes."""
    assert process.stdout is not None
    line = b""
    while not line.endswith(b"\n"):
        if not _readable(process, PATIENCE_S):
            return None
        part = os.read(process.stdout.fileno(), at_once)
        if not part:
            return b""
        line += part
    return line


def _readable(process: subprocess.Popen[bytes], timeout_s: float) -> bool:
    poll = select.poll()  # select.select() takes no descriptors above 1023
    poll.register(process.stdout, select.POLLIN)  # type: ignore[arg-type]
    return bool(poll.poll(timeout_s * 1000))


CHECK = ConstraintCheck()
"""One for all routers of this process."""
