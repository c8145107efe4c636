"""A node whose fetches do what a test tells them; puts and views are real memory of a real arena."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from tandem.kvstore.interfaces import Located, ObjectInfo, ObjectKey, Refusal, TierName
from tandem.kvstore.node.arena import HostArena


def key(number: int) -> ObjectKey:
    return ObjectKey(number.to_bytes(32, "little"))


class ScriptedTicket:
    def __init__(self, node: ScriptedNode, key: ObjectKey, info: ObjectInfo, offset: int) -> None:
        self.node, self.key, self.info, self.offset = node, key, info, offset
        self.buffer = node.arena.view(offset, info.size)
        self.ending = ""

    def commit_as(self, key: ObjectKey, info: ObjectInfo) -> bool:
        if (info.size, info.owner) != (self.info.size, self.info.owner):
            raise ValueError("other memory")
        if key in self.node.objects:
            self.ending = "refused"
            return True
        self.key, self.info = key, info
        return self.commit()

    def commit(self) -> bool:
        if self.ending or self.node.lapsed:
            return False
        self.ending = "committed"
        self.node.objects[self.key] = (self.info, self.offset)
        return True

    def abort(self) -> None:
        self.ending = self.ending or "aborted"


class ScriptedFetch:
    def __init__(self, node: ScriptedNode, located: Sequence[Located]) -> None:
        self.node = node
        self.sources = [item for item in located if item.key in node.objects]
        self.layers = 0
        self.num_layers = 0
        self.failed = False
        self.closed = False
        self.complete = 0
        self.changed = threading.Condition()

    def set(self, layers: int = 0, complete: int = 0, failed: bool = False) -> None:
        with self.changed:
            self.layers, self.complete, self.failed = layers, complete, failed
            self.changed.notify_all()

    def finish(self) -> None:
        self.set(1 << 20, len(self.sources))

    def offset(self, index: int) -> int:
        return self.node.objects[self.sources[index].key][1]

    def wait(self, num_layers: int, timeout_s: float) -> bool:
        with self.changed:
            self.changed.wait_for(lambda: self.layers >= num_layers or self.failed or self.closed, timeout_s)
            return self.layers >= num_layers and not self.closed

    def intact(self) -> int:
        return self.complete

    def buffer(self, index: int) -> memoryview:
        info, offset = self.node.objects[self.sources[index].key]
        return self.node.arena.view(offset, info.size)

    def close(self) -> None:
        with self.changed:
            self.closed = True
            self.changed.notify_all()


class ScriptedNode:
    def __init__(self, capacity_bytes: int = 64 << 20) -> None:
        self.arena = HostArena(capacity_bytes)
        self.objects: dict[ObjectKey, tuple[ObjectInfo, int]] = {}
        self.on_disk: dict[ObjectKey, bytes] = {}
        self.tickets: list[ScriptedTicket] = []
        self.fetches: list[ScriptedFetch] = []
        self.quarantined: list[tuple[ObjectKey, str]] = []
        self.views = 0
        self.lapsed = False
        self.instant = True
        """Fetches are complete at once."""
        self.answers_here = False
        """What is in memory is located without waiting, and its fetch may begin with that."""
        self.look_up = threading.Event()
        """Cleared: `locate` waits."""
        self.look_up.set()

    def begin_put(self, key: ObjectKey, info: ObjectInfo) -> ScriptedTicket | Refusal:
        if key in self.objects:
            return Refusal.EXISTS
        offset = self.arena.allocate(info.size)
        if offset is None:
            return Refusal.NO_SPACE
        self.tickets.append(ScriptedTicket(self, key, info, offset))
        return self.tickets[-1]

    def store(self, key: ObjectKey, content: bytes) -> None:
        ticket = self.begin_put(key, ObjectInfo(size=len(content), num_tokens=1))
        assert isinstance(ticket, ScriptedTicket)
        ticket.buffer[:] = content
        assert ticket.commit()

    def content(self, key: ObjectKey) -> bytes:
        info, offset = self.objects[key]
        return bytes(self.arena.view(offset, info.size))

    def locate_here(self, keys: Sequence[ObjectKey]) -> list[Located] | None:
        located = self.locate(keys) if self.answers_here else []
        return located if len(located) == len(keys) else None

    def locate(self, keys: Sequence[ObjectKey]) -> list[Located]:
        assert self.look_up.wait(60)
        located = []
        for wanted in keys:
            if wanted not in self.objects:
                break
            located.append(Located(wanted, TierName.HOST, "host", self.objects[wanted][0].size))
        return located

    def fetch(self, located: Sequence[Located], overlap_s: float, lease_s: float | None) -> ScriptedFetch:
        assert lease_s is None
        fetch = ScriptedFetch(self, located)
        if self.instant:
            fetch.finish()
        self.fetches.append(fetch)
        return fetch

    def quarantine(self, key: ObjectKey, reason: str) -> None:
        self.quarantined.append((key, reason))

    @contextmanager
    def view(self, key: ObjectKey) -> Iterator[memoryview | None]:
        if key not in self.objects:
            yield None
            return
        self.views += 1
        try:
            info, offset = self.objects[key]
            yield self.arena.view(offset, info.size).toreadonly()
        finally:
            self.views -= 1

    def read_range(self, key: ObjectKey, offset: int, out: memoryview) -> bool:
        content = self.on_disk.get(key, b"")[offset : offset + len(out)]
        if len(content) < len(out):
            return False
        out[:] = content
        return True

    def close(self) -> None:
        self.arena.close()
