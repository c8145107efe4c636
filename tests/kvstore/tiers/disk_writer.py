"""Child process of `test_disk_crashes`: puts and deletes until it is killed, and says what was promised.

Line `P n` after put n returned True, `D n` before key n is deleted. Run: DIRECTORY CAPACITY SEED.
"""

from __future__ import annotations

import random
import sys

from tandem.kvstore.interfaces import ObjectInfo, ObjectKey
from tandem.kvstore.tiers.disk import DiskTier


def key_of(number: int) -> ObjectKey:
    return ObjectKey(number.to_bytes(32, "little"))


def content_of(number: int) -> bytes:
    choose = random.Random(number)
    return choose.randbytes(choose.choice([100, 5000, 70_000, 2_500_000]))


def main(directory: str, capacity: int, seed: int) -> None:
    tier = DiskTier(directory, capacity)
    choose, stored, number = random.Random(seed), list[int](), seed * 1_000_000
    for key, _ in tier.objects():
        print("D", int.from_bytes(key, "little"), flush=True)
        tier.delete(key)
    while True:
        number += 1
        content = content_of(number)
        while not tier.put(key_of(number), ObjectInfo(size=len(content), num_tokens=1), memoryview(content)):
            victim = stored.pop(choose.randrange(len(stored)))
            print("D", victim, flush=True)
            tier.delete(key_of(victim))
        stored.append(number)
        print("P", number, flush=True)


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]))
