"""A request joins the batch while its last layers are still on their way; the step waits for each layer, or goes on
without the request."""

from __future__ import annotations

import random
import threading

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tandem.engine.schedule.sequence import Phase
from tandem.engine.store import loading
from tandem.engine.store.loading import arrives_in_time
from tests.engine.store.conftest import MakeEngine, assert_same, fill, report_of
from tests.engine.store.scripted_home import ScriptedHome
from tests.engine.store.test_loading_from_the_store import stats
from tests.engine_harness import EngineUnderTest, wait_for

RNG = random.Random(13)
PROMPT = [RNG.randrange(3, 512) for _ in range(150)]


@pytest.fixture
def eager(monkeypatch: pytest.MonkeyPatch) -> None:
    """Everybody joins as soon as two layers are there."""
    monkeypatch.setattr(loading, "arrives_in_time", lambda *_: True)
    monkeypatch.setattr(loading, "GATE_S", 10.0)


def gated(engine: EngineUnderTest) -> bool:
    return any(sequence.gated for sequence in list(engine.engine._requests.sequences.values()))


class Held:
    """A second engine whose load stops after two of three layers; it has measured itself, so it may overlap."""

    def __init__(self, make: MakeEngine, home: ScriptedHome) -> None:
        fill(make(), PROMPT)
        self.home = home
        self.engine = make()
        self.engine.generate("measure", [7] * 20, max_tokens=1)
        home.free_layers = 2
        home.layers_may_come.clear()

    def at_the_gate(self) -> threading.Event:
        """Set when a step waits for a layer that is not there."""
        waiting = threading.Event()
        original = loading.Loading.wait_layer

        def wait_layer(load: loading.Loading, layer: int, timeout_s: float) -> bool:
            if layer == 2:
                waiting.set()
            return original(load, layer, timeout_s)

        self._patch.setattr(loading.Loading, "wait_layer", wait_layer)
        return waiting

    _patch: pytest.MonkeyPatch


@pytest.fixture
def held(make: MakeEngine, home: ScriptedHome, eager: None, monkeypatch: pytest.MonkeyPatch) -> Held:
    result = Held(make, home)
    result._patch = monkeypatch
    return result


def test_a_step_waits_for_the_layer_that_it_reads(held: Held, plain: EngineUnderTest) -> None:
    waiting = held.at_the_gate()
    key = held.engine.submit("gated", PROMPT, max_tokens=20, logprobs=0)
    assert waiting.wait(60)
    assert held.engine.tokens_so_far(key) == []
    held.home.layers_may_come.set()
    expected = plain.submit("gated", PROMPT, max_tokens=20, logprobs=0)
    assert_same(held.engine, key, plain, expected)
    assert report_of(held.engine, key).cached_by_tier == {"host": 128}
    assert stats(held.engine).gates_missed == 0
    assert stats(held.engine).loads == {"ok": 1}


def test_a_gate_that_stays_shut_hurts_nobody_else(
    held: Held, plain: EngineUnderTest, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(loading, "GATE_S", 0.05)
    companion = held.engine.submit("companion", [9] * 20, max_tokens=150, logprobs=0)
    held.engine.wait_tokens(companion, 3)
    key = held.engine.submit("late", PROMPT, max_tokens=20, logprobs=0)
    wait_for(lambda: stats(held.engine).gates_missed == 1)
    seen = len(held.engine.tokens_so_far(companion))
    held.engine.wait_tokens(companion, seen + 5)
    assert held.engine.tokens_so_far(key) == []
    sequence = held.engine.engine._requests.sequences[key]
    assert held.engine.engine.blocks.cached_prefix(sequence.chain, 150) == 0, "nothing of the broken step is published"
    held.engine.engine.check_integrity()
    held.home.layers_may_come.set()
    for name, got, prompt, count in (("companion", companion, [9] * 20, 150), ("late", key, PROMPT, 20)):
        assert_same(held.engine, got, plain, plain.submit(name, prompt, max_tokens=count, logprobs=0))
    assert report_of(held.engine, key).cached_by_tier == {"host": 128}, "the load is waited for outside the steps"


def test_an_object_that_is_lost_at_the_gate(held: Held, plain: EngineUnderTest) -> None:
    waiting = held.at_the_gate()
    key = held.engine.submit("lost", PROMPT, max_tokens=20, logprobs=0)
    assert waiting.wait(60)
    held.home.fetches[-1].lost = (2, 2)
    held.home.layers_may_come.set()
    assert_same(held.engine, key, plain, plain.submit("lost", PROMPT, max_tokens=20, logprobs=0))
    assert report_of(held.engine, key).cached_by_tier == {"host": 64}
    assert stats(held.engine).gates_missed == 1


def test_a_gated_request_can_be_cancelled(held: Held) -> None:
    waiting = held.at_the_gate()
    key = held.engine.submit("gone", PROMPT)
    assert waiting.wait(60)
    held.engine.engine.cancel(key)
    last = held.engine.last(key)
    assert last.finish_reason is not None
    held.home.layers_may_come.set()


def test_a_load_after_which_only_decoding_is_left_has_to_be_over(held: Held, plain: EngineUnderTest) -> None:
    """Its step has no chunk, and only chunks wait for layers."""
    output = PROMPT[120:129]
    key = held.engine.submit("resumed", PROMPT[:120], output_token_ids=output, max_tokens=30)
    wait_for(lambda: held.home.fetches)
    held.engine.generate("companion", [9] * 20, max_tokens=20)
    assert held.engine.tokens_so_far(key) == []
    held.home.layers_may_come.set()
    expected = plain.generate("resumed", PROMPT[:120], output_token_ids=output, max_tokens=30)
    assert held.engine.tokens(key) == expected
    assert stats(held.engine).loaded_tokens == {"host": 128}


def test_without_overlap_nobody_is_gated(make: MakeEngine, home: ScriptedHome, eager: None) -> None:
    fill(make(), PROMPT)
    second = make(store={"overlap": False})
    second.generate("measure", [7] * 20, max_tokens=1)
    home.free_layers = 2
    home.layers_may_come.clear()
    key = second.submit("plain", PROMPT)
    wait_for(lambda: second.engine.scheduler.roster.loading)
    store = second.engine._store
    assert store is not None
    (under_way,) = [state.loading for state in store._states.values()]
    assert under_way is not None
    wait_for(lambda: under_way._layers == 2)
    second.engine.check_integrity()
    assert next(iter(second.engine._requests.sequences.values())).phase is Phase.LOADING
    home.layers_may_come.set()
    second.tokens(key)


def test_a_slow_stream_of_layers_is_overlapped_when_it_pays(make: MakeEngine, home: ScriptedHome) -> None:
    """With the real rule: 2 of 3 layers come at once, the third long before a long step needs it."""
    fill(make(), PROMPT)
    second = make()
    second.engine._meter.add(0, 100, 100.0)  # a token a second
    home.free_layers = 2
    home.layers_may_come.clear()
    key = second.submit("long", PROMPT)
    wait_for(lambda: gated(second) or stats(second).gates_missed)
    home.layers_may_come.set()
    second.tokens(key)


@given(
    ready=st.integers(1, 39),
    num_layers=st.integers(2, 40),
    layer_s=st.floats(0, 0.1),
    step_s=st.floats(0, 2),
)
def test_the_rule_agrees_with_playing_the_step(ready: int, num_layers: int, layer_s: float, step_s: float) -> None:
    ready = min(ready, num_layers - 1)
    in_time = all(
        (layer + 1 - ready) * layer_s * loading.MARGIN <= layer * step_s / num_layers + 1e-12
        for layer in range(ready, num_layers)
    )
    if arrives_in_time(ready, num_layers, layer_s, step_s):
        assert in_time
    assert arrives_in_time(ready, num_layers, 0.0, step_s)
    if step_s and layer_s > step_s:
        assert not arrives_in_time(ready, num_layers, layer_s, step_s)
