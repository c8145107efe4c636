"""Takes the pages of the arena from the system before anybody needs them.

The first write to a page of shared memory costs a fault in each process that maps it, and the first of all also clears
the page: several times what the copy takes. Here it is done ahead, in the background, for as much as is likely to be
used next. Never more than `AHEAD_BYTES` beyond what has been used, so that a store of which little is used stays small.
"""

from __future__ import annotations

import ctypes
import mmap
import sys

AHEAD_BYTES = 64 << 20
AHEAD_SHARE = 8
"""At most an eighth of the arena."""
STEP_BYTES = 4 << 20
"""Asked for at a time: some milliseconds."""
_POPULATE_WRITE = 23
"""MADV_POPULATE_WRITE, of Linux 5.14 on; Python's `mmap` has no name for it, and would keep the interpreter's lock."""


class PageWarmer:
    """Of one mapping. `used_up_to` may be told by any thread, `warm` is for one."""

    def __init__(self, memory: memoryview) -> None:
        """`memory` is the whole mapping. It stays mapped while this object lives."""
        self._memory = memory
        self._address = ctypes.addressof(ctypes.c_char.from_buffer(memory))
        self._ahead = min(AHEAD_BYTES, len(memory) // AHEAD_SHARE)
        self._used = 0
        self.warmed = 0
        """Leading bytes whose pages are there."""
        self._advise = ctypes.CDLL(None).madvise if sys.platform == "linux" else None

    def used_up_to(self, end: int) -> None:
        """Somebody got memory below `end`. The arena hands out what lies low first."""
        if end > self._used:
            self._used = end

    def warm(self) -> bool:
        """One step. False: there is nothing to do now."""
        wanted = min(self._used + self._ahead, len(self._memory)) // mmap.PAGESIZE * mmap.PAGESIZE
        if self._advise is None or self.warmed >= wanted:
            return False
        length = min(STEP_BYTES, wanted - self.warmed)
        start = ctypes.c_void_p(self._address + self.warmed)
        if self._advise(start, ctypes.c_size_t(length), _POPULATE_WRITE):
            self._advise = None  # an older kernel, or memory is short: pages come when they are written, as ever
            return False
        self.warmed += length
        return True
