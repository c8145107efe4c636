"""One file read and written in large pieces, past the page cache where the file system can.

Objects in the page cache would be a second copy of what the host tier holds, and writing through it costs more than
the write. O_DIRECT wants positions, lengths and memory in multiples of a page; what is not goes through a small
aligned buffer. Whoever writes does so alone and in page-sized pieces; any number of threads may read meanwhile.
"""

from __future__ import annotations

import ctypes
import errno
import mmap
import os
import queue
from pathlib import Path

from tandem.kvstore.tiers.records import PAGE, STATE_OFFSET

STAGING_BYTES = 1 << 20
READ_BUFFERS = 8
"""Threads that can read through aligned buffers at a time; further ones wait."""


def takes_direct_io(directory: Path) -> bool:
    """Tries it: some file systems refuse the flag, others the first write. Raises OSError if no file can be made."""
    path = directory / "probe"
    try:
        fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_DIRECT, 0o600)
        try:
            with mmap.mmap(-1, PAGE) as page:
                return os.pwrite(fd, page, 0) == PAGE and os.preadv(fd, [page], 0) == PAGE
        finally:
            os.close(fd)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.EOPNOTSUPP):
            raise
        return False
    finally:
        path.unlink(missing_ok=True)


class Staging:
    """Aligned buffers, mapped when first needed."""

    def __init__(self) -> None:
        self.write = mmap.mmap(-1, STAGING_BYTES)
        self._reads: queue.LifoQueue[mmap.mmap | None] = queue.LifoQueue()
        for _ in range(READ_BUFFERS):
            self._reads.put(None)

    def take(self) -> mmap.mmap:
        return self._reads.get() or mmap.mmap(-1, STAGING_BYTES)

    def give_back(self, buffer: mmap.mmap) -> None:
        self._reads.put(buffer)


class BlockFile:
    """Methods raise OSError."""

    def __init__(self, path: Path, staging: Staging, direct: bool, *, create: bool = False) -> None:
        self.path = path
        self._staging = staging
        flags = os.O_RDWR | os.O_CLOEXEC | (os.O_CREAT | os.O_EXCL if create else 0)
        self._plain = os.open(path, flags, 0o600)
        self._direct = -1
        try:
            os.posix_fadvise(self._plain, 0, 0, os.POSIX_FADV_RANDOM)
            if direct:
                self._direct = os.open(path, os.O_RDWR | os.O_CLOEXEC | os.O_DIRECT)
        except OSError:
            os.close(self._plain)
            raise

    def size(self) -> int:
        return os.fstat(self._plain).st_size

    def truncate(self, size: int) -> None:
        os.ftruncate(self._plain, size)

    def read_page(self, position: int) -> bytes:
        return os.pread(self._plain, PAGE, position)

    def set_state(self, position: int, state: bytes) -> None:
        os.pwrite(self._plain, state, position + STATE_OFFSET)

    def write_record(self, position: int, page: bytes, content: memoryview) -> None:
        """The header page, the content and zeros up to the next page, in ascending order: a file that is too short
        for a record betrays a writer that died."""
        buffer = memoryview(self._staging.write)
        buffer[:PAGE] = page
        filled, taken = PAGE, 0
        while True:
            count = min(STAGING_BYTES - filled, content.nbytes - taken)
            buffer[filled : filled + count] = content[taken : taken + count]
            filled, taken = filled + count, taken + count
            end = -(-filled // PAGE) * PAGE
            buffer[filled:end] = bytes(end - filled)
            self._write(position, buffer[:end])
            if taken == content.nbytes:
                return
            position, filled = position + end, 0

    def read(self, position: int, out: memoryview) -> None:
        """Fills `out`. Raises OSError, too, if the file ends before."""
        if self._direct < 0:
            _read_exactly(self._plain, position, out)
        elif position % PAGE == 0 and out.nbytes % PAGE == 0 and _address(out) % PAGE == 0:
            _read_exactly(self._direct, position, out)
        else:
            self._read_staged(position, out)

    def close(self) -> None:
        os.close(self._plain)
        if self._direct >= 0:
            os.close(self._direct)

    def _write(self, position: int, pages: memoryview) -> None:
        fd = self._direct if self._direct >= 0 else self._plain
        done = 0
        while done < pages.nbytes:
            count = os.pwrite(fd, pages[done:], position + done)
            if count % PAGE or count == 0:
                raise OSError(errno.ENOSPC, "short write", str(self.path))
            done += count

    def _read_staged(self, position: int, out: memoryview) -> None:
        buffer = self._staging.take()
        try:
            view, done = memoryview(buffer), 0
            while done < out.nbytes:
                skip = (position + done) % PAGE
                count = min(STAGING_BYTES - skip, out.nbytes - done)
                pages = -(-(skip + count) // PAGE) * PAGE
                _read_exactly(self._direct, position + done - skip, view[:pages])
                out[done : done + count] = view[skip : skip + count]
                done += count
        finally:
            self._staging.give_back(buffer)


def _read_exactly(fd: int, position: int, out: memoryview) -> None:
    done = 0
    while done < out.nbytes:
        count = os.preadv(fd, [out[done:]], position + done)
        if count == 0:
            raise OSError(errno.EIO, "the file ends within a record")
        done += count


def _address(buffer: memoryview) -> int:
    return ctypes.addressof(ctypes.c_char.from_buffer(buffer))
