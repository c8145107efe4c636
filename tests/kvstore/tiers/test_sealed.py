"""Encryption at rest: every range reads back, nothing readable is stored, and whatever is changed is a miss."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tandem.common.errors import ConfigError
from tandem.kvstore.interfaces import ObjectInfo, ObjectKey, TierName
from tandem.kvstore.tiers.sealed import FRAME_BYTES, SealedTier

MASTER = bytes(range(32))
KEY, OTHER = ObjectKey(b"k" * 32), ObjectKey(b"o" * 32)
FRAME = FRAME_BYTES + 16
HEADER = 32


class Shelf:
    """A tier whose bytes the test can get at."""

    name = TierName.DISK
    capacity_bytes = 1 << 30

    def __init__(self) -> None:
        self.content: dict[ObjectKey, tuple[ObjectInfo, bytearray]] = {}
        self.reads = 0
        self.closed = False

    @property
    def used_bytes(self) -> int:
        return sum(len(content) for _, content in self.content.values())

    def put(self, key: ObjectKey, info: ObjectInfo, content: memoryview) -> bool:
        assert info.size == len(content)
        self.content[key] = (info, bytearray(content))
        return True

    def info(self, key: ObjectKey) -> ObjectInfo | None:
        return self.content[key][0] if key in self.content else None

    def read(self, key: ObjectKey, offset: int, out: memoryview) -> bool:
        self.reads += 1
        if key not in self.content or offset + len(out) > len(self.content[key][1]):
            return False
        out[:] = self.content[key][1][offset : offset + len(out)]
        return True

    def delete(self, key: ObjectKey) -> bool:
        return self.content.pop(key, None) is not None

    def objects(self) -> Iterator[tuple[ObjectKey, ObjectInfo]]:
        for key, (info, _) in list(self.content.items()):
            yield key, info

    def check_integrity(self) -> None: ...

    def close(self) -> None:
        self.closed = True


def info_of(content: bytes, owner: str = "tenant") -> ObjectInfo:
    return ObjectInfo(size=len(content), num_tokens=256, owner=owner, model="m", recompute_s=0.5)


def sealed(content: bytes, owner: str = "tenant", key: ObjectKey = KEY) -> tuple[Shelf, SealedTier]:
    shelf = Shelf()
    tier = SealedTier(shelf, MASTER)
    assert tier.put(key, info_of(content, owner), memoryview(content))
    return shelf, tier


def read(tier: SealedTier, offset: int, length: int, key: ObjectKey = KEY) -> bytes | None:
    out = bytearray(length)
    return bytes(out) if tier.read(key, offset, memoryview(out)) else None


CONTENT = os.urandom(3 * FRAME_BYTES + 1000)


@settings(max_examples=60, deadline=None)
@given(
    size=st.sampled_from([1, 100, FRAME_BYTES - 1, FRAME_BYTES, FRAME_BYTES + 1, 2 * FRAME_BYTES, len(CONTENT)]),
    data=st.data(),
)
def test_every_range_reads_back(size: int, data: st.DataObject) -> None:
    content = CONTENT[:size]
    shelf, tier = sealed(content)
    start = data.draw(st.integers(0, size))
    stop = data.draw(st.integers(start, size))
    assert read(tier, start, stop - start) == content[start:stop]
    assert read(tier, 0, size) == content
    assert tier.info(KEY) == info_of(content)
    assert list(tier.objects()) == [(KEY, info_of(content))]
    assert read(tier, start, size - start + 1) is None, "beyond the end"
    assert read(SealedTier(shelf, MASTER), start, stop - start) == content[start:stop], "after a restart"


def test_large_reads_take_several_rounds() -> None:
    content = os.urandom(130 * FRAME_BYTES + 5)
    _, tier = sealed(content)
    assert read(tier, 10, len(content) - 20) == content[10:-10]


def test_nothing_readable_is_stored_and_no_two_writes_look_alike() -> None:
    content = b"the same sixteen" * 20000
    shelf, tier = sealed(content)
    first = bytes(shelf.content[KEY][1])
    assert b"sixteen" not in first
    frames = {first[HEADER + index * FRAME : HEADER + (index + 1) * FRAME] for index in range(4)}
    assert len(frames) == 4, "equal frames are not equal when sealed"
    assert tier.put(KEY, info_of(content), memoryview(content))
    again = bytes(shelf.content[KEY][1])
    assert len(again) == len(first)
    assert sum(a == b for a, b in zip(first, again, strict=True)) < len(first) / 100


@pytest.mark.parametrize("place", [0, 7, 8, 31, HEADER, HEADER + 5, HEADER + FRAME_BYTES, HEADER + FRAME - 1, -1])
def test_a_flipped_bit_is_a_miss(place: int) -> None:
    shelf, tier = sealed(CONTENT)
    assert read(tier, 0, 10) == CONTENT[:10]
    shelf.content[KEY][1][place] ^= 4
    assert read(SealedTier(shelf, MASTER), 0, len(CONTENT)) is None
    if place >= HEADER or place == -1:
        assert read(tier, 0, len(CONTENT)) is None, "also when its key is known already"


def test_a_fault_in_one_frame_leaves_the_others_readable() -> None:
    shelf, tier = sealed(CONTENT)
    shelf.content[KEY][1][HEADER + FRAME + 3] ^= 1
    assert read(tier, 0, FRAME_BYTES) == CONTENT[:FRAME_BYTES]
    assert read(tier, FRAME_BYTES, 1) is None
    assert read(tier, 2 * FRAME_BYTES, 1000) == CONTENT[2 * FRAME_BYTES :][:1000]


def test_swapped_frames_are_a_miss() -> None:
    shelf, tier = sealed(CONTENT)
    stored = shelf.content[KEY][1]
    first, second = stored[HEADER : HEADER + FRAME], stored[HEADER + FRAME : HEADER + 2 * FRAME]
    stored[HEADER : HEADER + 2 * FRAME] = second + first
    assert read(tier, 0, 1) is None
    assert read(tier, FRAME_BYTES, 1) is None


def test_frames_of_an_earlier_write_are_a_miss() -> None:
    shelf, tier = sealed(CONTENT)
    earlier = bytes(shelf.content[KEY][1])
    assert tier.put(KEY, info_of(CONTENT), memoryview(CONTENT))
    shelf.content[KEY][1][HEADER : HEADER + FRAME] = earlier[HEADER : HEADER + FRAME]
    assert read(tier, 0, 1) is None
    assert read(tier, FRAME_BYTES, 1) == CONTENT[FRAME_BYTES : FRAME_BYTES + 1]


def test_swapped_objects_are_a_miss() -> None:
    shelf, tier = sealed(CONTENT)
    assert tier.put(OTHER, info_of(CONTENT), memoryview(CONTENT))
    shelf.content[KEY], shelf.content[OTHER] = shelf.content[OTHER], shelf.content[KEY]
    assert read(tier, 0, 1) is None
    assert read(tier, 0, 1, OTHER) is None


def test_another_owner_is_a_miss() -> None:
    shelf, _ = sealed(CONTENT)
    info, content = shelf.content[KEY]
    shelf.content[KEY] = (replace(info, owner="intruder"), content)
    assert read(SealedTier(shelf, MASTER), 0, 1) is None


@pytest.mark.parametrize("cut", [1, 16, 1000, FRAME, FRAME * 3, HEADER])
def test_a_cut_object_is_a_miss(cut: int) -> None:
    shelf, _ = sealed(CONTENT)
    info, content = shelf.content[KEY]
    del content[-cut:]
    shelf.content[KEY] = (replace(info, size=len(content)), content)
    assert read(SealedTier(shelf, MASTER), 0, 1) is None


def test_owners_do_not_share_a_key(monkeypatch: pytest.MonkeyPatch) -> None:
    """With equal keys and equal random bytes, the same content would be sealed to the same bytes but for the tags."""
    monkeypatch.setattr(os, "urandom", bytes)
    stored = [sealed(CONTENT, owner)[0].content[KEY][1] for owner in ("one", "two", "one")]
    assert stored[0] == stored[2]
    assert stored[0][HEADER : HEADER + 64] != stored[1][HEADER : HEADER + 64]


def test_another_master_key_is_a_miss() -> None:
    shelf, _ = sealed(CONTENT)
    assert read(SealedTier(shelf, bytes(32)), 0, 1) is None


def test_what_was_stored_in_the_clear_is_a_miss() -> None:
    shelf = Shelf()
    for size in (1, 10, HEADER, HEADER + 16, HEADER + 17, 5000):
        content = bytes(size)
        shelf.put(KEY, info_of(content), memoryview(content))
        tier = SealedTier(shelf, MASTER)
        assert read(tier, 0, 1) is None
        for _, info in tier.objects():
            assert info.size > 0


def test_an_object_replaced_by_another_node_is_read_anew() -> None:
    shelf, tier = sealed(CONTENT)
    assert read(tier, 0, 10) == CONTENT[:10]
    newer = os.urandom(500)
    assert SealedTier(shelf, MASTER).put(KEY, info_of(newer), memoryview(newer))
    assert read(tier, 0, 500) == newer


def test_reading_layer_by_layer_asks_the_tier_once_per_layer() -> None:
    shelf, tier = sealed(CONTENT)
    shelf.reads = 0
    for start in range(0, len(CONTENT), 10000):
        read(tier, start, min(10000, len(CONTENT) - start))
    assert shelf.reads == 1 + -(-len(CONTENT) // 10000), "and once for the object's header"


def test_the_keys_of_only_so_many_objects_are_kept() -> None:
    shelf = Shelf()
    tier = SealedTier(shelf, MASTER)
    keys = [ObjectKey(index.to_bytes(32, "big")) for index in range(1500)]
    for key in keys:
        assert tier.put(key, info_of(b"x"), memoryview(b"x"))
        assert read(tier, 0, 1, key) == b"x"
    assert len(tier._opened) == 1024
    assert all(read(tier, 0, 1, key) == b"x" for key in keys)


def test_missing_deleted_and_empty_objects() -> None:
    shelf, tier = sealed(b"abc")
    assert tier.info(OTHER) is None
    assert read(tier, 0, 1, OTHER) is None
    assert not tier.put(OTHER, info_of(b""), memoryview(b""))
    assert read(tier, 0, 3) == b"abc"
    assert tier.delete(KEY)
    assert not tier.delete(KEY)
    assert read(tier, 0, 3) is None
    assert (tier.name, tier.capacity_bytes, tier.used_bytes) == (TierName.DISK, 1 << 30, 0)
    tier.close()
    assert shelf.closed


@pytest.mark.parametrize("key", [b"", b"short", bytes(33)])
def test_a_key_of_another_length_is_refused_with_the_remedy(key: bytes) -> None:
    with pytest.raises(ConfigError, match=f"has {len(key)} bytes; use 32 random bytes"):
        SealedTier(Shelf(), key)
