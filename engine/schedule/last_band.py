"""How much of a worker the last band gets while earlier bands have work there. Part of the scheduler: pure, times are
passed in.

Nobody waits for the last band (`common.fairness.LAST_BAND`; batches run in it), so it takes what others leave. While
they have work it gets a share of the worker's time, in pieces: a few rows and prompt tokens that make one step longer.
A piece is due once its time has been saved up. Where somebody waits for a first token it is put off, until much more
has been saved up; so requests that come and go see none, and under a load without end the last band gets its share.
"""

from __future__ import annotations

from dataclasses import dataclass

SHARE = 0.05
"""Share of the worker's time, which the last band gets at least while it has work."""
ROWS = 16
"""Decode rows of a piece."""
PROMPT_TOKENS = 32
"""Prompt tokens of a piece, or one block where blocks are larger."""
PATIENCE_S = 0.05
"""Saved up before a piece delays a first token: a second has passed without any then."""
FIRST_PIECE_S = 0.005
"""What a piece is thought to cost before one was measured."""
MAX_PIECE_S = PATIENCE_S
MAX_DEBT_S = 0.5
"""A piece that took longer, perhaps because the machine stood still, is not paid off in full."""
_DECAY = 0.9


@dataclass(slots=True)
class Room:
    """What the last band may still have of the step that is being planned."""

    rows: int
    prompt_tokens: int


class LastBand:
    """The account of the last band's time: `SHARE` of it while others have work. Seconds of time.monotonic() come with
    the calls."""

    def __init__(self) -> None:
        self.due_at: float | None = None
        """When its next piece is due; None: it need not wait."""
        self._saved_s = 0.0
        """The last band's time that it has not had; negative: it has had more."""
        self._at: float | None = None
        """When it was last looked at; None: it had no work."""
        self._alone = False
        self._piece_s = FIRST_PIECE_S
        """What a piece costs: by how much the step is longer."""
        self._step_s = 0.0
        """A step of earlier bands that only decode."""

    def has_no_work(self) -> None:
        self._at = self.due_at = None
        self._saved_s = min(self._saved_s, 0.0)

    def is_alone(self, now: float) -> None:
        """It has work, and no earlier band has."""
        self._save(now)
        self._alone, self.due_at = True, None

    def is_due(self, now: float, first_token_waits: bool) -> bool:
        """Whether it gets a piece of the next step. An earlier band has work too; `first_token_waits`: somebody there
        waits for a first token."""
        self._save(now)
        self._alone = False
        missing_s = self._piece_s + (PATIENCE_S if first_token_waits else 0.0) - self._saved_s
        self.due_at = now + missing_s / SHARE if missing_s > 0 else None
        return self.due_at is None

    def took(self, rows: int, prompt_tokens: int, last_band_tokens: int, seconds: float) -> None:
        """A step took `seconds`: `rows` and `prompt_tokens` of earlier bands, and what the last one had of it."""
        if not last_band_tokens:
            if rows and not prompt_tokens:
                self._step_s = _mean(self._step_s, min(seconds, 2 * self._step_s or seconds))
            return
        if self._alone:
            self._saved_s = max(self._saved_s - seconds, min(self._saved_s, 0.0))  # nobody lost that time
            return
        if prompt_tokens or (rows and not self._step_s):
            seconds *= last_band_tokens / (rows + prompt_tokens + last_band_tokens)
        elif rows:
            seconds = max(seconds - self._step_s, 0.0)
        self._piece_s = min(_mean(self._piece_s, seconds), MAX_PIECE_S)
        self._saved_s = max(self._saved_s - seconds, -MAX_DEBT_S)

    def _save(self, now: float) -> None:
        if self._at is not None:
            self._saved_s = min(self._saved_s + (now - self._at) * SHARE, MAX_PIECE_S + PATIENCE_S)
        self._at = now


def _mean(old: float, new: float) -> float:
    return old * _DECAY + new * (1 - _DECAY) if old else new
