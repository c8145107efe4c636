"""An earlier band takes the places of later ones: who yields, how often, and that nothing of their output is lost."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tandem.engine.request import Preemption
from tandem.engine.schedule.admission import MAX_DISPLACED
from tandem.engine.schedule.sequence import Phase, Sequence
from tests.engine.schedule.test_scheduler import BLOCK, Play
from tests.engine_harness import EngineUnderTest, tiny_llama


def preempted(sequences: list[Sequence]) -> dict[str, str | None]:
    return {s.key.request_id: s.preempted.value if s.preempted is not None else None for s in sequences}


def test_an_urgent_request_takes_a_full_batchs_last_place_and_gives_it_back() -> None:
    play = Play(max_num_seqs=2)
    early, late = (play.add(name, 20, max_tokens=30, priority=5) for name in ("early", "late"))
    play.step()
    kept = list(late.tokens)
    urgent = play.add("urgent", 20, priority=0)
    plan = play.step()
    assert (preempted(plan.preempted), plan.admitted) == ({"late": "priority"}, [urgent])
    assert urgent.num_output == 1, "it has its first token in the step that it came in"
    assert (early.phase, late.phase) == (Phase.RUNNING, Phase.WAITING)
    play.run()
    assert late.tokens[: len(kept)] == kept
    assert play.emitted == {"early": 30, "late": 30, "urgent": 4}
    assert (early.displaced, late.displaced) == (0, 1)


def test_the_same_band_displaces_nobody() -> None:
    play = Play(max_num_seqs=1)
    running = play.add("running", 20, max_tokens=30, priority=3)
    play.step()
    for name, priority in (("equal", 3), ("later", 4)):
        play.add(name, 20, priority=priority)
    play.run()
    assert running.preempted is None


def test_memory_is_made_as_slots_are_with_as_few_victims_as_it_takes() -> None:
    play = Play(num_blocks=21, budget=400, max_num_seqs=8)
    small, large, last = (
        play.add(name, length, max_tokens=4, priority=5) for name, length in (("s", 60), ("l", 120), ("z", 30))
    )
    play.step()
    urgent = play.add("urgent", 150, max_tokens=4, priority=1)
    plan = play.step()
    assert set(preempted(plan.preempted).values()) == {"priority"}
    assert urgent.num_output == 1
    assert (small.preempted, large.preempted, last.preempted) == (None, Preemption.PRIORITY, Preemption.PRIORITY)
    play.run()
    assert set(play.emitted.values()) == {4}


def test_nobody_yields_where_it_would_not_be_enough() -> None:
    play = Play(num_blocks=21, budget=400)
    holder = play.add("holder", 200, max_tokens=20, priority=0)
    victim = play.add("victim", 50, max_tokens=20, priority=5)
    play.step()
    play.add("urgent", 200, max_tokens=2, priority=1)
    for _ in range(5):
        assert not play.step().preempted
    assert victim.phase is holder.phase is Phase.RUNNING
    play.run()


def test_nobody_yields_for_ever() -> None:
    play = Play(max_num_seqs=1)
    victim = play.add("victim", 20, max_tokens=40, priority=5)
    play.step()
    for index in range(20):
        play.add(f"u{index}", 20, max_tokens=3, priority=0)
        for _ in range(5):
            play.step()
    assert victim.displaced == MAX_DISPLACED
    play.run()
    assert play.emitted["victim"] == 40


def test_what_others_read_or_write_does_not_yield() -> None:
    play = Play(max_num_seqs=1)
    exporting = play.add("exporting", 100, priority=5, kv_export=object())
    play.step()
    play.add("urgent", 20, priority=0)
    assert not play.step().preempted
    assert exporting.phase is Phase.RUNNING


def test_an_urgent_prompt_does_not_wait_for_a_long_one_of_a_later_band() -> None:
    play = Play(budget=64, num_blocks=200)
    long = play.add("long", 2000, priority=5)
    play.step()
    urgent = play.add("urgent", 30, priority=0)
    play.step()
    assert urgent.num_output == 1
    assert long.num_output == 0
    assert long.preempted is None, "there was a slot for both"


def test_a_fair_share_is_not_charged_twice_for_what_was_displaced() -> None:
    play = Play(max_num_seqs=1)
    victim = play.add("victim", 32, max_tokens=6, priority=5)
    play.step()
    assert victim.account is not None
    before = victim.account.counter
    play.add("urgent", 20, max_tokens=2, priority=0)
    play.run()
    assert victim.displaced == 1
    assert victim.account.counter - before == pytest.approx(victim.output_cost * 5)
    assert victim.account.waiting == 0


@pytest.mark.parametrize("sampling", [{}, {"temperature": 0.9, "seed": 7}, {"presence_penalty": 0.5, "logprobs": 2}])
def test_who_was_displaced_goes_on_with_the_same_tokens(tmp_path: Path, sampling: dict[str, Any]) -> None:
    folder, prompt = tiny_llama(tmp_path / "llama"), list(range(3, 70))
    with EngineUnderTest(folder, max_num_seqs=1) as engine:
        alone = engine.generate("alone", prompt, max_tokens=120, **sampling)
        key = engine.submit("batch", prompt, max_tokens=120, priority=9, **sampling)
        urgent = []
        for index in range(MAX_DISPLACED + 1):
            engine.wait_tokens(key, 10 * (index + 1))
            urgent.append(engine.submit(f"urgent-{index}", prompt[index:], max_tokens=3, priority=0))
            engine.last(urgent[-1]) if index < MAX_DISPLACED else engine.last(key)
        assert engine.tokens(key) == alone
        told = [output for output in engine.outputs[key] if output.preempted is not None]
        assert [output.preempted for output in told] == [Preemption.PRIORITY] * MAX_DISPLACED
        assert not any(output.token_ids for output in told)
        assert all(len(engine.tokens(each)) == 3 for each in urgent)


@settings(max_examples=60, deadline=None)
@given(seed=st.integers(0, 2**32), num_blocks=st.integers(8, 30), slots=st.integers(1, 4))
def test_whatever_comes_all_end_with_all_their_tokens(seed: int, num_blocks: int, slots: int) -> None:
    """`Play.step` checks every step: no token twice, books that balance, nobody displaced but for an earlier band."""
    rng = random.Random(seed)
    play = Play(num_blocks=num_blocks, max_num_seqs=slots, budget=slots + rng.randint(16, 80))
    capacity = (num_blocks - 1) * BLOCK
    wanted: dict[str, int] = {}
    for index in range(40):
        if rng.random() < 0.6:
            output = rng.randint(1, 20)
            name = f"r{index}"
            play.add(name, rng.randint(1, min(90, capacity - output)), max_tokens=output, priority=rng.randint(-1, 3))
            wanted[name] = output
        play.step()
    play.run()
    assert play.emitted == wanted
