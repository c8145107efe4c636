"""Stop strings over a stream of text: cuts before the earliest match and never shows part of one."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache


@dataclass(frozen=True, slots=True)
class StopResult:
    """What one piece of text comes to."""

    text: str
    """Text that may be shown now."""
    matched: str | None = None
    """The stop string that ended the output."""


class StopMatcher:
    """Feeds on text pieces of any size. At most one character less than the longest stop string is held back.

    Of several stop strings the one that is complete first wins, and at the same end the one that starts first. Fed
    character by character or in pieces, the result is the same. A character costs the same whatever the strings are:
    for each of them it is known how much of it the text ends with (Knuth, Morris and Pratt).
    """

    def __init__(self, stops: Sequence[str]) -> None:
        self._stops = tuple(stop for stop in stops if stop)
        self._fallbacks = [_fallbacks(stop) for stop in self._stops]
        self._matched = [0] * len(self._stops)
        """Characters of each stop string that the text ends with."""
        self._begins = frozenset(stop[0] for stop in self._stops)
        self._held = ""

    @property
    def held(self) -> str:
        return self._held

    def feed(self, piece: str) -> StopResult:
        """Text that may be shown after `piece`: up to a stop string that is complete, and without what could begin
        one."""
        if not self._held and self._begins.isdisjoint(piece):
            return StopResult(piece)
        text = self._held + piece
        for end, character in enumerate(piece, len(self._held) + 1):
            stop = self._advance(character)
            if stop is not None:
                self._held = ""
                return StopResult(text[: end - len(stop)], stop)
        certain = len(text) - max(self._matched)
        self._held = text[certain:]
        return StopResult(text[:certain])

    def flush(self) -> str:
        """The output ended otherwise: what was held back is ordinary text."""
        held, self._held = self._held, ""
        self._matched = [0] * len(self._stops)
        return held

    def _advance(self, character: str) -> str | None:
        """The longest stop string that is complete now."""
        complete: str | None = None
        for index, (stop, fallbacks) in enumerate(zip(self._stops, self._fallbacks, strict=True)):
            length = self._matched[index]
            while length and (length == len(stop) or stop[length] != character):
                length = fallbacks[length]
            if stop[length] == character:
                length += 1
                if length == len(stop) and (complete is None or length > len(complete)):
                    complete = stop
            self._matched[index] = length
        return complete


@lru_cache(maxsize=1024)
def _fallbacks(stop: str) -> tuple[int, ...]:
    """The length, for each beginning of `stop`, of the longest other beginning that it ends with."""
    found = [0, 0]
    for end in range(1, len(stop)):
        length = found[end]
        while length and stop[length] != stop[end]:
            length = found[length]
        found.append(length + 1 if stop[length] == stop[end] else 0)
    return tuple(found)
