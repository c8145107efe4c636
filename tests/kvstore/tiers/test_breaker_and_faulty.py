"""The circuit breaker, and the fault-injecting tier that other tests rely on."""

from __future__ import annotations

import threading
from pathlib import Path

from tandem.kvstore.tiers.breaker import FIRST_PAUSE_S, LONGEST_PAUSE_S, Breaker
from tandem.kvstore.tiers.disk import DiskTier
from tests.kvstore.tiers.disk_writer import key_of
from tests.kvstore.tiers.faulty import FaultyTier
from tests.kvstore.tiers.test_disk import get, put


class Clock:
    now = 100.0

    def __call__(self) -> float:
        return self.now


def test_a_breaker_opens_lets_one_try_and_doubles_its_pause() -> None:
    clock = Clock()
    breaker = Breaker(clock)
    assert breaker.allows()
    pause = FIRST_PAUSE_S
    breaker.failed()
    breaker.failed()  # another call of the same moment counts once
    while pause < LONGEST_PAUSE_S:
        assert not breaker.allows()
        clock.now += pause - 0.01
        assert not breaker.allows()
        clock.now += 0.02
        assert breaker.allows()
        assert not breaker.allows(), "one at a time"
        breaker.failed()
        pause = min(2 * pause, LONGEST_PAUSE_S)
    clock.now += LONGEST_PAUSE_S + 0.01
    assert breaker.allows()
    breaker.succeeded()
    assert breaker.allows()
    assert breaker.allows()
    breaker.failed()
    clock.now += FIRST_PAUSE_S + 0.01
    assert breaker.allows(), "after a success the pause is short again"


def test_one_who_never_reports_does_not_block_the_breaker_for_good() -> None:
    clock = Clock()
    breaker = Breaker(clock)
    breaker.failed()
    clock.now += FIRST_PAUSE_S
    assert breaker.allows()
    clock.now += FIRST_PAUSE_S
    assert breaker.allows()


def test_faults_are_injected_and_counted(tmp_path: Path) -> None:
    tier = FaultyTier(DiskTier(tmp_path, 1 << 20))
    content = bytes(range(256)) * 10
    assert put(tier, 1, content)
    tier.fail("read", times=2)
    assert [get(tier, 1) == content for _ in range(3)] == [False, False, True]
    tier.flip = True
    got = get(tier, 1)
    assert got is not None
    assert sum((a ^ b).bit_count() for a, b in zip(got, content, strict=True)) == 1
    tier.heal()
    tier.truncate = True
    assert get(tier, 1) == content[:1280] + bytes(1280)
    tier.heal()
    tier.full = True
    assert not put(tier, 2, b"x")
    tier.heal()
    tier.fail("info")
    assert tier.info(key_of(1)) is None
    tier.heal()
    assert tier.injected == {"read": 4, "put": 1, "info": 1}
    tier.chance = 0.5
    assert 20 < sum(get(tier, 1) is None for _ in range(100)) < 95
    tier.heal()
    assert get(tier, 1) == content
    tier.close()


def test_held_operations_wait(tmp_path: Path) -> None:
    tier = FaultyTier(DiskTier(tmp_path, 1 << 20))
    tier.hold.clear()
    done: list[bool] = []
    thread = threading.Thread(target=lambda: done.append(put(tier, 1, b"x")))
    thread.start()
    assert tier.info(key_of(1)) is None
    assert not done
    tier.hold.set()
    thread.join()
    assert done == [True]
    tier.close()
