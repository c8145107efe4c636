"""Which tokens of a sequence have KV: sorted ranges with gaps between them. Pure.

What is computed grows from the front. What comes from elsewhere (the KV store today) may lie behind tokens that are
still to be computed.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class TokenRanges:
    """A set of token positions. Values do not change: every operation returns another one."""

    parts: tuple[tuple[int, int], ...] = ()
    """[first, end) each: sorted, none empty, with a gap between any two. Made by `of` and the operations."""

    @classmethod
    def of(cls, *parts: tuple[int, int]) -> TokenRanges:
        """The union of ranges [first, end) in any order; those that end before they begin count as empty."""
        merged: list[tuple[int, int]] = []
        for first, end in sorted(part for part in parts if part[0] < part[1]):
            if merged and first <= merged[-1][1]:
                merged[-1] = merged[-1][0], max(end, merged[-1][1])
            else:
                merged.append((first, end))
        return cls(tuple(merged))

    @classmethod
    def up_to(cls, end: int) -> TokenRanges:
        """[0, end)."""
        return cls(((0, end),)) if end > 0 else EMPTY

    def __bool__(self) -> bool:
        return bool(self.parts)

    def __iter__(self) -> Iterator[tuple[int, int]]:
        return iter(self.parts)

    @property
    def count(self) -> int:
        """Tokens in all ranges."""
        return sum(end - first for first, end in self.parts)

    @property
    def end(self) -> int:
        """The last token plus one; 0 without any."""
        return self.parts[-1][1] if self.parts else 0

    def union(self, other: Iterable[tuple[int, int]]) -> TokenRanges:
        return TokenRanges.of(*self.parts, *other)

    def within(self, first: int, end: int) -> TokenRanges:
        """What of it lies in [first, end)."""
        cut = ((max(first, start), min(end, stop)) for start, stop in self.parts)
        return TokenRanges(tuple(part for part in cut if part[0] < part[1]))

    def gaps(self, first: int, end: int) -> TokenRanges:
        """What of [first, end) is not in it."""
        missing: list[tuple[int, int]] = []
        for start, stop in self.within(first, end).parts:
            if first < start:
                missing.append((first, start))
            first = stop
        if first < end:
            missing.append((first, end))
        return TokenRanges(tuple(missing))

    def first_gap(self, start: int = 0) -> int:
        """The first token from `start` on that is not in it."""
        for first, end in self.parts:
            if first <= start < end:
                return end
        return start

    def leading(self, count: int) -> TokenRanges:
        """Its first `count` tokens, or all where it has fewer."""
        taken: list[tuple[int, int]] = []
        for first, end in self.parts:
            if count <= 0:
                break
            taken.append((first, min(end, first + count)))
            count -= end - first
        return TokenRanges(tuple(taken))


EMPTY = TokenRanges()
