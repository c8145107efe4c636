"""Takes the pages of the arena from the system before anybody needs them.

The first write to a page of shared memory costs a fault in each process that maps it, and the first of all also clears
the page: several times what the copy takes. Here it is done ahead, in the background, for as much as is likely to be
used next, and in huge pages where the kernel has them to give: a tenth of the work, and faster copies afterwards. Never
more than `AHEAD_BYTES` and a huge page beyond what has been used, so that a store of which little is used stays small.
"""

from __future__ import annotations

import ctypes
import errno
import mmap
import sys

from tandem.wire.shared_memory import HUGE_PAGE_BYTES

AHEAD_BYTES = 64 << 20
AHEAD_SHARE = 8
"""An eighth of the arena at the most."""
STEP_BYTES = 2 * HUGE_PAGE_BYTES
"""Asked for at a time: some milliseconds."""
_POPULATE_WRITE = 23
"""MADV_POPULATE_WRITE, of Linux 5.14 on; Python's `mmap` has no name for it, and would keep the interpreter's lock."""
COLLAPSE = 25
"""MADVCOLLAPSE, of Linux 6.1 on: makes huge pages of what is there and of what is not, also where shared memory
has none by default."""
_BUSY = (errno.EAGAIN, errno.EBUSY)


class PageWarmer:
    """The pages of one mapping. `used_up_to` may be told by any thread, `warm` is for one."""

    def __init__(self, memory: memoryview) -> None:
        """`memory` is the whole mapping. It stays mapped while this object lives."""
        self._memory = memory
        self._address = ctypes.addressof(ctypes.c_char.from_buffer(memory))
        self._ahead = min(AHEAD_BYTES, len(memory) // AHEAD_SHARE)
        self._used = 0
        self.warmed = 0
        """Leading bytes whose pages are there."""
        self._madvise = ctypes.CDLL(None, use_errno=True).madvise if sys.platform == "linux" else None
        self.huge = self._address % HUGE_PAGE_BYTES == 0
        """Huge pages are asked for; not any more once the kernel has refused."""

    def used_up_to(self, end: int) -> None:
        """Somebody got memory below `end`. The arena hands out what lies low first."""
        if end > self._used:
            self._used = end

    def warm(self) -> bool:
        """One step. False: there is nothing to do now."""
        left = len(self._memory) - self.warmed
        page = HUGE_PAGE_BYTES if self.huge and left >= HUGE_PAGE_BYTES else mmap.PAGESIZE
        wanted = min(self._used + self._ahead, len(self._memory)) - self.warmed
        wanted = min(-(-wanted // page), left // page) * page
        if self._madvise is None or wanted <= 0:
            return False
        length = min(STEP_BYTES, wanted)
        done = page == HUGE_PAGE_BYTES and self._make_huge(length)
        if not done and self._advise(self.warmed, length, _POPULATE_WRITE):
            self._madvise = None  # an older kernel, or memory is short: pages come when they are written, as ever
            return False
        self.warmed += length
        return True

    def _make_huge(self, length: int) -> bool:
        """False: not this time, or never."""
        for offset in range(self.warmed, self.warmed + length, HUGE_PAGE_BYTES):  # of nothing it makes none
            if self._advise(offset, mmap.PAGESIZE, _POPULATE_WRITE):
                return False
        failure = self._advise(self.warmed, length, COLLAPSE)
        if failure and failure not in _BUSY:
            self.huge = False
        return not failure

    def _advise(self, offset: int, length: int, advice: int) -> int:
        """0, or the number of the error."""
        assert self._madvise is not None
        if self._madvise(ctypes.c_void_p(self._address + offset), ctypes.c_size_t(length), advice):
            return ctypes.get_errno()
        return 0
