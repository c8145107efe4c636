"""The mask processes of one engine, as the engine thread sees them: guides open, follow and close, masks come back.

Nothing here blocks but `receive`, for as long as it is told. A process serves one constraint of one tenant, or several
where there are too many, so that the work of one delays nobody else's: the operating system takes turns between them,
and costly ones yield to all others. A process that ends takes down the request that it was working on. Its other
sequences begin again in another one, which reads their output so far, and only miss steps.
"""

from __future__ import annotations

import logging
import os
import select
import signal
import socket
import subprocess
import sys
import time
from collections import OrderedDict
from collections.abc import Sequence as Seq
from contextlib import suppress
from pathlib import Path
from weakref import WeakValueDictionary

import msgspec

from tandem.common.errors import TandemError
from tandem.common.sampling import Constraint
from tandem.engine.masks.guide import MAX_STRIKES, PROMPT_S, Guide, Work
from tandem.engine.masks.mask_process import RECEIVED_BYTES, MaskProcess
from tandem.engine.masks.messages import Close, Follow, Frames, Open, Ready

logger = logging.getLogger(__name__)

MAX_CHARACTERS = 256 * 1024
"""Length of a schema, expression or grammar."""
MAX_PROCESSES = 32
MAX_OF_TENANT = 12
"""Processes in use at one time. Its further constraints share them."""
PATIENCE_S = 60.0
"""Seconds to wait for an answer on a busy machine; what it may cost is bounded in processor time."""
LOADING_S = 60.0
"""Seconds that the tokenizer may take to be read: a process that is not ready then is killed and started again."""
MAX_FAILED_STARTS = 3
"""Starts in a row of a process that is never ready; then constraints are refused for `FORGIVEN_S`."""
MAX_DEATHS = 3
"""Processes that a tenant may take down with one constraint; then the constraint is refused"""
FORGIVEN_S = 300.0
"""for so long after the first."""
MAX_REMEMBERED = 256
"""Constraints that ended a process."""

_READY = msgspec.msgpack.Decoder(Ready)


class MaskPool:
    """All of them, and the process that they are forked from. Engine thread only."""

    def __init__(self, tokenizer: Path, vocab_size: int, eos_ids: Seq[int]) -> None:
        """`tokenizer`: a tokenizer.json; where it cannot be read, constraints are refused. `vocab_size`: that of the
        logits."""
        self.changed: list[Guide] = []
        """Guides that something came for, until somebody clears it."""
        self.processes: list[MaskProcess] = []
        """Processes in the order of their last use."""
        self._arguments = [str(tokenizer), str(vocab_size), *map(str, eos_ids)]
        self._eos_ids: frozenset[int] = frozenset(eos_ids)
        self._unavailable = ""
        self._origin: subprocess.Popen[bytes] | None = None
        self._control: socket.socket | None = None
        self._control_frames = Frames()
        self._ready = False
        self._failed_starts = 0
        self._started = 0.0
        """When (s) the process was started from which the others are made."""
        self._homes: dict[int, MaskProcess] = {}
        """Processes by the number of the guide."""
        self._numbers = 0
        self._work: WeakValueDictionary[tuple[str, Constraint], Work] = WeakValueDictionary()
        self._deaths: OrderedDict[tuple[str, Constraint], tuple[int, float]] = OrderedDict()
        """Processes that ended while they worked for a constraint of a tenant, and when the first of them did."""

    # Guides

    def guide(self, constraint: Constraint, tenant: str, tokens: Seq[int]) -> Guide:
        """Its first mask is on its way, that of the token after `tokens`. Raises TandemError `invalid_request` for what
        cannot be served, `unavailable` where there can be no process."""
        if len(constraint.text) > MAX_CHARACTERS:
            raise TandemError(
                "invalid_request",
                f"the constraint has {len(constraint.text)} characters, the most is {MAX_CHARACTERS}",
            )
        self._check(tenant, constraint)
        self.start()
        self._numbers += 1
        work = self._work.setdefault((tenant, constraint), Work())
        guide = Guide(self._numbers, constraint, tenant, list(tokens), work)
        self._open(guide)
        return guide

    def follow(self, guide: Guide, output: list[int]) -> None:
        """Asks for the mask after `output`, which goes on from what the guide knows."""
        new = output[len(guide.tokens) :]
        if new and not guide.error and not guide.complete:
            guide.tokens += new
            guide.work.tokens += len(new)
            guide.bits = None
            home = self._homes[guide.number]
            home.put(Follow(guide.number, new), guide)
            guide.prompt = home.backlog_s <= PROMPT_S

    def close(self, guide: Guide) -> None:
        """Forgets a guide; what its process still answers for it is dropped. Without effect if it is closed."""
        home = self._homes.pop(guide.number, None)
        if home is not None:
            del home.guides[guide.number]
            home.put(Close(guide.number))

    def ends_with(self, token: int) -> bool:
        """Whether `token` is the model's way to end, whatever a request says of it."""
        return token in self._eos_ids

    def _check(self, tenant: str, constraint: Constraint) -> None:
        count, since = self._deaths.get((tenant, constraint), (0, 0.0))
        if count >= MAX_DEATHS and time.monotonic() - since < FORGIVEN_S:
            raise _too_dear(constraint)

    def _remember(self, culprit: Guide) -> None:
        key, now = (culprit.tenant, culprit.constraint), time.monotonic()
        count, since = self._deaths.pop(key, (0, now))
        self._deaths[key] = (count + 1, since) if now - since < FORGIVEN_S else (1, now)
        if len(self._deaths) > MAX_REMEMBERED:
            self._deaths.popitem(last=False)

    # Traffic

    def send(self) -> None:
        """Sends what was asked for."""
        for process in tuple(self.processes):
            self._send(process)

    def receive(self, timeout_s: float = 0.0) -> bool:
        """Takes what has come, or comes within `timeout_s`. False: nothing."""
        watched = self.watched()
        if not watched:
            return False
        poll = select.poll()
        for descriptor, events in watched:
            poll.register(descriptor, events)
        processes = {process.connection.fileno(): process for process in self.processes}
        control = self._control if not self._ready else None
        found = poll.poll(timeout_s * 1000)
        if control is not None and any(descriptor == control.fileno() for descriptor, _ in found):
            self._receive_ready(control)  # before those that have ended because of it
        for descriptor, event in found:
            process = processes.get(descriptor)
            if process is not None and process in self.processes:
                if event & ~select.POLLOUT:
                    self._take(process)
                else:
                    self._send(process)
        return bool(found)

    def watched(self) -> list[tuple[int, int]]:
        """Descriptors and the events of `poll` that give `receive` work."""
        found = [
            (process.connection.fileno(), select.POLLIN | (select.POLLOUT if process.has_unsent else 0))
            for process in self.processes
            if process.awaited or process.has_unsent
        ]
        if self._control is not None and not self._ready:
            found.append((self._control.fileno(), select.POLLIN))
        return found

    @property
    def _loading(self) -> bool:
        return self._control is not None and not self._ready

    def next_due(self) -> float | None:
        """When (s) the patience with a process ends."""
        due = [process.waits_since + PATIENCE_S for process in self.processes if process.awaited and process.is_made]
        if self._loading:
            due.append(self._started + LOADING_S)
        return min(due, default=None)

    def expire(self, now: float) -> None:
        """Gives up processes that have not answered for too long."""
        if self._loading and now - self._started > LOADING_S:
            logger.error("the process that reads %s was not ready after %g s", self._arguments[0], LOADING_S)
            self._end_origin()  # which is seen at the sockets of those that it should have made
        for process in tuple(self.processes):
            if process.awaited and process.is_made and now - process.waits_since > PATIENCE_S:
                self._lost(process)

    def _send(self, process: MaskProcess) -> None:
        try:
            process.send()
        except OSError:
            self._lost(process)

    def _take(self, process: MaskProcess) -> None:
        try:
            replies = process.receive()
        except (OSError, ValueError):  # msgspec's errors are ValueErrors
            self._lost(process)
            return
        for reply in replies:
            if not process.awaited or process.awaited[0].number != reply.guide:
                self._lost(process)
                return
            guide = process.answered()
            if not guide.error:
                guide.take(reply)
                if guide.number in process.guides:  # or it has been closed, and is charged all the same
                    self.changed.append(guide)
            if problem := guide.work.problem:
                self._end(process, guide.work, problem)
                if process not in self.processes:
                    return

    def _end(self, process: MaskProcess, work: Work, problem: str) -> None:
        """All guides that share `work` end. Where nobody else is served, what they still wait for is not computed."""
        for guide in process.guides.values():
            if guide.work is work and not guide.error:
                guide.fail(problem)
                self.changed.append(guide)
        if all(guide.error for guide in process.guides.values()) and process in self.processes:
            for number in process.guides:
                del self._homes[number]
            self._drop(process)

    # Processes

    def start(self) -> None:
        """Starts the process from which the others are made, if it does not run; does not wait for it. Raises
        TandemError `invalid_request`, `unavailable`."""
        if self._unavailable:
            raise TandemError("invalid_request", f"this model cannot be constrained: {self._unavailable}")
        if self._control is not None:
            return
        now = time.monotonic()
        if self._failed_starts >= MAX_FAILED_STARTS:
            left_s = self._started + FORGIVEN_S - now
            if left_s > 0:
                problem = "the process that reads the tokenizer for constraints does not start"
                raise TandemError("unavailable", problem, retry_after_s=left_s)
            self._failed_starts = 0
        try:
            ours, theirs = socket.socketpair()
            with theirs:
                self._origin = subprocess.Popen(
                    [sys.executable, "-m", "tandem.engine.masks.process", *self._arguments],
                    stdin=theirs.fileno(),
                    stdout=subprocess.DEVNULL,
                    stderr=subprocess.DEVNULL,
                    process_group=0,
                )
        except OSError as error:
            raise _no_process(error) from error
        ours.setblocking(False)
        self._control, self._ready, self._control_frames = ours, False, Frames()
        self._started = now
        self._failed_starts += 1  # until it is ready

    def stop(self) -> None:
        """Ends all mask processes and the process that they are made from."""
        for process in self.processes:
            process.connection.close()
        self.processes.clear()
        self._homes.clear()
        if self._origin is not None:
            with suppress(ProcessLookupError):
                os.killpg(self._origin.pid, signal.SIGKILL)
        self._end_origin()

    def _end_origin(self) -> None:
        """Those that were made from it live on."""
        if self._control is not None:
            self._control.close()
            self._control = None
        if self._origin is not None:
            self._origin.kill()
            self._origin.wait()
            self._origin = None

    def _receive_ready(self, control: socket.socket) -> None:
        try:
            data = control.recv(RECEIVED_BYTES)
        except ConnectionResetError:
            data = b""
        for body in self._control_frames.add(data):
            ready = _READY.decode(body)
            self._ready, self._failed_starts = True, 0
            for process in self.processes:
                process.made()
            self._unavailable = ready.problem
            self._eos_ids = frozenset(ready.eos_ids)
        if not data:
            self._end_origin()
        if self._unavailable:
            logger.warning("requests with a constraint are refused: %s: %s", self._arguments[0], self._unavailable)
            self._end_origin()

    def _open(self, guide: Guide) -> None:
        """Raises TandemError `unavailable`."""
        process = self._place(guide)
        self.processes.remove(process)
        self.processes.append(process)
        process.guides[guide.number] = guide
        if guide.constraint not in process.constraints:
            process.constraints.append(guide.constraint)
        self._homes[guide.number] = process
        process.put(Open(guide.number, guide.constraint.kind, guide.constraint.text, guide.tokens), guide)

    def _place(self, guide: Guide) -> MaskProcess:
        own = [process for process in self.processes if process.tenant == guide.tenant]
        for process in own:
            if guide.constraint in process.constraints:
                return process
        busy = sum(1 for process in own if process.guides)
        if busy < MAX_OF_TENANT:
            if len(self.processes) < MAX_PROCESSES:
                return self._fork(guide.tenant)
            idle = next((process for process in self.processes if not process.guides), None)
            if idle is not None:
                self._drop(idle)
                return self._fork(guide.tenant)
        return min(own or self.processes, key=lambda process: (len(process.awaited), len(process.guides)))

    def _fork(self, tenant: str) -> MaskProcess:
        try:
            ours, theirs = socket.socketpair()
        except OSError as error:
            raise _no_process(error) from error
        with theirs:
            try:
                self._pass_on(theirs)
            except TandemError:
                ours.close()
                raise
        ours.setblocking(False)
        process = MaskProcess(tenant, ours, is_made=self._ready)
        self.processes.append(process)
        return process

    def _pass_on(self, theirs: socket.socket) -> None:
        """A new process gets `theirs`. Raises TandemError."""
        while True:
            self.start()
            assert self._control is not None
            try:
                socket.send_fds(self._control, [b"f"], [theirs.fileno()])
                return
            except BlockingIOError as error:  # it reads nothing, and many have asked
                raise _no_process(error) from error
            except OSError:  # it has ended; perhaps it said why
                self._receive_ready(self._control)
                self._end_origin()

    def _drop(self, process: MaskProcess) -> None:
        process.connection.close()
        self.processes.remove(process)

    def _lost(self, process: MaskProcess) -> None:
        """It has ended, or is given up. Whom it worked for is to blame; the others begin again elsewhere, before it."""
        self._drop(process)
        guides = list(process.guides.values())
        for guide in guides:
            del self._homes[guide.number]
        culprit = process.awaited[0] if process.awaited and process.is_made else None
        if culprit is not None:
            logger.debug("a mask process has ended at a %s constraint", culprit.constraint.kind)
            culprit.strikes += 1
            self._remember(culprit)
        guides.sort(key=lambda guide: guide is culprit)
        for guide in guides:
            guide.reopen()
            try:
                if guide.strikes >= MAX_STRIKES:
                    raise _too_dear(guide.constraint)
                self._check(guide.tenant, guide.constraint)
                self._open(guide)
            except TandemError as error:
                guide.fail(error.message, error.code)
            if guide.error:
                self.changed.append(guide)


def _no_process(error: OSError) -> TandemError:
    return TandemError("unavailable", f"no process can be started for constraints ({error})", retry_after_s=1.0)


def _too_dear(constraint: Constraint) -> TandemError:
    return TandemError(
        "invalid_request",
        f"the {constraint.kind} constraint takes too long, too much memory or is nested too deeply: the process that "
        "works on it was ended. Use a smaller one, with fewer rules that match the same text",
    )
