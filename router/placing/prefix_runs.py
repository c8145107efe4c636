"""Pieces of prefix chains, for `prefix_index.py`: what is the same for neighbouring blocks is kept once for all.

A block's hash covers all tokens before it (`kvstore/identity.py`). So a block has one place in its chain, its depth,
and where two chains agree on a block they agree on all before it: comparing the last blocks of two pieces compares
the pieces, and where they part is found by bisection.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from itertools import pairwise

from tandem.kvstore.identity import BlockHash


class Run:
    """Neighbouring blocks of a chain. `entry` is the index's for all of them."""

    __slots__ = ("blocks", "entry", "start")

    def __init__(self, start: int, blocks: list[BlockHash], entry: int = 0) -> None:
        self.start = start
        """Depth of the first block."""
        self.blocks = blocks
        self.entry = entry

    def common(self, chain: Sequence[BlockHash], position: int, depth: int) -> int:
        """How many blocks of `chain` from `position` on, whose depth is `depth`, are the run's; the first one is."""
        blocks, offset = self.blocks, depth - self.start
        least, most = 1, min(len(blocks) - offset, len(chain) - position)
        if chain[position + most - 1] == blocks[offset + most - 1]:
            return most
        while most - least > 1:
            middle = (least + most) // 2
            if chain[position + middle - 1] == blocks[offset + middle - 1]:
                least = middle
            else:
                most = middle
        return least

    def cut(self, *positions: int) -> list[Run]:
        """The runs between `positions`, in order. The longest of them is this one, shortened."""
        ends = [0, *positions, len(self.blocks)]
        parts = [(low, self.blocks[low:high]) for low, high in pairwise(ends) if low < high]
        longest = max(parts, key=lambda part: len(part[1]))
        start, entry = self.start, self.entry
        runs = [self if part is longest else Run(start + part[0], part[1], entry) for part in parts]
        self.start, self.blocks = start + longest[0], longest[1]
        return runs


class Recent:
    """The blocks that a worker without events probably keeps: those used last, of a prompt the first longest.

    A radix tree without links: a run is found by its first block. What is used goes to the end of the line with the
    deepest run first, so whatever stands at its head has nothing below it."""

    def __init__(self, capacity: int) -> None:
        self.capacity = capacity
        """Blocks."""
        self._size = 0
        self._runs: dict[BlockHash, Run] = {}
        self._line: OrderedDict[Run, None] = OrderedDict()

    def use(self, chain: Sequence[BlockHash]) -> list[Run]:
        """All of `chain`, from its root. Returns what left."""
        path: list[Run] = []
        position = 0
        while position < len(chain):
            run = self._runs.get(chain[position])
            if run is None:
                run = Run(position, list(chain[position:]))
                self._size += len(run.blocks)
                self._runs[chain[position]] = run
            elif (common := run.common(chain, position, position)) < len(run.blocks):
                # The rest keeps its age, and so the run itself; the part that is used now becomes one of its own.
                rest = run
                run = Run(position, rest.blocks[:common])
                rest.start, rest.blocks = position + common, rest.blocks[common:]
                self._runs[rest.blocks[0]] = rest
                self._runs[chain[position]] = run
            path.append(run)
            position += len(run.blocks)
        for run in reversed(path):
            self._line[run] = None
            self._line.move_to_end(run)
        return self._shrink()

    def _shrink(self) -> list[Run]:
        left = []
        while self._size > self.capacity:
            run = next(iter(self._line))
            keep = max(0, len(run.blocks) - (self._size - self.capacity))
            left.append(Run(run.start + keep, run.blocks[keep:]))
            self._size -= len(run.blocks) - keep
            if keep:
                del run.blocks[keep:]
            else:
                del self._line[run], self._runs[run.blocks[0]]
        return left

    def blocks(self) -> list[BlockHash]:
        """The first one to leave first."""
        return [block for run in self._line for block in reversed(run.blocks)]

    def check_integrity(self) -> None:
        """Raises AssertionError where the books do not balance."""
        blocks = self.blocks()
        assert len(blocks) == len(set(blocks)) == self._size <= self.capacity, "blocks are miscounted"
        assert {run.blocks[0]: run for run in self._line} == self._runs, "runs are not found by their first blocks"
