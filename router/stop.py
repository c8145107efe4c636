"""Stop strings over a stream of text: cuts before the earliest match and never shows part of one."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class StopResult:
    text: str
    """Text that may be shown now."""
    matched: str | None = None
    """The stop string that ended the output."""


class StopMatcher:
    """Feeds on text pieces of any size. At most one character less than the longest stop string is held back.

    Of several stop strings the one that is complete first wins, and at the same end the one that starts first. Fed
    character by character or in pieces, the result is the same.
    """

    def __init__(self, stops: Sequence[str]) -> None:
        self._stops = tuple(stop for stop in stops if stop)
        self._held = ""

    @property
    def held(self) -> str:
        return self._held

    def feed(self, piece: str) -> StopResult:
        if not self._stops:
            return StopResult(piece)
        text = self._held + piece
        match = self._first_match(text)
        if match is not None:
            start, stop = match
            self._held = ""
            return StopResult(text[:start], stop)
        keep = self._possible_start(text)
        self._held = text[len(text) - keep :]
        return StopResult(text[: len(text) - keep])

    def flush(self) -> str:
        """The output ended otherwise: what was held back is ordinary text."""
        held, self._held = self._held, ""
        return held

    def _first_match(self, text: str) -> tuple[int, str] | None:
        found = [(start + len(stop), start, stop) for stop in self._stops if (start := text.find(stop)) >= 0]
        if not found:
            return None
        _, start, stop = min(found)
        return start, stop

    def _possible_start(self, text: str) -> int:
        """Length of the longest suffix of `text` with which a stop string begins."""
        longest = 0
        for stop in self._stops:
            for length in range(min(len(stop) - 1, len(text)), longest, -1):
                if text.endswith(stop[:length]):
                    longest = length
                    break
        return longest
