"""NIXL's bindings as `dataplane/nixl.py` uses them: agents of this process, which copy memory as a test tells them."""

from __future__ import annotations

import ctypes
import itertools
import threading
from dataclasses import dataclass, field
from typing import Any

import numpy as np


class NixlError(Exception):
    """As the real ones: no RuntimeError, no OSError."""


@dataclass
class Request:
    agent: FakeAgent
    remote: str
    pairs: list[tuple[int, int, int]]
    """Target, source, bytes."""
    state: str = "new"

    def copy(self, part: float = 1.0) -> None:
        for target, source, size in self.pairs:
            ctypes.memmove(target, source, int(size * part))


@dataclass
class Config:
    useProgThread: bool = False
    pthrDelay: int = 0
    syncMode: str = ""


class DescriptorList:
    def __init__(self, kind: str, table: Any) -> None:
        assert kind == FakeNixl.DRAM_SEG
        self.rows = [tuple(int(value) for value in row[:3]) for row in table]


class FakeNixl:
    """The module. `script` says what becomes of each posted transfer; when it is empty they end at once."""

    DRAM_SEG = "dram"
    NIXL_READ = "read"
    NIXL_SUCCESS = "success"
    NIXL_IN_PROG = "in progress"
    NIXL_THREAD_SYNC_STRICT = "strict"
    nixlAgentConfig = Config
    nixlXferDList = DescriptorList
    nixlRegDList = DescriptorList

    def __init__(self) -> None:
        self.script: list[str] = []
        """"slow": ends when it is asked about. "refused": cannot be made. "unposted": the post fails. "fails": when it
        is asked about, with half of the bytes there. "hangs": until `finish`."""
        self.agents: dict[str, FakeAgent] = {}
        self.requests: dict[int, Request] = {}
        """Not released so far."""
        self.transfers = 0
        self.numbers = itertools.count(1)
        self.lock = threading.Lock()

    def nixlAgent(self, name: str, config: Config) -> FakeAgent:
        assert config.useProgThread
        assert config.pthrDelay > 0
        self.agents[name] = FakeAgent(self, name)
        return self.agents[name]

    def finish(self) -> None:
        """What hangs ends, late: its bytes are written now."""
        for request in list(self.requests.values()):
            if request.state == "hangs":
                request.copy()
                request.state = "done"

    def kill(self, name: str) -> None:
        """That agent is gone, and no transfer from it succeeds."""
        del self.agents[name]


@dataclass
class FakeAgent:
    nixl: FakeNixl
    name: str
    memory: list[tuple[int, int]] = field(default_factory=list)
    remotes: set[str] = field(default_factory=set)

    def createBackend(self, name: str, options: dict[str, str]) -> int:
        assert name == "UCX"
        return 1

    def registerMem(self, descriptors: DescriptorList, backends: list[int]) -> None:
        self.memory += [(start, size) for start, size, _ in descriptors.rows]

    def deregisterMem(self, descriptors: DescriptorList, backends: list[int]) -> None:
        for start, size, _ in descriptors.rows:
            self.memory.remove((start, size))

    def getLocalMD(self) -> bytes:
        return b"fake:" + self.name.encode()

    def loadRemoteMD(self, metadata: bytes) -> bytes:
        head, _, name = metadata.partition(b":")
        if head != b"fake" or name.decode() not in self.nixl.agents:
            raise NixlError("NIXL_ERR_MISMATCH")
        self.remotes.add(name.decode())
        return name

    def invalidateRemoteMD(self, name: str) -> None:
        if any(each.remote == name and each.state == "hangs" for each in self.nixl.requests.values()):
            raise AssertionError("a connection is taken down while a transfer uses it")
        self.remotes.remove(name)

    def createXferReq(
        self, kind: str, ours: DescriptorList, theirs: DescriptorList, remote: str, message: str, backends: list[int]
    ) -> int:
        if remote not in self.remotes:
            raise NixlError("NIXL_ERR_NOT_FOUND")
        if self.nixl.script[:1] == ["refused"]:
            self.nixl.script.pop(0)
            raise NixlError("NIXL_ERR_BACKEND")
        other = self.nixl.agents.get(remote)
        pairs = []
        for (target, size, _), (source, expected, _) in zip(ours.rows, theirs.rows, strict=True):
            assert size == expected
            if not self._covers(target, size) or (other is not None and not other._covers(source, size)):
                raise NixlError("NIXL_ERR_NOT_FOUND")
            pairs.append((target, source, size))
        with self.nixl.lock:
            handle = next(self.nixl.numbers)
            self.nixl.requests[handle] = Request(self, remote, pairs)
        return handle

    def _covers(self, start: int, size: int) -> bool:
        return any(low <= start and start + size <= low + length for low, length in self.memory)

    def postXferReq(self, handle: int, message: str = "") -> str:
        request = self.nixl.requests[handle]
        if request.remote not in self.nixl.agents:
            request.state = "failed"
            raise NixlError("NIXL_ERR_REMOTE_DISCONNECT")
        self.nixl.transfers += 1
        request.state = self.nixl.script.pop(0) if self.nixl.script else "done"
        if request.state in ("unposted", "refused"):  # another thread took the one that this was made for
            request.state = "unposted"
            raise NixlError("NIXL_ERR_BACKEND")
        if request.state == "done":
            request.copy()
        return self.NIXL_STATE[request.state == "done"]

    NIXL_STATE = (FakeNixl.NIXL_IN_PROG, FakeNixl.NIXL_SUCCESS)

    def getXferStatus(self, handle: int) -> str:
        request = self.nixl.requests[handle]
        if request.state == "slow":
            request.copy()
            request.state = "done"
        if request.state == "fails":
            request.copy(0.5)
        if request.state in ("fails", "failed", "unposted"):
            raise NixlError("NIXL_ERR_REMOTE_DISCONNECT")
        return self.NIXL_STATE[request.state == "done"]

    def releaseXferReq(self, handle: int) -> None:
        if self.nixl.requests[handle].state == "hangs":
            raise AssertionError("a handle is released while its transfer may still write")
        del self.nixl.requests[handle]


def arena_of(num_bytes: int, fill: int) -> memoryview:
    return memoryview(np.full(num_bytes, fill, np.uint8))
