"""Memory that comes from another process is mapped only if it is what was announced, and cannot shrink."""

from __future__ import annotations

import os
from collections.abc import Callable

import pytest

from tandem.wire.header import ProtocolError
from tandem.wire.shared_memory import SharedMemory, share

SIZE = 16384


def test_what_one_writes_the_other_reads() -> None:
    memory, view = share("test", SIZE)
    other = SharedMemory(os.dup(memory.descriptor), SIZE).map()
    view[:5] = b"hello"
    assert bytes(other[:5]) == b"hello"
    memory.close()


def test_the_size_cannot_change_once_shared() -> None:
    memory, _ = share("test", SIZE)
    for size in (0, 2 * SIZE):
        with pytest.raises(PermissionError):
            os.ftruncate(memory.descriptor, size)
    memory.close()


def test_memory_that_could_shrink_or_has_another_size_is_refused(open_descriptors: Callable[[], int]) -> None:
    before = open_descriptors()
    unsealed = os.memfd_create("unsealed", os.MFD_ALLOW_SEALING)
    os.ftruncate(unsealed, SIZE)
    with pytest.raises(ProtocolError, match="sealed"):
        SharedMemory(unsealed, SIZE).map()
    memory, _ = share("test", SIZE)
    for size in (SIZE // 2, 2 * SIZE):
        with pytest.raises(ProtocolError, match="announced"):
            SharedMemory(os.dup(memory.descriptor), size).map()
    read_end, write_end = os.pipe()
    os.close(write_end)
    with pytest.raises(ProtocolError, match="mapped"):
        SharedMemory(read_end, SIZE).map()
    memory.close()
    assert open_descriptors() == before
