"""Which worker holds which leading blocks of a prompt, and which will hold them soon.

Told by the workers' cache events, where a worker sends them, and else by the router's own decisions. Decisions in
flight count at once, as promised: a herd of equal prompts sees where its first one went.

Each worker has a slot. A block's entry is one integer with two bits per slot (present, promised), so that one look-up
answers for all workers. Blocks that came with the prompt they are of are kept as runs with one entry for all of them,
so that a prompt takes a step per run and not per block; a run is cut where its blocks begin to differ. Cache events
name blocks without what is before them: those have entries of their own (equal integers are shared) until a prompt
shows that they are neighbours.

Retiring a slot takes its bits out of a mask: they mean nothing from then on, and are wiped little by little before the
slot is used again.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from itertools import compress, count, groupby

from tandem.kvstore.identity import BlockHash
from tandem.router.placing.prefix_runs import Recent, Run

MAX_BLOCKS = 4_000_000
"""About 130 MB per million (docs/placement.md). What does not fit is forgotten and so counts as not cached."""
_WIPED = 500
"""Blocks that each change looks at while bits of retired slots are left, or forgets while the index shrinks."""
_BATCH = 128
"""Blocks with entries of their own that are looked at in one go when there are too many."""
_SPARED = 1024
"""Blocks that get a second chance in one go, and a run more."""
_MAX_SHARED = 4096
_USED = 1
"""Lowest bit of an entry: a later prompt had the block, since it was last considered for being forgotten."""

Match = tuple[int, int, int]
"""Slot, leading blocks present, promised blocks right after them."""


class PrefixIndex:
    """Used from one thread. A slot is a small number that is valid from `add` until `retire`."""

    def __init__(self, max_blocks: int = MAX_BLOCKS) -> None:
        self.max_blocks = max_blocks
        self.forgotten = 0
        self._shrinks_to = max_blocks
        self._entries: dict[BlockHash, int | Run] = {}
        self._shared: dict[int, int] = {}
        self._line: deque[tuple[BlockHash, ...] | Run] = deque()
        """Entries in the order in which they are considered for being forgotten. May have runs without blocks, too."""
        self._in_line = 0
        """Runs count once."""
        self._slots = 0
        """The present bits of all slots in use."""
        self._retired = 0
        """Present bits of slots that may not be used again yet."""
        self._wiping: tuple[int, list[BlockHash]] = 0, []
        """Which slots are being wiped out of which blocks."""
        self._guessed: dict[int, Recent] = {}
        """Slots without events."""
        self._asked: Sequence[BlockHash] | None = None
        self._answer: list[Match] = []
        """Answer to the latest `match`, while nothing changes."""

    def __len__(self) -> int:
        return len(self._entries)

    def resize(self, max_blocks: int) -> None:
        """More are kept from now on, or fewer: what is too much is forgotten with the changes to come."""
        self._shrinks_to = max_blocks
        self.max_blocks = max(self.max_blocks, max_blocks)

    def add(self, capacity: int | None) -> int:
        """A slot for a worker that sends events (None), or else is believed to keep the last `capacity` blocks."""
        bit = 2
        while bit & (self._slots | self._retired):
            bit <<= 2
        self._slots |= bit
        slot = _slot(bit)
        if capacity is not None:
            self._guessed[slot] = Recent(min(capacity, self.max_blocks))
        return slot

    def retire(self, slot: int) -> None:
        """Forgets everything known of a worker, at once."""
        bit = _present(slot) & self._slots
        self._asked = None
        self._slots ^= bit
        self._retired |= bit
        self._guessed.pop(slot, None)

    def renew(self, slot: int) -> int:
        """Gives a worker that begins to list its cache anew another slot, which holds nothing."""
        self.retire(slot)
        return self.add(None)

    def match(self, chain: Sequence[BlockHash]) -> list[Match]:
        """The workers that hold, or will hold, the first block of `chain`, and how much of it each does.

        Asked for the same list again before anything has changed, as admission and placement do, it just repeats."""
        if chain is not self._asked:
            self._asked, self._answer = chain, self._match(chain)
        return self._answer

    def _match(self, chain: Sequence[BlockHash]) -> list[Match]:
        found: list[Match] = []
        covered = present = self._slots
        present_until: dict[int, int] = {}
        until = 0
        for value, start, end in self._pieces(chain, 0):
            entry = value.entry if isinstance(value, Run) else value
            if start:
                for bit in _bits(present & ~entry):
                    present_until[bit] = start
                for bit in _bits(covered & ~(entry | entry >> 1)):
                    _note(found, bit, present_until.get(bit, 0), start)
            present &= entry
            covered &= entry | entry >> 1
            if not covered:
                return found
            until = end
        if until:
            for bit in _bits(covered):
                _note(found, bit, until if bit & present else present_until.get(bit, 0), until)
        return found

    def _pieces(
        self, chain: Sequence[BlockHash], depth: int, position: int = 0
    ) -> Iterator[tuple[int | Run, int, int]]:
        """What is known of parts of `chain`, whose first block has `depth`, from where to where: a run or a part of
        one, or neighbours with equal entries of their own. Begins at `position`, ends before the first unknown block.
        What was returned may be changed before the next is asked for."""
        get, end = self._entries.get, len(chain)
        while position < end and (value := get(chain[position])) is not None:
            start = position
            if isinstance(value, Run):
                position += value.common(chain, position, depth + position)
            else:
                position += 1
                while position < end and get(chain[position]) is value:
                    position += 1
            yield value, start, position

    def promise(self, slot: int, chain: Sequence[BlockHash], start: int) -> None:
        """A prompt was placed on `slot`, which will compute (or be sent) the blocks from `start` on."""
        self._mark(chain[:start], 0, _USED, 0)
        self._join(chain[:start])
        self._mark(chain[start:], start, _present(slot) << 1, 0)
        self._tidy()

    def computed(self, slot: int, chain: Sequence[BlockHash]) -> None:
        """The whole of `chain` is there now. A worker with events says so itself; for the others it is noted."""
        recent = self._guessed.get(slot)
        if recent is None:
            return
        present = _present(slot)
        self._mark(chain, 0, present, present << 1)
        for run in recent.use(chain):
            self._mark(run.blocks, run.start, 0, present)
        self._tidy()

    def ended(self, slot: int, chain: Sequence[BlockHash], start: int) -> None:
        """The prompt that promised the blocks from `start` on is over: what is not there by now will not come."""
        self._mark(chain[start:], start, 0, _present(slot) << 1)

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
        runs = [value for value in dict.fromkeys(self._entries.values()) if isinstance(value, Run)]
        for entry in {value.entry if isinstance(value, Run) else value for value in self._entries.values()}:
            assert not entry & ~_USED & ~(known | known << 1), "an entry has bits of a slot nobody has"
            assert entry & ~_USED, "an entry says nothing"
        for run in runs:
            assert run.blocks, "a run without blocks"
            assert all(self._entries.get(block) is run for block in run.blocks), "a run has blocks that are not its own"
        alone = {block for block, value in self._entries.items() if isinstance(value, int)}
        assert sum(len(run.blocks) for run in runs) + len(alone) == len(self._entries), "a block is in no run"
        assert len(self._entries) <= self.max_blocks, "too many blocks"
        batches = [item for item in self._line if not isinstance(item, Run)]
        line = [block for batch in batches for block in batch]
        assert len(line) + len(self._line) - len(batches) == self._in_line, "the line to forget is miscounted"
        assert set(line) >= alone, "a block will never be forgotten"
        assert {id(item) for item in self._line} >= {id(run) for run in runs}, "a run will never be forgotten"
        for slot, recent in self._guessed.items():
            recent.check_integrity()
            held = {block for block in self._entries if self._entry(block) & _present(slot)}
            assert held <= set(recent.blocks()), "an entry that no guess will ever clear"

    def _entry(self, block: BlockHash) -> int:
        value = self._entries.get(block, 0)
        return value.entry if isinstance(value, Run) else value

    def _mark(self, chain: Sequence[BlockHash], depth: int, on: int, off: int) -> None:
        """Sets the bits `on` and clears the bits `off` of neighbours, the first of which has `depth`. What has nothing
        but `_USED` left is dropped. `on` of only `_USED` makes no new entries."""
        if self._idle(on):
            return
        position = 0
        while position < len(chain):
            for value, start, end in self._pieces(chain, depth, position):
                self._mark_known(value, chain[start:end], depth + start, on, off)
                position = end
            gap = chain[position:]
            unknown = next(compress(count(), map(self._entries.__contains__, gap)), len(gap))  # in C
            if on & ~_USED and unknown:
                self._enter(Run(depth + position, list(gap[:unknown]), on))
            position += unknown

    def _mark_known(self, value: int | Run, blocks: Sequence[BlockHash], depth: int, on: int, off: int) -> None:
        if isinstance(value, Run):
            if (value.entry | on) & ~off != value.entry:
                self._set_part(value, depth - value.start, depth - value.start + len(blocks), on, off)
        elif ((value | on) & ~off) & ~_USED:
            self._enter(Run(depth, list(blocks), (value | on) & ~off))
        else:
            self._drop(blocks)

    def _join(self, chain: Sequence[BlockHash]) -> None:
        """Neighbours that do not differ any more become one run again: else a chain that is evicted block by block
        here and there would fall to pieces."""
        last: Run | None = None
        for value, start, end in self._pieces(chain, 0):
            if not isinstance(value, Run) or len(value.blocks) > end - start:
                return
            if last is None or last.entry != value.entry:
                last = value
                continue
            longer, shorter = (last, value) if len(last.blocks) >= len(value.blocks) else (value, last)
            self._entries.update(dict.fromkeys(shorter.blocks, longer))
            longer.start, longer.blocks = last.start, last.blocks + value.blocks
            shorter.blocks, shorter.entry = [], 0
            last = longer

    def _enter(self, run: Run) -> None:
        self._entries.update(dict.fromkeys(run.blocks, run))
        self._line.append(run)
        self._in_line += 1
        self._shorten()

    def _change(self, blocks: Sequence[BlockHash], on: int, off: int) -> None:
        """The same of any blocks."""
        if self._idle(on):
            return
        position = 0
        for value, alike_blocks in groupby(map(self._entries.get, blocks)):
            start, position = position, position + len(list(alike_blocks))
            alike = blocks[start:position]
            if isinstance(value, Run):
                if (value.entry | on) & ~off != value.entry:
                    self._set_some(value, set(alike), on, off)
                continue
            new = ((value or 0) | on) & ~off
            if not new & ~_USED:
                if value is not None:
                    self._drop(alike)
            elif new != value:
                self._entries.update(dict.fromkeys(alike, self._share(new)))
                if value is None:
                    self._queue(alike)

    def _idle(self, on: int) -> bool:
        """Whether only a slot that has been retired would be changed."""
        if on & ~_USED and not on & (self._slots | self._slots << 1):
            return True
        self._asked = None
        return False

    def _set_some(self, run: Run, blocks: set[BlockHash], on: int, off: int) -> None:
        position, parts = 0, []
        for inside, part in groupby(run.blocks, blocks.__contains__):
            start, position = position, position + len(list(part))
            if inside:
                parts.append((start, position))
        for low, high in reversed(parts):
            run = self._set_part(run, low, high, on, off)

    def _set_part(self, run: Run, low: int, high: int, on: int, off: int) -> Run:
        """The run's blocks from `low` to `high`, which differ from the rest of it from now on. Returns those before."""
        parts = run.cut(low, high) if high - low < len(run.blocks) else [run]
        for part in parts:
            if part is not run:
                self._enter(part)
        changed = parts[bool(low)]
        changed.entry = (changed.entry | on) & ~off
        if not changed.entry & ~_USED:
            self._drop_run(changed)
        return parts[0]

    def _drop_run(self, run: Run) -> None:
        self._drop(run.blocks)
        run.blocks, run.entry = [], 0

    def _drop(self, blocks: Iterable[BlockHash]) -> None:
        deque(map(self._entries.pop, blocks), maxlen=0)  # in C

    def _share(self, entry: int) -> int:
        if len(self._shared) > _MAX_SHARED:
            self._shared.clear()
        return self._shared.setdefault(entry, entry)

    def _tidy(self) -> None:
        if self._retired:
            self._wipe()
        elif self.max_blocks > self._shrinks_to:
            self.max_blocks = max(self._shrinks_to, min(self.max_blocks, len(self._entries)) - _WIPED)
        if len(self._entries) > self.max_blocks:
            self._forget()

    def _forget(self) -> None:
        """Second chance (Corbató 1968): oldest first, but what was used again goes to the end of the line once. Only so
        many at a time, so that no decision walks the whole line."""
        entries, spared = self._entries, 0
        self.forgotten += len(entries)
        while len(entries) > self.max_blocks:
            item = self._line.popleft()
            if isinstance(item, Run):
                self._in_line -= 1
                if item.entry & _USED and spared < _SPARED:
                    spared += len(item.blocks)
                    item.entry ^= _USED
                    self._line.append(item)
                    self._in_line += 1
                else:
                    self._drop_run(item)
                continue
            self._in_line -= len(item)
            kept = []
            for block in item:
                entry = entries.get(block)
                if not isinstance(entry, int):
                    continue
                if entry & _USED and spared < _SPARED:
                    spared += 1
                    entries[block] = self._share(entry ^ _USED)
                    kept.append(block)
                else:
                    del entries[block]
            self._queue(kept)
        self.forgotten -= len(entries)

    def _queue(self, blocks: Sequence[BlockHash]) -> None:
        """The line to forget. A block that was removed and stored again stands in it twice, and then goes early; the
        line is made anew before such blocks make it long."""
        # As tuples: of those the garbage collector soon sees that there is nothing in them for it.
        self._line.extend(tuple(blocks[start : start + _BATCH]) for start in range(0, len(blocks), _BATCH))
        self._in_line += len(blocks)
        self._shorten()

    def _shorten(self) -> None:
        if self._in_line > len(self._entries) + self.max_blocks:
            alone = [block for block, value in self._entries.items() if isinstance(value, int)]
            self._line = deque(value for value in dict.fromkeys(self._entries.values()) if isinstance(value, Run))
            self._in_line = len(self._line)
            self._queue(alone)

    def _wipe(self) -> None:
        """A bounded part of taking the bits of retired slots out of all entries. Only the first part, which lists the
        blocks, takes longer: some 10 ms for a million, once per lost worker."""
        bits, blocks = self._wiping
        if not bits:
            bits, blocks = self._retired, list(self._entries)
        last, blocks[-_WIPED:] = blocks[-_WIPED:], []
        for value in dict.fromkeys(map(self._entries.get, last)):
            if isinstance(value, Run):
                self._set_part(value, 0, len(value.blocks), 0, bits | bits << 1)
        self._change(last, 0, bits | bits << 1)
        if not blocks:
            self._retired &= ~bits
            bits = 0
        self._wiping = bits, blocks


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
