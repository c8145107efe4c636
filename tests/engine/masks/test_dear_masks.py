"""Sequences whose masks take long wait more than they compute: they leave slots to those who can go on."""

from __future__ import annotations

from tandem.common.constraint_limits import DEAR_S
from tandem.common.sampling import Constraint
from tandem.engine.masks.guide import Guide, Work
from tandem.engine.schedule.admission import DEAR_SHARE
from tandem.engine.schedule.sequence import Phase, Sequence
from tandem.engine.step.constraint import LONGEST_WAIT_S, SHARE, SHORTEST_WAIT_S, Patience
from tests.engine.schedule.test_scheduler import Play

SLOTS = 8


def constrained(sequence: Sequence, mask_s: float) -> Sequence:
    """One mask has come, which took `mask_s`."""
    work = Work(masks=1, spent_s=mask_s)
    sequence.guide = Guide(1, Constraint("regex", "a*"), sequence.request.tenant, [], work, bits=b"\xff", prompt=True)
    return sequence


def running(sequences: list[Sequence]) -> int:
    return sum(sequence.phase is Phase.RUNNING for sequence in sequences)


def make_play() -> Play:
    return Play(num_blocks=400, max_num_seqs=SLOTS, budget=256)


def test_dear_masks_take_a_share_of_the_slots_and_come_all_to_their_turn() -> None:
    play = make_play()
    dear = [constrained(play.add(f"dear{index}", 8, max_tokens=20), 2 * DEAR_S) for index in range(SLOTS)]
    play.step()
    assert running(dear) == SLOTS // DEAR_SHARE
    plain = [play.add(f"plain{index}", 8, max_tokens=4) for index in range(SLOTS - SLOTS // DEAR_SHARE)]
    play.step()
    assert running(plain) == len(plain), "they are not behind those who wait"
    play.run()
    assert all(each.phase is Phase.FINISHED for each in (*dear, *plain))


def test_urgent_ones_with_dear_masks_displace_nobody_beyond_their_share() -> None:
    play = make_play()
    plain = [play.add(f"plain{index}", 8, max_tokens=50, priority=1) for index in range(SLOTS)]
    play.step()
    dear = [constrained(play.add(f"dear{index}", 8, max_tokens=5, priority=0), 2 * DEAR_S) for index in range(SLOTS)]
    play.step()
    assert running(dear) == SLOTS // DEAR_SHARE
    assert running(plain) == SLOTS - SLOTS // DEAR_SHARE
    play.run()
    assert all(each.phase is Phase.FINISHED for each in (*dear, *plain))


def test_ordinary_masks_take_every_slot() -> None:
    play = make_play()
    sequences = [constrained(play.add(f"json{index}", 8, max_tokens=5), DEAR_S / 2) for index in range(SLOTS)]
    play.step()
    assert running(sequences) == SLOTS


def test_dear_ones_that_still_import_take_slots_of_the_share() -> None:
    play = make_play()
    dear = [constrained(play.add(f"dear{index}", 8, kv_import=object()), 2 * DEAR_S) for index in range(SLOTS)]
    for _ in range(3):
        play.step()
    assert sum(each.phase is Phase.IMPORTING for each in dear) == SLOTS // DEAR_SHARE


def test_steps_wait_for_masks_no_longer_than_their_share_whatever_a_wait_takes() -> None:
    """A system call may wait for longer than it was told to; the next waits pay for it."""
    patience, step_s, late_s = Patience(), 0.002, 0.003
    waited_s, steps = 0.0, 2000
    for _ in range(steps):
        wait_s = patience.of_step(step_s, alone=False)
        assert wait_s == 0.0 or SHORTEST_WAIT_S <= wait_s <= LONGEST_WAIT_S
        if wait_s:
            patience.spend(wait_s + late_s)
            waited_s += wait_s + late_s
    assert 0 < waited_s <= SHARE * step_s * steps + LONGEST_WAIT_S + late_s


def test_one_very_long_wait_does_not_end_waiting() -> None:
    patience = Patience()
    patience.spend(60.0)
    assert any(patience.of_step(0.01, alone=False) for _ in range(100))
