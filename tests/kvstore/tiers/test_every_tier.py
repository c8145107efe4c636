"""What every tier promises, against a dictionary and rule by rule."""

from __future__ import annotations

import random
import threading
from collections.abc import Callable
from dataclasses import replace

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)

from tandem.kvstore.interfaces import ObjectInfo, ObjectKey
from tandem.kvstore.tiers.sealed import SealedTier
from tests.kvstore.tiers.conftest import Opener

CAPACITY = 1 << 20
OVERHEAD = 8192
"""At most this much of a tier's capacity goes to headers and padding of an object."""
KEYS = [ObjectKey(bytes([number]) * 32) for number in range(6)]


def content_of(seed: int, size: int) -> bytes:
    return random.Random(seed).randbytes(size)


def info_of(content: bytes, **fields: float | str) -> ObjectInfo:
    return replace(ObjectInfo(size=len(content), num_tokens=256), **fields)  # type: ignore[arg-type]


def whole(tier: object, key: ObjectKey, size: int) -> bytes | None:
    out = bytearray(size)
    return bytes(out) if tier.read(key, 0, memoryview(out)) else None  # type: ignore[attr-defined]


class TierMachine(RuleBasedStateMachine):
    make_opener: Callable[[], Opener]

    @initialize()
    def start(self) -> None:
        self.opener = type(self).make_opener()
        self.tier = self.opener(CAPACITY)
        self.model: dict[ObjectKey, tuple[ObjectInfo, bytes]] = {}

    @rule(
        key=st.sampled_from(KEYS),
        seed=st.integers(0, 255),
        size=st.sampled_from([0, 1, 4095, 4096, 4097, 65_536, 65_600, 300_000, 1_100_000]),
        owner=st.sampled_from(["default", "täglich"]),
    )
    def put(self, key: ObjectKey, seed: int, size: int, owner: str) -> None:
        content = content_of(seed, size)
        info = info_of(content, owner=owner, model="m", recompute_s=0.25)
        fits = self.tier.used_bytes + size + OVERHEAD <= self.tier.capacity_bytes
        done = self.tier.put(key, info, memoryview(content))
        assert done or not fits or size == 0, "only an empty object may be refused for another reason: no bundle is"
        assert not (done and size > CAPACITY)
        if done:
            self.model[key] = (info, content)

    @rule(key=st.sampled_from(KEYS), start=st.floats(0, 1), length=st.integers(0, 70_000))
    def read(self, key: ObjectKey, start: float, length: int) -> None:
        info, content = self.model.get(key, (None, b""))
        offset = int(start * len(content))
        out = bytearray(b"?" * length)
        expected = info is not None and offset + length <= len(content)
        assert self.tier.read(key, offset, memoryview(out)) == expected
        if expected:
            assert out == content[offset : offset + length]

    @rule(key=st.sampled_from(KEYS))
    def delete(self, key: ObjectKey) -> None:
        assert self.tier.delete(key) == (key in self.model)
        self.model.pop(key, None)

    @rule()
    def reopen(self) -> None:
        self.tier.close()
        self.tier = self.opener(CAPACITY)

    @precondition(lambda self: hasattr(self, "tier"))
    @invariant()
    def agrees(self) -> None:
        for key in KEYS:
            assert self.tier.info(key) == self.model.get(key, (None,))[0]
        assert dict(self.tier.objects()) == {key: info for key, (info, _) in self.model.items()}
        assert sum(len(content) for _, content in self.model.values()) <= self.tier.used_bytes
        assert self.tier.used_bytes <= self.tier.capacity_bytes
        self.tier.check_integrity()

    def teardown(self) -> None:
        if hasattr(self, "tier"):
            for key, (_, content) in self.model.items():
                assert whole(self.tier, key, len(content)) == content
            self.tier.close()


def run_machine(make_opener: Callable[[], Opener], examples: int, steps: int) -> None:
    machine = type("Machine", (TierMachine,), {"make_opener": staticmethod(make_opener)})
    run_state_machine_as_test(  # type: ignore[no-untyped-call]
        machine,
        settings=settings(
            max_examples=examples, stateful_step_count=steps, deadline=None, suppress_health_check=list(HealthCheck)
        ),
    )


def test_agrees_with_a_dictionary(make_opener: Callable[[], Opener]) -> None:
    run_machine(make_opener, examples=6, steps=20)


@pytest.mark.slow
def test_agrees_with_a_dictionary_for_long(make_opener: Callable[[], Opener]) -> None:
    run_machine(make_opener, examples=60, steps=50)


def test_nothing_is_read_past_the_end_or_before_the_start(opener: Opener) -> None:
    tier = opener(CAPACITY)
    content = content_of(1, 10_000)
    assert tier.put(KEYS[0], info_of(content), memoryview(content))
    assert not tier.read(KEYS[0], -1, memoryview(bytearray(10)))
    assert not tier.read(KEYS[0], 9_999, memoryview(bytearray(2)))
    assert not tier.read(KEYS[0], 10_001, memoryview(bytearray(1)))
    assert not tier.read(KEYS[1], 0, memoryview(bytearray(1)))
    assert tier.read(KEYS[0], 10_000, memoryview(bytearray(0)))
    last = bytearray(1)
    assert tier.read(KEYS[0], 9_999, memoryview(last))
    assert last[0] == content[-1]
    tier.close()


def test_a_defect_of_the_caller_is_said_clearly(opener: Opener) -> None:
    tier = opener(CAPACITY)
    if isinstance(tier, SealedTier):
        pytest.skip("a sealed tier refuses such a put without a word")
    with pytest.raises(ValueError, match=r"info\.size is 3 but content has 4"):
        tier.put(KEYS[0], ObjectInfo(size=3, num_tokens=1), memoryview(b"four"))
    with pytest.raises(ValueError, match="digest of 32"):
        tier.put(ObjectKey(b"short"), ObjectInfo(size=4, num_tokens=1), memoryview(b"four"))
    tier.close()


def test_a_closed_tier_is_a_miss(opener: Opener) -> None:
    tier = opener(CAPACITY)
    assert tier.put(KEYS[0], info_of(b"x"), memoryview(b"x"))
    tier.close()
    tier.close()
    assert tier.info(KEYS[0]) is None
    assert whole(tier, KEYS[0], 1) is None
    assert not tier.put(KEYS[1], info_of(b"x"), memoryview(b"x"))
    assert not tier.delete(KEYS[0])
    assert list(tier.objects()) == []


def test_threads_see_whole_objects_only(opener: Opener) -> None:
    """Every version of a key is one repeated byte, so a mixture of two versions shows."""
    tier = opener(16 << 20)
    stop, wrong = threading.Event(), []
    size = 50_000

    def write(number: int) -> None:
        choose = random.Random(number)
        for _ in range(25):
            key = choose.choice(KEYS[:3])
            if choose.random() < 0.2:
                tier.delete(key)
            else:
                content = bytes([choose.randrange(256)]) * size
                tier.put(key, info_of(content), memoryview(content))

    def read() -> None:
        out = memoryview(bytearray(size))
        while not stop.is_set():
            for key in KEYS[:3]:
                if tier.read(key, 0, out) and bytes(out) != bytes(out[:1]) * size:
                    wrong.append(key)

    readers = [threading.Thread(target=read) for _ in range(2)]
    writers = [threading.Thread(target=write, args=(number,)) for number in range(2)]
    for thread in readers + writers:
        thread.start()
    for thread in writers:
        thread.join()
    stop.set()
    for thread in readers:
        thread.join()
    assert not wrong
    tier.check_integrity()
    tier.close()
