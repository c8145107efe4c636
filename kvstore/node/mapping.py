"""Maps shared memory where huge pages can back it.

With pages of 4 KiB a copy of megabytes spends up to a third of its time on translating addresses, and every process
that maps the memory takes a fault for each of them. The system uses pages of 2 MiB only where address and offset in the
file are alike below 2 MiB, which `mmap.mmap` leaves to chance.
"""

from __future__ import annotations

import ctypes
import mmap
import os
import sys
import weakref

import numpy as np

HUGE_PAGE_BYTES = 2 << 20
_FIXED = 0x10
"""MAP_FIXED, which Python's `mmap` has no use for."""
_NO_ACCESS = 0
_FAILED = ctypes.c_void_p(-1).value


def map_shared(descriptor: int, size: int) -> memoryview:
    """Writable view of the first `size` bytes of a file, at a multiple of 2 MiB on Linux. Unmapped when the last slice
    of it is gone. Raises OSError."""
    if sys.platform != "linux":
        return memoryview(mmap.mmap(descriptor, size))
    libc = _libc()
    reserved_bytes = size + HUGE_PAGE_BYTES
    reserved = _map(libc, None, reserved_bytes, _NO_ACCESS, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS, -1)
    start = -(-reserved // HUGE_PAGE_BYTES) * HUGE_PAGE_BYTES
    end = start + -(-size // mmap.PAGESIZE) * mmap.PAGESIZE
    try:
        _map(libc, start, size, mmap.PROT_READ | mmap.PROT_WRITE, mmap.MAP_SHARED | _FIXED, descriptor)
    except OSError:
        libc.munmap(reserved, reserved_bytes)
        raise
    for spare, spare_end in ((reserved, start), (end, reserved + reserved_bytes)):
        if spare_end - spare >= mmap.PAGESIZE:
            libc.munmap(spare, spare_end - spare)
    owner = (ctypes.c_ubyte * size).from_address(start)
    weakref.finalize(owner, libc.munmap, start, size).atexit = False
    return np.frombuffer(memoryview(owner), np.uint8).data


def _libc() -> ctypes.CDLL:
    libc = ctypes.CDLL(None, use_errno=True)
    libc.mmap.restype = ctypes.c_void_p
    libc.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, *[ctypes.c_int] * 3, ctypes.c_long]
    libc.munmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t]
    return libc


def _map(libc: ctypes.CDLL, address: int | None, size: int, protection: int, flags: int, descriptor: int) -> int:
    found = libc.mmap(address, size, protection, flags, descriptor, 0)
    if found == _FAILED:
        number = ctypes.get_errno()
        raise OSError(number, f"{size} bytes cannot be mapped: {os.strerror(number)}")
    return int(found)
