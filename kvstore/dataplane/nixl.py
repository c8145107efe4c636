"""Reads other hosts' arenas over NIXL (https://github.com/ai-dynamo/nixl), whose UCX backend uses RDMA where there is a
network card for it, and TCP elsewhere.

NIXL cannot take a transfer back: after a time-out, and after some errors, bytes may still arrive, even once its handle
is released. So the buffers of such a transfer are lost to the caller, and their memory rests until nothing can arrive
any more. The library's bindings are used directly: its own `nixl_agent` has a progress thread that never sleeps.
"""

from __future__ import annotations

import contextlib
import ctypes
import importlib
import logging
import secrets
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from types import ModuleType

import numpy as np

from tandem.common.errors import ConfigError
from tandem.kvstore.dataplane.protocol import MAX_METADATA_BYTES, PATIENCE, AgentInfo
from tandem.kvstore.dataplane.windows import Outcome, Place, address_of

logger = logging.getLogger(__name__)

STALL_S = PATIENCE.stall_s
"""A transfer that takes longer has failed."""
PACKAGES = ("nixl_cu12", "nixl_cu13", "nixl")
PIECE_BYTES = 64 << 20
"""Bytes of one transfer, which may take `STALL_S`; an object that is larger is one by itself."""
RETRY_S = 30.0
"""A node that could not be read is read over its connection for so long."""
REST_S = 60.0
"""Memory rests for so long after a transfer has failed: parts of it may be under way still."""
CLOSE_S = 2.0
_IDLE_US = 10_000
"""The progress thread looks around so often when no event wakes it."""
_FIRST_PAUSE_S = 20e-6
_LONGEST_PAUSE_S = 500e-6

Keep = Callable[[int, int], Callable[[], None]]
"""Keeps the bytes of the own arena from the first offset to the second from being handed out again, until what it
returns is called."""


@dataclass(slots=True, eq=False)
class _Abandoned:
    """A transfer that timed out or failed, and what is kept for it."""

    handle: int
    window: NixlWindow
    kept: list[Callable[[], None]]
    over_at: float | None = None
    """When nothing can arrive any more. None: it runs, as far as is known."""


class NixlAgent:
    """This process's end. Thread-safe: one lock guards every call into the library; nobody waits while holding it."""

    def __init__(self, name: str) -> None:
        """Raises ConfigError where NIXL cannot be used."""
        self._nixl = load_library()
        self._lock = threading.Lock()
        self._windows: dict[str, NixlWindow] = {}
        self._abandoned: list[_Abandoned] = []
        self.info: AgentInfo | None = None
        """What other nodes need to read here; None before `register` and after `close`."""
        self._name = f"{name[:256]}-{secrets.token_hex(8)}"
        try:
            config = self._nixl.nixlAgentConfig()
            config.useProgThread, config.pthrDelay = True, _IDLE_US
            config.syncMode = self._nixl.NIXL_THREAD_SYNC_STRICT
            self._agent = self._nixl.nixlAgent(self._name, config)
            self._agent.createBackend("UCX", {})
        except Exception as error:
            raise ConfigError(f"kv_nixl: NIXL cannot be used here ({error!r}); unset kv_nixl") from error

    def register(self, arena: memoryview, keep: Keep) -> None:
        """Other nodes can read `arena` from now on, and this one can read into it. Call it once. Raises ConfigError."""
        address = address_of(arena)
        try:
            self._registered = self._nixl.nixlRegDList(self._nixl.DRAM_SEG, [(address, len(arena), 0, "")])
            self._agent.registerMem(self._registered, [])
            metadata = self._agent.getLocalMD()
        except Exception as error:
            raise ConfigError(
                f"kv_nixl: {len(arena)} bytes of host memory cannot be registered ({error!r}); raise `ulimit -l`, "
                "give less kv_host_bytes, or unset kv_nixl"
            ) from error
        if len(metadata) > MAX_METADATA_BYTES:
            raise ConfigError(f"kv_nixl: {len(metadata)} bytes of metadata; name fewer devices in UCX_NET_DEVICES")
        self._arena, self._keep = arena, keep
        self.info = AgentInfo(self._name, metadata, address, len(arena))
        logger.info("nodes of other hosts are read over NIXL where they have it; here it is %s", self._name)

    def open(self, info: AgentInfo) -> NixlWindow | None:
        """Opens a window to the node that says so of itself; its connections share one. None: there is no such way."""
        with self._lock:
            if self.info is None or not info.metadata or info.name == self._name:
                return None
            window = self._windows.get(info.name)
            if window is None:
                window = NixlWindow(self, info)
                if not self._load(window):
                    return None
                self._windows[info.name] = window
            window.users += 1
            return window

    def leave(self, window: NixlWindow) -> None:
        """One of those who opened it does not need it any more."""
        with self._lock:
            window.users -= 1
            self._end_if_unused(window)

    def close(self) -> None:
        """Reads fail from now on. Should one not end, the library and the arena stay in memory until the process
        ends."""
        with self._lock:
            if self.info is None:
                return
            self.info = None
        deadline = time.monotonic() + CLOSE_S
        while any(window.running for window in self._windows.values()) and time.monotonic() < deadline:
            self.sweep()
            time.sleep(_LONGEST_PAUSE_S)
        with self._lock:
            running = sum(window.running for window in self._windows.values())
            if running:
                logger.warning("%d reads over NIXL do not end: their memory stays", running)
                ctypes.pythonapi.Py_IncRef(ctypes.py_object(self))
                return
            for window in list(self._windows.values()):
                self._forget(window)
            with contextlib.suppress(Exception):
                self._agent.deregisterMem(self._registered, [])
            del self._agent, self._arena, self._keep

    def holds(self, view: memoryview) -> bool:
        """Whether it lies in the own arena: what comes from other nodes can arrive nowhere else."""
        info = self.info
        return info is not None and 0 <= address_of(view) - info.address <= info.arena_bytes - len(view)

    def transfer(self, window: NixlWindow, places: Sequence[Place]) -> Outcome:
        """Copies all of `places`, and waits: one outcome for all."""
        sizes = [len(out) for _, out in places]
        theirs = self._descriptors([window.info.address + offset for offset, _ in places], sizes)
        ours = self._descriptors([address_of(out) for _, out in places], sizes)
        with self._lock:
            if self.info is None or not self._is_usable(window):
                return Outcome.NOT_BEGUN
            agent = self._agent
            try:
                handle = agent.createXferReq(self._nixl.NIXL_READ, ours, theirs, window.info.name, "", [])
            except Exception as error:
                window.fail(error)
                return Outcome.NOT_BEGUN
            window.running += 1
        deadline, pause_s = time.monotonic() + STALL_S, _FIRST_PAUSE_S
        try:
            runs = self._runs(agent.postXferReq, handle)
            while runs:
                time.sleep(pause_s)
                pause_s = min(2 * pause_s, _LONGEST_PAUSE_S)
                is_late = time.monotonic() >= deadline
                runs = self._runs(agent.getXferStatus, handle)
                if runs and is_late:
                    raise TimeoutError(f"no end after {STALL_S:g} s")
        except Exception as error:
            self._abandon(_Abandoned(handle, window, [self._keep_place(out) for _, out in places]), error)
            return Outcome.LOST
        with self._lock:
            self._end(handle, window)
        return Outcome.DONE

    def sweep(self) -> None:
        """Ends what was abandoned and is over by now."""
        if not self._abandoned:
            return
        with self._lock:
            for each in self._abandoned:
                if each.over_at is None:
                    try:
                        if self._agent.getXferStatus(each.handle) == self._nixl.NIXL_SUCCESS:
                            each.over_at = time.monotonic()
                    except Exception:
                        each.over_at = time.monotonic() + REST_S
            over = [each for each in self._abandoned if each.over_at is not None and each.over_at <= time.monotonic()]
            self._abandoned = [each for each in self._abandoned if each not in over]
            for each in over:
                self._end(each.handle, each.window)
        for each in over:
            for let_go in each.kept:
                let_go()

    def _abandon(self, abandoned: _Abandoned, error: Exception) -> None:
        with self._lock:
            abandoned.window.fail(error)
            self._abandoned.append(abandoned)

    def _keep_place(self, out: memoryview) -> Callable[[], None]:
        start = address_of(out) - address_of(self._arena)
        return self._keep(start, start + len(out))

    def _runs(self, ask: Callable[..., object], handle: int) -> bool:
        with self._lock:
            return bool(ask(handle) != self._nixl.NIXL_SUCCESS)

    def _descriptors(self, addresses: list[int], sizes: list[int]) -> object:
        table = np.array([addresses, sizes, [0] * len(sizes)], np.uint64).T.copy()
        return self._nixl.nixlXferDList(self._nixl.DRAM_SEG, table)

    # Under the lock

    def _is_usable(self, window: NixlWindow) -> bool:
        if window.retry_at is None:
            return True
        if window.running or time.monotonic() < window.retry_at:
            return False
        with contextlib.suppress(Exception):
            self._agent.invalidateRemoteMD(window.info.name)
        return self._load(window)

    def _load(self, window: NixlWindow) -> bool:
        try:
            name = self._agent.loadRemoteMD(window.info.metadata)
            if name != window.info.name.encode():
                raise ValueError(f"metadata of {name!r} from {window.info.name!r}")
        except Exception as error:
            window.fail(error)
            return False
        window.retry_at = None
        return True

    def _end(self, handle: int, window: NixlWindow) -> None:
        with contextlib.suppress(Exception):
            self._agent.releaseXferReq(handle)
        window.running -= 1
        self._end_if_unused(window)

    def _end_if_unused(self, window: NixlWindow) -> None:
        if not window.users and not window.running and self.info is not None:
            self._forget(window)

    def _forget(self, window: NixlWindow) -> None:
        del self._windows[window.info.name]
        with contextlib.suppress(Exception):
            self._agent.invalidateRemoteMD(window.info.name)


class NixlWindow:
    """`windows.Window` to one start of one node. The fields are the agent's."""

    def __init__(self, agent: NixlAgent, info: AgentInfo) -> None:
        self._agent = agent
        self.info = info
        self.users = 0
        self.running = 0
        """Transfers that may still write, abandoned ones too."""
        self.retry_at: float | None = None
        """None: it works, as far as is known."""

    @property
    def capacity_bytes(self) -> int:
        return self.info.arena_bytes

    def read(self, places: Sequence[Place]) -> list[Outcome]:
        """Copies what lies in this arena, a piece at a time; ends at the first piece that fails."""
        self._agent.sweep()
        outcomes = [Outcome.NOT_BEGUN] * len(places)
        todo = [index for index, (_, out) in enumerate(places) if self._agent.holds(out)]
        while todo:
            size = count = 0
            while count < len(todo) and (not count or size + len(places[todo[count]][1]) <= PIECE_BYTES):
                size += len(places[todo[count]][1])
                count += 1
            piece, todo = todo[:count], todo[count:]
            outcome = self._agent.transfer(self, [places[index] for index in piece])
            for index in piece:
                outcomes[index] = outcome
            if outcome is not Outcome.DONE:
                break
        return outcomes

    def close(self) -> None:
        self._agent.leave(self)

    def fail(self, error: Exception) -> None:
        logger.warning("%s cannot be read over NIXL for %g s: %r", self.info.name, RETRY_S, error)
        self.retry_at = time.monotonic() + RETRY_S


def load_library() -> ModuleType:
    """NIXL's bindings. Raises ConfigError where it is not installed."""
    failures = []
    with contextlib.suppress(OSError):
        # The system's driver for EFA cards brings this library into the process. If NIXL's own copy is there first, the
        # two become entangled, and the process dies of it when it exits.
        ctypes.CDLL("libnl-route-3.so.200")
    for package in PACKAGES:
        try:
            return importlib.import_module(f"{package}._bindings")
        except ImportError as error:
            failures.append(str(error))
    raise ConfigError(f'kv_nixl needs NIXL ({"; ".join(failures)}); pip install "tandem-llm[nixl]"')
