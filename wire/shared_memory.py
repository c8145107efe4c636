"""Memory that two processes share: one makes it and seals its size, and the other maps what it gets by descriptor.

A sealed file cannot shrink, so who maps it cannot be killed by SIGBUS. It is mapped where huge pages can back it: with
pages of 4 KiB a copy of megabytes spends up to a third of its time on translating addresses, and every process
that maps the memory takes a fault for each of them. The system uses pages of 2 MiB only where address and offset in the
file are alike below 2 MiB, which `mmap.mmap` leaves to chance.
"""

from __future__ import annotations

import ctypes
import fcntl
import mmap
import os
import sys
import weakref
from typing import NamedTuple

import numpy as np

from tandem.wire.header import ProtocolError

HUGE_PAGE_BYTES = 2 << 20
_FIXED = 0x10
"""MAP_FIXED, which Python's `mmap` has no use for."""
_NO_ACCESS = 0
_FAILED = ctypes.c_void_p(-1).value


class SharedMemory(NamedTuple):
    """A sealed file in memory. Whoever has it owns the descriptor."""

    descriptor: int
    size: int

    def close(self) -> None:
        os.close(self.descriptor)

    def map(self) -> memoryview:
        """All of it, writable; closes the descriptor. Raises ProtocolError when it is not of the size that the other
        side announced, or could shrink."""
        descriptor, size = self
        try:
            if not fcntl.fcntl(descriptor, fcntl.F_GET_SEALS) & fcntl.F_SEAL_SHRINK:
                raise ProtocolError("the shared memory is not sealed against shrinking")
            if (found := os.fstat(descriptor).st_size) != size:
                raise ProtocolError(f"the shared memory has {found} bytes, {size} were announced")
            return map_shared(descriptor, size)
        except OSError as error:
            raise ProtocolError(f"the shared memory cannot be mapped: {error}") from error
        finally:
            self.close()


def can_share() -> bool:
    """Whether the system has sealed files in memory."""
    return hasattr(os, "memfd_create")


def share(name: str, size: int) -> tuple[SharedMemory, memoryview]:
    """New memory of `size` bytes, and a writable view of it; `name` is for the system's lists. Raises OSError."""
    descriptor = os.memfd_create(name, os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    try:
        os.ftruncate(descriptor, size)
        fcntl.fcntl(descriptor, fcntl.F_ADD_SEALS, fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SEAL)
        return SharedMemory(descriptor, size), map_shared(descriptor, size)
    except BaseException:
        os.close(descriptor)
        raise


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
