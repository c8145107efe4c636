"""The sequences whose output has to fit a constraint, and what may follow it.

A sequence waits for its first mask before it queues. From then on each token that is chosen is followed by a question
to the mask processes (`masks/`), and the answer comes while the next step is computed, or makes its row wait.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterable
from functools import partial

from tandem.common.errors import TandemError
from tandem.engine.inbox import Inbox
from tandem.engine.masks.guide import Guide
from tandem.engine.masks.pool import MaskPool
from tandem.engine.request import FinishReason, RequestOutput
from tandem.engine.schedule.sequence import Sequence
from tandem.engine.step.constraint import Patience

logger = logging.getLogger(__name__)


About = Callable[[Iterable[Sequence], Callable[[], None]], None]
"""Carries out a call that is about some sequences: if it raises, their requests end and no other."""


class Guided:
    """Engine thread only."""

    def __init__(
        self,
        masks: MaskPool,
        inbox: Inbox,
        *,
        about: About,
        queue: Callable[[Sequence], None],
        end: Callable[[Sequence, RequestOutput], None],
        fail: Callable[[Sequence, TandemError], None],
    ) -> None:
        """`queue` takes a sequence whose first mask is there, `end` one whose output is complete, `fail` one that
        cannot go on."""
        self.masks = masks
        self._inbox = inbox
        self._about = about
        self._queue = queue
        self._end = end
        self._fail = fail
        self._sequences: dict[int, Sequence] = {}
        """Sequences by the number of their guide."""
        self._patience = Patience()

    def __len__(self) -> int:
        return len(self._sequences)

    def open(self, sequence: Sequence) -> None:
        """Asks for the first mask of `sequence`, whose request has a constraint."""
        constraint, output = sequence.request.sampling.constraint, sequence.tokens[sequence.num_prompt :]
        if constraint is None:
            raise ValueError(f"{sequence.key} has no constraint")
        try:
            sequence.guide = self.masks.guide(constraint, sequence.request.tenant, output)
        except TandemError as error:
            self._fail(sequence, error)
        else:
            self._sequences[sequence.guide.number] = sequence

    def ends_with(self, sequence: Sequence, token: int) -> bool:
        """Whether `token` ends the output of `sequence`, because it has a constraint."""
        return sequence.guide is not None and self.masks.ends_with(token)

    def follow(self, sequence: Sequence) -> None:
        """Asks for the mask after the output of `sequence`, if it has a constraint."""
        if sequence.guide is not None:
            self.masks.follow(sequence.guide, sequence.tokens[sequence.num_prompt :])

    def forget(self, sequence: Sequence) -> None:
        """`sequence` ends."""
        if sequence.guide is not None and self._sequences.pop(sequence.guide.number, None) is not None:
            self.masks.close(sequence.guide)

    def receive(self) -> None:
        """Takes what the mask processes have said, and asks what is to be asked."""
        try:
            self.masks.receive()
            self.masks.send()
            while self.masks.changed:
                guide = self.masks.changed.pop(0)
                if (sequence := self._sequences.get(guide.number)) is not None:
                    self._about((sequence,), partial(self._came, sequence, guide))
                self.masks.send()
        except Exception:
            self._give_up()

    def expire(self, now: float) -> None:
        """Ends what a mask process has not answered for too long."""
        try:
            self.masks.expire(now)
        except Exception:
            self._give_up()

    def send(self) -> None:
        """Asks what a step has left to ask."""
        try:
            self.masks.send()
        except Exception:
            self._give_up()

    def not_ready(self, sequences: list[Sequence], step_s: float) -> list[Sequence]:
        """Those of `sequences`, who are about to be sampled, whose masks are not there: waits for them for a small
        share of `step_s`, the seconds that the step has taken."""
        late = _without_mask(sequences)
        if not late:
            return late
        try:
            self._wait(late, step_s, alone=len(late) == len(sequences))
        except Exception:
            logger.exception("the mask processes cannot be talked to")  # and `receive` will find out
        late = _without_mask(late)
        for sequence in late:
            if sequence.guide is not None:
                sequence.guide.prompt = False
        return late

    def _wait(self, late: list[Sequence], step_s: float, *, alone: bool) -> None:
        """`alone`: nobody else is sampled; then it ends when somebody comes, too."""
        self.masks.receive()
        started = time.monotonic()
        until = started + self._patience.of_step(step_s, alone)
        while any(each.guide is not None and each.guide.awaited for each in late):
            left = until - time.monotonic()
            if left <= 0 or (alone and self._inbox):
                break
            if alone:
                self._inbox.sleep(left, self.masks.watched())
                self.masks.receive()
            elif not self.masks.receive(left):
                break
        if not alone:
            self._patience.spend(time.monotonic() - started)

    def _came(self, sequence: Sequence, guide: Guide) -> None:
        """A mask is there, or it is known that none will come."""
        if guide.awaited:  # it came within a step, and the next one is on its way
            return
        if guide.error:
            self._fail(sequence, TandemError(guide.error_code, guide.error))
        elif guide.complete or (sequence.num_output and len(sequence.tokens) >= sequence.max_total):
            reason = FinishReason.STOP if guide.complete else FinishReason.LENGTH
            self._end(sequence, RequestOutput(sequence.key, sequence.num_output, finish_reason=reason))
        elif not guide.queued:
            guide.queued = True
            self._queue(sequence)

    def _give_up(self) -> None:
        logger.exception("the mask processes cannot be talked to; all requests with a constraint end")
        for sequence in list(self._sequences.values()):
            self._fail(sequence, TandemError("internal", "the constraints' processes failed; see the worker's log"))


def _without_mask(sequences: list[Sequence]) -> list[Sequence]:
    return [sequence for sequence in sequences if sequence.guide is not None and not sequence.guide.ready]
