"""The last band beside others: how little it takes of their steps, how much it gets all the same, and that it stands
back in the middle of a step."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tandem.common.fairness import LAST_BAND
from tandem.engine.request import FinishReason
from tandem.engine.schedule.last_band import (
    FIRST_PIECE_S,
    MAX_PIECE_S,
    PATIENCE_S,
    PROMPT_TOKENS,
    ROWS,
    SHARE,
    LastBand,
)
from tandem.engine.schedule.plan import StepPlan
from tandem.engine.schedule.sequence import Phase, Sequence
from tests.engine.schedule.test_scheduler import Play
from tests.engine_harness import DirectImport, EngineUnderTest, tiny_llama

STEP_S, TOKEN_S = 0.002, 0.0002


def of_last_band(plan: StepPlan) -> tuple[int, int]:
    """Its decode rows and prompt tokens."""
    rows = sum(sequence.priority == LAST_BAND for sequence in plan.decodes)
    return rows, sum(chunk.num_tokens for chunk in plan.chunks if chunk.sequence.priority == LAST_BAND)


def make_play(**options: Any) -> Play:
    """Steps take the time that they take on a processor: more, with more tokens."""
    play = Play(**({"num_blocks": 2000, "max_num_seqs": 64, "budget": 512, "beside": 128} | options))
    play.step_s = lambda plan: STEP_S + TOKEN_S * plan.num_tokens
    return play


def test_a_client_meets_none_of_a_batch_at_first_and_little_later() -> None:
    play = make_play()
    for index in range(30):
        play.add(f"batch{index}", 1500, priority=LAST_BAND, max_tokens=500)
    for _ in range(500):
        play.step()
    client = play.add("client", 100, max_tokens=300)
    plan = play.step()
    assert [chunk.sequence for chunk in plan.chunks] == [client], "its prompt has the whole step"
    assert not plan.decodes
    plans = [play.step() for _ in range(200)]
    assert not any(of_last_band(plan) != (0, 0) for plan in plans[:10])
    shared = [plan for plan in plans if of_last_band(plan) != (0, 0)]
    assert shared
    alone_s = len(plans) * (STEP_S + TOKEN_S)
    assert sum(map(play.step_s, plans)) <= 1.1 * alone_s


def test_a_piece_costs_by_how_much_steps_with_it_are_longer() -> None:
    """The first measured step is believed, later ones move the belief by a tenth; so with pieces."""
    account = LastBand()
    account.took(4, 0, 0, 0.010)
    account.took(4, 0, 0, 0.020)
    account.took(4, 0, 4, 0.013)
    assert not account.is_due(0.0, first_token_waits=False)
    longer_s = 0.013 - 0.011
    piece_s = 0.9 * FIRST_PIECE_S + 0.1 * longer_s
    assert account.due_at == pytest.approx((longer_s + piece_s) / SHARE)


def test_under_a_load_without_end_the_last_band_has_its_share_of_the_time() -> None:
    play = make_play()
    play.add("client", 16, max_tokens=10**4)
    for index in range(8):
        play.add(f"batch{index}", 300, priority=LAST_BAND, max_tokens=40)
    took_s = 0.0
    begun = play.now
    while play.emitted.get("batch7", 0) < 40:
        plan = play.step()
        took_s += TOKEN_S * sum(of_last_band(plan))
    assert took_s == pytest.approx(SHARE * (play.now - begun), rel=0.2)


def test_prompts_that_never_cease_leave_it_its_share_too() -> None:
    play = make_play()
    batch = play.add("batch", 300, priority=LAST_BAND, max_tokens=5)
    for index in range(3000):
        if play.scheduler.pending_prefill_tokens < 1000:
            play.add(f"client{index}", 500, max_tokens=1)
        play.step()
        if batch.phase is Phase.FINISHED:
            return
    raise AssertionError("the batch had no turn")


def test_decode_rows_of_the_last_band_take_turns() -> None:
    play = make_play()
    batch = [play.add(f"batch{index}", 16, priority=LAST_BAND, max_tokens=5000) for index in range(40)]
    for _ in range(10):
        play.step()
    play.add("client", 16, max_tokens=8000)
    play.step()
    before = [sequence.num_output for sequence in batch]
    for _ in range(3000):
        play.step()
    gained = [sequence.num_output - had for sequence, had in zip(batch, before, strict=True)]
    assert min(gained) > 3
    assert max(gained) - min(gained) <= 1


def test_what_others_compute_for_the_last_band_is_taken_in_at_once() -> None:
    play = make_play()
    play.add("client", 16, max_tokens=1000)
    play.step()
    computed_here = play.add("here", 300, priority=LAST_BAND)
    imported = play.add("there", 300, priority=LAST_BAND, kv_import=object())
    play.step()
    assert (computed_here.phase, imported.phase) == (Phase.WAITING, Phase.IMPORTING)


def test_who_holds_up_an_earlier_band_is_not_slowed_down() -> None:
    play = make_play(max_num_seqs=1)
    batch = play.add("batch", 20, priority=LAST_BAND, max_tokens=50)
    play.step()
    batch.displaced = 10**6
    client = play.add("client", 20, max_tokens=2)
    for _ in range(49):
        assert of_last_band(play.step())[0] == 1
    play.step()
    assert (batch.phase, client.num_output) == (Phase.FINISHED, 1)


@settings(max_examples=40, deadline=None)
@given(
    seed=st.integers(0, 2**32),
    num_blocks=st.integers(8, 60),
    slots=st.integers(1, 8),
    beside=st.sampled_from((None, 32)),
)
def test_whatever_comes_the_last_band_takes_little_beside_others_and_all_end(
    seed: int, num_blocks: int, slots: int, beside: int | None
) -> None:
    """`Play.step` checks the books and that no token comes twice."""
    rng = random.Random(seed)
    play = make_play(num_blocks=num_blocks, max_num_seqs=slots, budget=slots + rng.randint(32, 80), beside=beside)
    capacity = (num_blocks - 1) * 16
    wanted: dict[str, int] = {}
    everybody: list[Sequence] = []
    took_s = beside_s = 0.0
    for index in range(400):
        if rng.random() < 0.15:
            length, output = rng.randint(1, capacity // 2), rng.randint(1, min(20, capacity // 4))
            name, band = f"r{index}", rng.choice((-1, 0, 7, LAST_BAND, LAST_BAND))
            everybody.append(play.add(name, length, max_tokens=output, priority=band))
            wanted[name] = output
        earlier = [s for s in everybody if s.priority < LAST_BAND and s.phase is not Phase.FINISHED]
        blocked = bool(earlier) and all(s.phase is Phase.WAITING for s in earlier)
        at, plan = play.now, play.step()
        rows, prompt_tokens = of_last_band(plan)
        if earlier and not blocked:
            assert rows <= ROWS
            assert prompt_tokens <= PROMPT_TOKENS
            beside_s += play.now - at
            took_s += TOKEN_S * (rows + prompt_tokens)
    assert took_s <= 1.1 * SHARE * beside_s + 2 * (MAX_PIECE_S + PATIENCE_S)
    play.run(20_000)
    assert play.emitted == wanted


# The engine


def test_a_step_of_the_last_band_stops_for_a_request_that_comes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The request comes while the batch's step is being computed, in its first layers."""
    folder, prompt = tiny_llama(tmp_path / "llama"), list(range(3, 90))
    with EngineUnderTest(folder) as engine:
        alone = engine.generate("alone", prompt, max_tokens=30), engine.generate("client alone", prompt[5:])
        forward, given_up = engine.engine.loaded.decoder.forward, []
        went_on: list[bool] = []

        def interrupted(batch: Any, *arguments: Any) -> Any:
            interrupts = len(given_up) < 3 and len(engine.outputs.get(key, ())) == 5 * len(given_up) and batch_runs
            if interrupts:
                given_up.append(engine.submit(f"client{len(given_up)}", prompt[5:]))
            computed = forward(batch, *arguments)
            went_on.append(interrupts)
            return computed

        batch_runs = False
        monkeypatch.setattr(engine.engine.loaded.decoder, "forward", interrupted)
        key = engine.submit("warm", [1, 2, 3], max_tokens=1)
        engine.last(key)
        batch_runs = True
        key = engine.submit("batch", prompt, max_tokens=30, priority=LAST_BAND)
        assert engine.tokens(key) == alone[0]
        assert len(given_up) == 3
        assert not any(went_on), "the step went on to its end"
        assert all(engine.tokens(client) == alone[1] for client in given_up)


def test_the_last_band_goes_on_beside_a_request_that_waits_for_others(tmp_path: Path) -> None:
    """A hand-over that does not come: the worker has nothing to compute for it, and wakes up for the batch."""
    with EngineUnderTest(tiny_llama(tmp_path / "llama")) as engine:
        alone = engine.generate("alone", [5] * 40, max_tokens=6)
        absent = DirectImport()
        waiting = engine.submit("client", [3] * 40, kv_import=absent)
        assert absent.ready.wait(60)
        assert engine.generate("batch", [5] * 40, max_tokens=6, priority=LAST_BAND) == alone
        engine.engine.cancel(waiting)
        assert engine.last(waiting).finish_reason is FinishReason.CANCELLED
