"""A store node in memory that does what a test tells it to: late, lossy, lying or broken."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence

from tandem.kvstore.bundle import layer_ranges
from tandem.kvstore.interfaces import Located, ObjectInfo, ObjectKey, PutTicket, Refusal, TierName


class ScriptedHome:
    """A `HomeNode`. All knobs may be turned at any time."""

    def __init__(self) -> None:
        self.objects: dict[ObjectKey, tuple[ObjectInfo, bytes]] = {}
        self.tier_of: Callable[[int], TierName] = lambda index: TierName.HOST
        """Of the object at this place of an answer."""
        self.layer_s = 0.0
        """Time between two layers of a fetch."""
        self.lost: tuple[int, int] | None = None
        """(object, layer) of each fetch that never come."""
        self.refusal: Refusal | None = None
        self.lapse = False
        """Every ticket lapses before its commit."""
        self.locate_may_answer = threading.Event()
        self.locate_may_answer.set()
        self.layers_may_come = threading.Event()
        """Clear: only `free_layers` come."""
        self.layers_may_come.set()
        self.free_layers = 0
        self.put_may_begin = threading.Event()
        self.put_may_begin.set()
        self.raises: set[str] = set()
        """Names of methods that raise."""
        self.locates = 0
        self.puts: list[tuple[ObjectKey, ObjectInfo]] = []
        self.fetches: list[ScriptedFetch] = []
        self.quarantined: list[tuple[ObjectKey, str]] = []
        self.commits = 0
        self._lock = threading.Lock()

    @property
    def open_fetches(self) -> int:
        return sum(1 for fetch in self.fetches if not fetch.closed)

    def begin_put(self, key: ObjectKey, info: ObjectInfo) -> PutTicket | Refusal:
        self.puts.append((key, info))
        self._fault("begin_put")
        assert self.put_may_begin.wait(60)
        if self.refusal is not None:
            return self.refusal
        with self._lock:
            if key in self.objects:
                return Refusal.EXISTS
        return ScriptedTicket(self, key, info)

    def locate(self, keys: Sequence[ObjectKey]) -> list[Located]:
        self.locates += 1
        self._fault("locate")
        assert self.locate_may_answer.wait(60)
        found: list[Located] = []
        for key in keys:
            entry = self.objects.get(key)
            if entry is None:
                break
            tier = self.tier_of(len(found))
            found.append(Located(key, tier, tier.value, entry[0].size))
        return found

    def fetch(self, located: Sequence[Located], overlap_s: float = 0.0) -> ScriptedFetch:
        self._fault("fetch")
        fetch = ScriptedFetch(self, located)
        self.fetches.append(fetch)
        return fetch

    def quarantine(self, key: ObjectKey, reason: str) -> None:
        self.quarantined.append((key, reason))
        self.objects.pop(key, None)

    def close(self) -> None:
        pass

    def change(self, key: ObjectKey, content: bytes) -> None:
        """Other bytes under the same key."""
        self.objects[key] = (self.objects[key][0], content)

    def flip(self, key: ObjectKey, layer: int) -> None:
        """One wrong bit in the middle of `layer`."""
        content = bytearray(self.objects[key][1])
        layout = layer_ranges(memoryview(content))
        assert layout is not None
        offset, length = layout.ranges[layer]
        content[offset + length // 2] ^= 0x10
        self.change(key, bytes(content))

    def _fault(self, name: str) -> None:
        if name in self.raises:
            raise RuntimeError(f"{name} is broken")


class ScriptedTicket:
    def __init__(self, home: ScriptedHome, key: ObjectKey, info: ObjectInfo) -> None:
        self.key = key
        self._home = home
        self._info = info
        self._content = bytearray(info.size)
        self.aborted = False

    @property
    def buffer(self) -> memoryview:
        return memoryview(self._content)

    def commit(self) -> bool:
        self._home._fault("commit")
        if self._home.lapse:
            return False
        self._home.objects[self.key] = (self._info, bytes(self._content))
        self._home.commits += 1
        return True

    def abort(self) -> None:
        self.aborted = True


class ScriptedFetch:
    """Its buffers are overwritten when it is closed, so that whoever reads on gets rubbish."""

    def __init__(self, home: ScriptedHome, located: Sequence[Located]) -> None:
        self.sources = list(located)
        self.closed = False
        self._home = home
        self._began = time.monotonic()
        self._layer_s, self.lost = home.layer_s, home.lost
        self._contents = [
            bytearray(home.objects[item.key][1]) if item.key in home.objects else None for item in located
        ]

    def wait(self, num_layers: int, timeout_s: float) -> bool:
        home, end = self._home, time.monotonic() + timeout_s
        home._fault("wait")
        while not self._misses(num_layers):
            if num_layers <= home.free_layers or home.layers_may_come.wait(min(0.01, timeout_s)):
                break
            if time.monotonic() >= end:
                return False
        if self._misses(num_layers):
            return False
        left = self._began + num_layers * self._layer_s - time.monotonic()
        if left > 0:
            time.sleep(min(left, max(end - time.monotonic(), 0.0)))
        return time.monotonic() >= self._began + num_layers * self._layer_s

    def _misses(self, num_layers: int) -> bool:
        return None in self._contents or (self.lost is not None and num_layers > self.lost[1])

    def intact(self) -> int:
        if not self._home.layers_may_come.is_set() or self._layer_s:
            return 0
        present = [content is not None for content in self._contents]
        count = present.index(False) if False in present else len(present)
        return count if self.lost is None else min(count, self.lost[0])

    def buffer(self, index: int) -> memoryview:
        content = self._contents[index]
        assert content is not None
        assert not self.closed
        return memoryview(content).toreadonly()

    def close(self) -> None:
        self.closed = True
        for content in self._contents:
            if content is not None:
                content[:] = b"\xff" * len(content)
