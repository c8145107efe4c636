"""Which worker holds which leading blocks of a prompt, and which will hold them soon.

Told by the workers' cache events, where a worker sends them, and else by the router's own decisions. Decisions in
flight count at once, as promised: a herd of equal prompts sees where its first one went.

Each worker has a slot. A block's entry is one integer with two bits per slot (present, promised), so that one look-up
per block answers for all workers; equal integers are shared, so an entry costs little more than its hash. Retiring a
slot takes its bits out of a mask: they mean nothing from then on, and are wiped little by little before the slot is
used again.
"""

from __future__ import annotations

from collections import OrderedDict, deque
from collections.abc import Iterator, Sequence
from itertools import groupby, repeat

from tandem.kvstore.identity import BlockHash

MAX_BLOCKS = 1_000_000
"""About 130 MB. What does not fit is forgotten and so counts as not cached."""
_WIPED = 500
"""Blocks that each change looks at while bits of retired slots are left."""
_BATCH = 128
"""Blocks looked at in one go when there are too many."""
_SPARED = 1024
"""Blocks that get a second chance in one go."""
_MAX_SHARED = 4096
_USED = 1
"""Lowest bit of an entry: a later prompt had the block, since it was last considered for being forgotten."""

Match = tuple[int, int, int]
"""Slot, leading blocks present, promised blocks right after them."""


class PrefixIndex:
    """Used from one thread. A slot is a small number that is valid from `add` until `retire`."""

    def __init__(self, max_blocks: int = MAX_BLOCKS) -> None:
        self.max_blocks = max_blocks
        self._entries: dict[BlockHash, int] = {}
        self._shared: dict[int, int] = {}
        self._line: deque[tuple[BlockHash, ...]] = deque()
        """Batches of blocks in the order in which they are considered for being forgotten."""
        self._in_line = 0
        self._slots = 0
        """The present bits of all slots in use."""
        self._retired = 0
        """Present bits of slots that may not be used again yet."""
        self._wiping: tuple[int, list[BlockHash]] = 0, []
        """Which slots are being wiped out of which blocks."""
        self._guessed: dict[int, _Recent] = {}
        """Slots without events."""
        self._asked: Sequence[BlockHash] | None = None
        self._answer: list[Match] = []
        """To the latest `match`, while nothing changes."""

    def __len__(self) -> int:
        return len(self._entries)

    def add(self, capacity: int | None) -> int:
        """A slot for a worker that sends events (None), or else is believed to keep the last `capacity` blocks."""
        bit = 2
        while bit & (self._slots | self._retired):
            bit <<= 2
        self._slots |= bit
        slot = _slot(bit)
        if capacity is not None:
            self._guessed[slot] = _Recent(min(capacity, self.max_blocks))
        return slot

    def retire(self, slot: int) -> None:
        """Forgets everything known of a worker, at once."""
        bit = _present(slot) & self._slots
        self._asked = None
        self._slots ^= bit
        self._retired |= bit
        self._guessed.pop(slot, None)

    def renew(self, slot: int) -> int:
        """For a worker that begins to list its cache anew: the slot it has from now on, which holds nothing."""
        self.retire(slot)
        return self.add(None)

    def match(self, chain: Sequence[BlockHash]) -> list[Match]:
        """The workers that hold, or will hold, the first block of `chain`, and how much of it each does.

        Asked for the same list again before anything has changed, as admission and placement do, it just repeats."""
        if chain is not self._asked:
            self._asked, self._answer = chain, self._match(chain)
        return self._answer

    def _match(self, chain: Sequence[BlockHash]) -> list[Match]:
        first = self._entries.get(chain[0]) if chain else None
        if first is None:
            return []
        found: list[Match] = []
        covered = self._slots & (first | first >> 1)
        present = covered & first
        present_until: dict[int, int] = {}
        position = 0
        # map and groupby run in C: a step of this loop is a run of equal entries, of which there are few.
        for entry, run in groupby(map(self._entries.get, chain)):
            if entry is None or not covered:
                break
            for bit in _bits(present & ~entry):
                present_until[bit] = position
            present &= entry
            for bit in _bits(covered & ~(entry | entry >> 1)):
                _note(found, bit, present_until.get(bit, 0), position)
            covered &= entry | entry >> 1
            position += len(list(run))
        for bit in _bits(covered):
            _note(found, bit, position if bit & present else present_until.get(bit, 0), position)
        return found

    def promise(self, slot: int, chain: Sequence[BlockHash], start: int) -> None:
        """A prompt was placed on `slot`, which will compute (or be sent) the blocks from `start` on."""
        self._change(chain[:start], _USED, 0)
        self._change(chain[start:], _present(slot) << 1, 0)
        self._tidy()

    def computed(self, slot: int, chain: Sequence[BlockHash]) -> None:
        """The whole of `chain` is there now. A worker with events says so itself; for the others it is noted."""
        recent = self._guessed.get(slot)
        if recent is None:
            return
        present = _present(slot)
        self._change(chain, present, present << 1)
        self._change(recent.use(chain), 0, present)
        self._tidy()

    def ended(self, slot: int, chain: Sequence[BlockHash], start: int) -> None:
        """The prompt that promised the blocks from `start` on is over: what is not there by now will not come."""
        self._change(chain[start:], 0, _present(slot) << 1)

    def stored(self, slot: int, blocks: Sequence[BlockHash]) -> None:
        """Cache event."""
        self._change(blocks, _present(slot), 0)
        self._tidy()

    def removed(self, slot: int, blocks: Sequence[BlockHash]) -> None:
        """Cache event."""
        self._change(blocks, 0, _present(slot))

    def check_integrity(self) -> None:
        """Raises AssertionError where the books do not balance."""
        known = self._slots | self._retired
        assert not self._slots & self._retired, "a slot is both in use and retired"
        for entry in set(self._entries.values()):
            assert not entry & ~_USED & ~(known | known << 1), "an entry has bits of a slot nobody has"
        assert len(self._entries) <= self.max_blocks, "too many blocks"
        line = [block for batch in self._line for block in batch]
        assert len(line) == self._in_line, "the line of blocks to forget is miscounted"
        assert set(line) >= self._entries.keys(), "a block will never be forgotten"
        for slot, recent in self._guessed.items():
            held = {block for block, entry in self._entries.items() if entry & _present(slot)}
            assert held == set(recent.blocks), "a guess and its entries differ"

    def _change(self, blocks: Sequence[BlockHash], on: int, off: int) -> None:
        """Sets the bits `on` and clears the bits `off`; an entry with nothing but `_USED` left is dropped. A run of
        equal entries is changed by one call. `on` of only `_USED` makes no new entries."""
        if on & ~_USED and not on & (self._slots | self._slots << 1):
            return
        self._asked = None
        entries, position = self._entries, 0
        for entry, run in groupby(map(entries.get, blocks)):
            start, position = position, position + len(list(run))
            if entry is None and not on & ~_USED:
                continue
            old = entry or 0
            new = (old | on) & ~off
            if new == old:
                continue
            alike = blocks[start:position]
            if new & ~_USED:
                entries.update(zip(alike, repeat(self._share(new)), strict=False))
                if entry is None:
                    self._queue(alike)
            else:
                for block in alike:
                    entries.pop(block, None)

    def _share(self, entry: int) -> int:
        if len(self._shared) > _MAX_SHARED:
            self._shared.clear()
        return self._shared.setdefault(entry, entry)

    def _tidy(self) -> None:
        if len(self._entries) > self.max_blocks:
            self._forget()
        if self._retired:
            self._wipe()

    def _forget(self) -> None:
        """Second chance (Corbató 1968): oldest first, but what was used again goes to the end of the line once. Only so
        many at a time, so that no decision walks the whole line."""
        entries, spared = self._entries, 0
        while len(entries) > self.max_blocks:
            batch = self._line.popleft()
            self._in_line -= len(batch)
            kept = []
            for block in batch:
                entry = entries.get(block, 0)
                if entry & _USED and spared < _SPARED:
                    spared += 1
                    entries[block] = self._share(entry ^ _USED)
                    kept.append(block)
                elif entry:
                    del entries[block]
                    for slot, recent in self._guessed.items():
                        if entry & _present(slot):
                            recent.blocks.pop(block, None)
            self._queue(kept)

    def _queue(self, blocks: Sequence[BlockHash]) -> None:
        """The line of blocks to forget. One that was removed and stored again stands in it twice, and then goes early;
        the line is made anew before such blocks make it long."""
        # As tuples: of those the garbage collector soon sees that there is nothing in them for it.
        self._line.extend(tuple(blocks[start : start + _BATCH]) for start in range(0, len(blocks), _BATCH))
        self._in_line += len(blocks)
        if self._in_line > len(self._entries) + self.max_blocks:
            self._line.clear()
            self._in_line = 0
            self._queue(list(self._entries))

    def _wipe(self) -> None:
        """A bounded part of taking the bits of retired slots out of all entries. Only the first part, which lists the
        blocks, takes longer: some 10 ms for a million, once per lost worker."""
        bits, blocks = self._wiping
        if not bits:
            bits, blocks = self._retired, list(self._entries)
        last, blocks[-_WIPED:] = blocks[-_WIPED:], []
        self._change(last, 0, bits | bits << 1)
        if not blocks:
            self._retired &= ~bits
            bits = 0
        self._wiping = bits, blocks


class _Recent:
    """The blocks that a worker without events probably keeps: those used last, of a prompt the first longest."""

    __slots__ = ("blocks", "capacity")

    def __init__(self, capacity: int) -> None:
        self.capacity = capacity
        self.blocks: OrderedDict[BlockHash, None] = OrderedDict()

    def use(self, chain: Sequence[BlockHash]) -> list[BlockHash]:
        """Returns what left."""
        blocks = self.blocks
        blocks.update(dict.fromkeys(chain))
        deque(map(blocks.move_to_end, reversed(chain)), maxlen=0)  # in C: chains have a thousand blocks
        return [blocks.popitem(last=False)[0] for _ in range(len(blocks) - self.capacity)]


def _present(slot: int) -> int:
    return 2 << 2 * slot


def _slot(bit: int) -> int:
    return bit.bit_length() // 2 - 1


def _bits(mask: int) -> Iterator[int]:
    while mask:
        bit = mask & -mask
        mask ^= bit
        yield bit


def _note(found: list[Match], bit: int, present: int, covered: int) -> None:
    found.append((_slot(bit), present, covered - present))
