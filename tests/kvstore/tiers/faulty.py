"""A tier that misbehaves on demand, for everybody's tests.

tier = FaultyTier(DiskTier(...))
tier.fail("read", times=2)        # the next two reads return False
tier.fail("put")                  # every put, until `heal`
tier.full = True                  # puts find no room
tier.delay_s = 0.05               # every operation takes longer
tier.hold.clear()                 # reads and puts wait until hold.set() (at most HOLD_S)
tier.flip = True                  # reads succeed with one bit wrong
tier.truncate = True              # reads succeed, but the second half is zeros: what a torn write leaves
tier.chance = 0.1                 # any operation may fail, by the seed
tier.injected["read"]             # how often something was done to an operation
"""

from __future__ import annotations

import random
import threading
import time
from collections import Counter
from collections.abc import Iterator

from tandem.kvstore.interfaces import ObjectInfo, ObjectKey, Tier, TierName

HOLD_S = 60.0


class FaultyTier:
    def __init__(self, tier: Tier, seed: int = 0) -> None:
        self.tier = tier
        self.delay_s = 0.0
        self.chance = 0.0
        self.full = False
        self.flip = False
        self.truncate = False
        self.hold = threading.Event()
        self.hold.set()
        self.calls: Counter[str] = Counter()
        self.injected: Counter[str] = Counter()
        self._failing: dict[str, int | None] = {}
        self._random = random.Random(seed)
        self._lock = threading.Lock()

    def fail(self, operation: str, times: int | None = None) -> None:
        """`operation`: put, info, read, delete or objects. times None: until `heal`."""
        self._failing[operation] = times

    def heal(self) -> None:
        self._failing.clear()
        self.delay_s = self.chance = 0.0
        self.full = self.flip = self.truncate = False
        self.hold.set()

    @property
    def name(self) -> TierName:
        return self.tier.name

    @property
    def capacity_bytes(self) -> int:
        return self.tier.capacity_bytes

    @property
    def used_bytes(self) -> int:
        return self.tier.used_bytes

    def put(self, key: ObjectKey, info: ObjectInfo, content: memoryview) -> bool:
        if self._fails("put") or self._injects("put", self.full):
            return False
        return self.tier.put(key, info, content)

    def info(self, key: ObjectKey) -> ObjectInfo | None:
        return None if self._fails("info") else self.tier.info(key)

    def read(self, key: ObjectKey, offset: int, out: memoryview) -> bool:
        if self._fails("read"):
            return False
        if not self.tier.read(key, offset, out):
            return False
        if out.nbytes and self._injects("read", self.truncate):
            half = out.nbytes // 2
            out[half:] = bytes(out.nbytes - half)
        if out.nbytes and self._injects("read", self.flip):
            out[self._random.randrange(out.nbytes)] ^= 1 << self._random.randrange(8)
        return True

    def delete(self, key: ObjectKey) -> bool:
        return False if self._fails("delete") else self.tier.delete(key)

    def objects(self) -> Iterator[tuple[ObjectKey, ObjectInfo]]:
        return iter(()) if self._fails("objects") else self.tier.objects()

    def check_integrity(self) -> None:
        self.tier.check_integrity()

    def close(self) -> None:
        self.hold.set()
        self.tier.close()

    def _injects(self, operation: str, on: bool) -> bool:
        if on:
            with self._lock:
                self.injected[operation] += 1
        return on

    def _fails(self, operation: str) -> bool:
        if operation in ("put", "read"):
            self.hold.wait(HOLD_S)
        if self.delay_s:
            time.sleep(self.delay_s)
        with self._lock:
            self.calls[operation] += 1
            fails = self.chance > 0 and self._random.random() < self.chance
            left = self._failing.get(operation, 0)
            if left is None:
                fails = True
            elif left > 0:
                self._failing[operation] = left - 1
                fails = True
            self.injected[operation] += fails
        return fails
