"""Sequences whose masks take long hold a slot without a step: one slot in four is for them, whichever way they come."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

from tandem.engine.schedule.admission import DEAR_SHARE
from tandem.engine.schedule.sequence import Phase, Sequence
from tests.engine.schedule.test_scheduler import Play
from tests.engine.schedule.test_slot_shares import SLOTS, Crowd

DEAR: Any = SimpleNamespace(ready=True, prompt=True, work=SimpleNamespace(is_dear=True))


def running(sequences: list[Sequence]) -> int:
    return sum(sequence.phase is Phase.RUNNING for sequence in sequences)


def test_they_get_one_slot_in_four_and_others_pass_them() -> None:
    play = Play(num_blocks=200, max_num_seqs=2 * DEAR_SHARE, budget=512)
    dear = [play.add(f"dear {i}", 20, max_tokens=20) for i in range(4)]
    for sequence in dear:
        sequence.guide = DEAR
    others = [play.add(f"other {i}", 20, max_tokens=20) for i in range(8)]
    play.step()
    assert (running(dear), running(others)) == (2, 6)
    play.scheduler.finish(dear[0])
    play.scheduler.finish(others[0])
    play.step()
    assert (running(dear), running(others)) == (2, 6)


def test_they_displace_later_bands_only_as_far_as_their_slots_go() -> None:
    play = Play(num_blocks=200, max_num_seqs=2 * DEAR_SHARE, budget=512)
    later = [play.add(f"later {i}", 20, max_tokens=50, priority=5) for i in range(8)]
    play.step()
    dear = [play.add(f"dear {i}", 20, max_tokens=50) for i in range(3)]
    for sequence in dear:
        sequence.guide = DEAR
    plain = play.add("plain", 20, max_tokens=50)
    plan = play.step()
    assert plan.admitted == [*dear[:2], plain]
    assert len(plan.preempted) == 3
    assert running(later) == 5


def test_they_take_slots_of_a_crowd_only_as_far_as_theirs_go() -> None:
    floor = Crowd()
    for sequence in floor.crowd[: SLOTS // DEAR_SHARE]:
        sequence.guide = DEAR
    dear = floor.add("victim")
    dear.guide = DEAR
    assert not floor.step().admitted
    floor.leave(floor.crowd[0])
    assert floor.step().admitted == [dear]
