"""The store on both sides of a hand-over: the prefill worker loads, the decode worker saves what came to it."""

from __future__ import annotations

import random
import threading

import pytest

from tandem.engine.request import FinishReason, RequestKey
from tandem.engine.schedule.plan import StepPlan
from tandem.engine.store import loading
from tests.engine.store.conftest import CHUNK, MakeEngine, assert_same, fill, report_of
from tests.engine.store.scripted_home import ScriptedHome
from tests.engine_harness import DirectExport, DirectImport, EngineUnderTest, wait_for

RNG = random.Random(15)
PROMPT = [RNG.randrange(3, 512) for _ in range(150)]


def hand_over(prefill: EngineUnderTest, decode: EngineUnderTest, name: str) -> tuple[RequestKey, DirectExport]:
    kv_import = DirectImport()
    kv_export = DirectExport(prefill.engine, kv_import)
    key = decode.submit(name, PROMPT, kv_import=kv_import, max_tokens=50, logprobs=0)
    prefill.submit(name, PROMPT, kv_export=kv_export, max_tokens=50, logprobs=0)
    return key, kv_export


@pytest.mark.parametrize("early", [False, True])
def test_a_prefill_worker_hands_over_what_it_loaded(
    make: MakeEngine,
    home: ScriptedHome,
    folder: object,
    plain: EngineUnderTest,
    monkeypatch: pytest.MonkeyPatch,
    early: bool,
) -> None:
    monkeypatch.setattr("tandem.engine.store.loading.arrives_in_time", lambda *_: early)
    fill(make(), PROMPT)
    prefill, decode = make(), make()
    prefill.generate("measure", [7] * 20, max_tokens=1)
    key, export = hand_over(prefill, decode, "h")
    assert_same(decode, key, plain, plain.submit("h", PROMPT, max_tokens=50, logprobs=0))
    assert report_of(decode, key).cached_by_tier == {"host": 128}
    assert prefill.last(key).finish_reason is FinishReason.HANDED_OVER
    assert export.aborted_because is None
    covered = {(layer, row) for layer, start, stop in export.announced for row in range(start, stop)}
    assert {(layer, row) for layer in range(3) for row in range(128, 150)} <= covered


def test_a_decode_worker_saves_the_prompt_that_was_handed_to_it_and_its_answer(
    make: MakeEngine, home: ScriptedHome, plain: EngineUnderTest
) -> None:
    prefill = EngineUnderTest(make().engine.config.model)  # type: ignore[arg-type]
    with prefill:
        decode = make()
        key, _ = hand_over(prefill, decode, "d")
        assert_same(decode, key, plain, plain.submit("d", PROMPT, max_tokens=50, logprobs=0))
        assert decode.engine.wait_saved(10)
        wait_for(lambda: len(home.objects) == (150 + 49) // CHUNK)
    turn = [*PROMPT, *decode.tokens_so_far(key), 5, 6, 7]
    third = make()
    again = third.submit("turn", turn, logprobs=0)
    assert_same(third, again, plain, plain.submit("turn", turn, logprobs=0))
    assert report_of(third, again).cached_tokens == 192


def test_an_import_that_fails_is_computed(make: MakeEngine, home: ScriptedHome, plain: EngineUnderTest) -> None:
    fill(make(), PROMPT)
    decode = make()
    waiting = DirectImport()
    key = decode.submit("i", PROMPT, kv_import=waiting, logprobs=0)
    assert waiting.ready.wait(60)
    assert waiting.reservation is not None
    waiting.reservation.fail("lost")
    assert_same(decode, key, plain, plain.submit("i", PROMPT, logprobs=0))


@pytest.mark.parametrize("lost", [None, (2, 2)])
def test_rows_are_announced_as_they_arrive(
    make: MakeEngine,
    home: ScriptedHome,
    plain: EngineUnderTest,
    monkeypatch: pytest.MonkeyPatch,
    lost: tuple[int, int] | None,
) -> None:
    """The prefill worker computes while it loads; the decode worker gets each layer once it is there, and all of it
    where the load breaks off in the middle of the step."""
    monkeypatch.setattr(loading, "arrives_in_time", lambda *_: True)
    monkeypatch.setattr(loading, "GATE_S", 10.0)
    waiting = threading.Event()
    wait_layer = loading.Loading.wait_layer

    def noticing(load: loading.Loading, layer: int, timeout_s: float) -> bool:
        if layer == 2:
            waiting.set()
        return wait_layer(load, layer, timeout_s)

    monkeypatch.setattr(loading.Loading, "wait_layer", noticing)
    fill(make(), PROMPT)
    prefill, decode = make(), make()
    prefill.generate("measure", [7] * 20, max_tokens=1)
    home.free_layers = 2
    home.layers_may_come.clear()
    key, export = hand_over(prefill, decode, "early")
    assert waiting.wait(60)
    assert export.announced == [(0, 0, 150), (1, 0, 150)]
    home.fetches[-1].lost = lost
    home.layers_may_come.set()
    assert_same(decode, key, plain, plain.submit("early", PROMPT, max_tokens=50, logprobs=0))
    assert report_of(decode, key).cached_by_tier == {"host": 128 if lost is None else 64}
    assert report_of(decode, key).recompute_reason == ""
    assert ((2, 0, 150) in export.announced) == (lost is None), "what a broken step computed is not sent"
    covered = {(layer, row) for layer, start, stop in export.announced for row in range(start, stop)}
    assert covered == {(layer, row) for layer in range(3) for row in range(150)}


def test_a_load_that_ends_before_the_first_step_is_announced_at_once(
    make: MakeEngine, home: ScriptedHome, plain: EngineUnderTest, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(loading, "arrives_in_time", lambda *_: True)
    monkeypatch.setattr(loading, "GATE_S", 10.0)
    fill(make(), PROMPT)
    prefill, decode = make(), make()
    prefill.generate("measure", [7] * 20, max_tokens=1)
    home.free_layers = 2
    home.layers_may_come.clear()
    schedule, scheduler = prefill.engine.scheduler.schedule, prefill.engine.scheduler

    def without_steps(now: float) -> StepPlan:
        plan = schedule(now)
        if any(sequence.gated for sequence in scheduler.roster.running):
            plan.chunks.clear()  # as if others had used up the budget
        return plan

    monkeypatch.setattr(scheduler, "schedule", without_steps)
    key, export = hand_over(prefill, decode, "idle")
    wait_for(lambda: any(sequence.gated for sequence in list(scheduler.roster.running)))
    home.layers_may_come.set()
    assert_same(decode, key, plain, plain.submit("idle", PROMPT, max_tokens=50, logprobs=0))
    assert export.announced[:3] == [(0, 0, 128), (1, 0, 128), (2, 0, 128)]
