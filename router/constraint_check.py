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
from collections import OrderedDict
from dataclasses import dataclass, field
from typing import Literal

import msgspec

from tandem.common.errors import TandemError
from tandem.common.fair_work import FairWork
from tandem.router.caller import Caller
from tandem.router.structured.prepare import SchemaOptions

PROCESSES = 3
"""Checks at once: one that runs long does not hold up the others. They are started when they are needed."""
SHARE = 2
"""Those that one tenant may keep busy, so that another's check starts at once."""
MAX_WAITING = 32
"""Checks of one tenant; more are refused, so that nobody waits for long behind bombs of their own."""
MAX_KEPT = 128
"""Answers."""
PATIENCE_S = 30.0
"""For an answer on a busy machine; what a check may cost is bounded in processor time."""
PROMPT_S = 0.15
"""A check that takes longer yields to all else that the machine does."""
YIELDING = 10
"""How nice it is then."""
_TRIES = 2
_NESTED = frozenset({signal.SIGSEGV, signal.SIGBUS, signal.SIGABRT})


@dataclass(frozen=True, slots=True)
class Question:
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
        self._known: OrderedDict[Question, Answer] = OrderedDict()

    async def answer(self, question: Question, caller: Caller) -> Answer:
        """In `caller`'s turn. Raises TandemError `overloaded`, `unavailable` where none can be had now."""
        known = self._known.get(question)
        if known is not None:
            self._known.move_to_end(question)
            return known
        try:
            found = await self._work.run(caller.line, caller.weight, self._ask, question)
        except OSError as error:
            raise TandemError("unavailable", f"constraints cannot be checked ({error})", retry_after_s=1.0) from error
        self._known[question] = found
        if len(self._known) > MAX_KEPT:
            self._known.popitem(last=False)
        return found

    def _ask(self, question: Question) -> Answer:
        """On a thread of ours, each of which has a process. Raises OSError where none can be started."""
        for _ in range(_TRIES):
            process = self._process()
            line = _exchanged(process, msgspec.json.encode(question) + b"\n")
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

    def _process(self) -> subprocess.Popen[bytes]:
        process: subprocess.Popen[bytes] | None = getattr(self._mine, "process", None)
        if process is None or process.poll() is not None:
            process = self._mine.process = subprocess.Popen(
                [sys.executable, "-m", "tandem.router.constraint_process"],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
            )
        return process


def _exchanged(process: subprocess.Popen[bytes], line: bytes) -> bytes | None:
    """The line that answers; empty where the process has ended, None where nothing comes."""
    assert process.stdin is not None
    assert process.stdout is not None
    try:
        process.stdin.write(line)
        process.stdin.flush()
    except BrokenPipeError:
        return b""
    poll = select.poll()  # select.select() takes no descriptors above 1023
    poll.register(process.stdout.fileno(), select.POLLIN)
    if poll.poll(PROMPT_S * 1000):
        return _line(process.stdout.fileno(), poll)
    with contextlib.suppress(OSError):
        for thread in os.listdir(f"/proc/{process.pid}/task"):
            os.setpriority(os.PRIO_PROCESS, int(thread), YIELDING)
    found = _line(process.stdout.fileno(), poll)
    if found:
        process.kill()  # it cannot become quicker again
        process.wait()
    return found


def _line(descriptor: int, poll: select.poll) -> bytes | None:
    """One line; empty where the other side has ended, None where nothing comes."""
    line = b""
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
