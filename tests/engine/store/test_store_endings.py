"""Cancel, deadline and stop in every phase that a request with the store goes through: nothing is left behind."""

from __future__ import annotations

import random
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from tandem.engine.request import FinishReason, RequestKey
from tandem.engine.schedule.sequence import Phase
from tandem.engine.store import loading
from tandem.engine.store.cache import EngineStore
from tandem.engine.store.state import StoreState
from tests.engine.store.conftest import CHUNK, MakeEngine, fill
from tests.engine.store.scripted_home import ScriptedHome
from tests.engine_harness import DirectExport, DirectImport, EngineUnderTest, wait_for

RNG = random.Random(14)
PROMPT = [RNG.randrange(3, 512) for _ in range(150)]
PHASES = ("lookup", "waiting", "loading", "gated")


def reach(phase: str, engine: EngineUnderTest, home: ScriptedHome, monkeypatch: pytest.MonkeyPatch) -> None:
    """Sets the scene in which the next request stops in `phase`."""
    engine.generate("measure", [7] * 20, max_tokens=1)
    monkeypatch.setattr("tandem.engine.store.flow.LOOKUP_S", 20.0)
    monkeypatch.setattr("tandem.engine.store.flow.LEAST_LOAD_S", 20.0)
    monkeypatch.setattr("tandem.engine.store.flow.MOST_LOAD_S", 20.0)
    if phase == "lookup":
        home.locate_may_answer.clear()
    elif phase == "waiting":
        engine.slow_down(monkeypatch)
        key = engine.submit("in the way", [8] * 20, max_tokens=900)
        engine.wait_tokens(key, 1)
    else:
        home.layers_may_come.clear()
        home.free_layers = 2 if phase == "gated" else 1
        monkeypatch.setattr(loading, "arrives_in_time", lambda *_: phase == "gated")
        monkeypatch.setattr(loading, "GATE_S", 0.2)


def state_of(engine: EngineUnderTest, key: RequestKey) -> StoreState | None:
    assert engine.engine._store is not None
    return engine.engine._store._states.get(key)


def wait_phase(phase: str, engine: EngineUnderTest, key: RequestKey) -> None:
    expected = {"lookup": Phase.LOOKUP, "waiting": Phase.WAITING, "loading": Phase.LOADING}

    def there() -> bool:
        sequence = engine.engine._requests.sequences.get(key)
        if sequence is None:
            return False
        if phase == "gated":
            return sequence.gated
        if phase == "waiting" and ((state := state_of(engine, key)) is None or state.lookup is None):
            return False
        return sequence.phase is expected[phase]

    wait_for(there)


def open_up(home: ScriptedHome) -> None:
    home.locate_may_answer.set()
    home.layers_may_come.set()


@pytest.mark.parametrize("phase", PHASES)
@pytest.mark.parametrize("ending", ["cancel", "deadline"])
def test_a_request_ends_in_any_phase(
    make: MakeEngine, home: ScriptedHome, monkeypatch: pytest.MonkeyPatch, phase: str, ending: str
) -> None:
    fill(make(), PROMPT)
    engine = make(max_num_seqs=1)
    reach(phase, engine, home, monkeypatch)
    deadline = time.monotonic() + 3600 if ending == "deadline" else None
    key = engine.submit("ends", PROMPT, deadline=deadline)
    wait_phase(phase, engine, key)
    engine.engine.check_integrity()
    if ending == "cancel":
        engine.engine.cancel(key)
        assert engine.last(key).finish_reason is FinishReason.CANCELLED
    else:
        engine.expire(key)
        assert engine.last(key).error_code == "deadline_exceeded"
    for other in list(engine.engine._requests.sequences):
        engine.engine.cancel(other)
    engine.engine.check_integrity()
    open_up(home)
    wait_for(lambda: not home.open_fetches)
    assert engine.generate("after", PROMPT)


def test_nothing_is_written_once_a_request_has_ended(
    make: MakeEngine, home: ScriptedHome, monkeypatch: pytest.MonkeyPatch
) -> None:
    fill(make(), PROMPT)
    engine = make()
    reach("loading", engine, home, monkeypatch)
    monkeypatch.setattr(loading, "POLL_S", 10.0)  # the loader is still waiting when the bytes come
    key = engine.submit("ends", PROMPT)
    wait_phase("loading", engine, key)
    state = state_of(engine, key)
    assert state is not None
    under_way = state.loading
    assert under_way is not None
    wait_for(lambda: under_way._layers == 1)
    engine.engine.cancel(key)
    engine.last(key)
    before = engine.engine.pool.storage.clone()
    home.layers_may_come.set()
    wait_for(lambda: under_way._over)
    assert engine.engine.pool.storage.equal(before)


@pytest.mark.parametrize("phase", PHASES)
def test_stop_in_any_phase(
    folder: Path, make: MakeEngine, home: ScriptedHome, monkeypatch: pytest.MonkeyPatch, phase: str
) -> None:
    monkeypatch.setattr("tandem.engine.store.flow.STOP_S", 0.5)
    fill(make(), PROMPT)
    engine = EngineUnderTest(folder, EngineStore(home, chunk_tokens=CHUNK), max_num_seqs=1)
    engine.engine.start()
    reach(phase, engine, home, monkeypatch)
    key = engine.submit("stops", PROMPT)
    wait_phase(phase, engine, key)
    assert engine.engine.stop(10.0)
    assert engine.last(key).error_code == "unavailable"
    engine.engine.check_integrity()
    assert engine.engine.status().free_blocks == engine.engine.status().total_blocks
    open_up(home)
    wait_for(lambda: not home.open_fetches)


def test_stop_before_start_ends_what_was_queued(folder: Path, home: ScriptedHome) -> None:
    engine = EngineUnderTest(folder, EngineStore(home, chunk_tokens=CHUNK))
    key = engine.submit("a", PROMPT)
    assert engine.engine.stop(1.0)
    assert engine.last(key).error_code == "unavailable"


@pytest.mark.parametrize("phase", PHASES[:3])  # once it is gated, it has begun
def test_an_export_that_ends_before_it_began(
    make: MakeEngine, home: ScriptedHome, monkeypatch: pytest.MonkeyPatch, phase: str
) -> None:
    fill(make(), PROMPT)
    engine = make(max_num_seqs=1)
    reach(phase, engine, home, monkeypatch)
    export = DirectExport(engine.engine, DirectImport())
    key = engine.submit("export", PROMPT, kv_export=export)
    wait_phase(phase, engine, key)
    engine.engine.cancel(key)
    assert engine.last(key).finish_reason is FinishReason.CANCELLED
    assert export.aborted_because is not None
    engine.engine.release(key)
    for other in list(engine.engine._requests.sequences):
        engine.engine.cancel(other)
    open_up(home)
    engine.check_all_free()


def hold_saver(home: ScriptedHome, engine: EngineUnderTest, prompt: list[int]) -> None:
    home.put_may_begin.clear()
    puts = len(home.puts)
    engine.generate("held", prompt, max_tokens=1)
    wait_for(lambda: len(home.puts) > puts)


def test_blocks_stay_as_they_are_until_they_are_saved(
    make: MakeEngine, home: ScriptedHome, plain: EngineUnderTest
) -> None:
    block_bytes = 2 * 3 * 16 * 32 * 4
    first = make(kv_cache_bytes=44 * block_bytes, max_model_len=600)
    hold_saver(home, first, PROMPT)
    assert first.engine.blocks.num_retained == 8
    first.engine.check_integrity()
    for index in range(4):  # fills the pool several times over
        first.generate(f"fill{index}", [RNG.randrange(3, 512) for _ in range(500)], max_tokens=1)
    home.put_may_begin.set()
    assert first.engine.wait_saved(10)
    second = make()
    key = second.submit("reader", PROMPT)
    assert second.tokens(key) == plain.generate("reader", PROMPT)
    report = second.outputs[key][0].prompt
    assert report is not None
    assert report.cached_tokens == 128


def test_at_most_a_quarter_of_the_pool_waits_to_be_saved(make: MakeEngine, home: ScriptedHome) -> None:
    block_bytes = 2 * 3 * 16 * 32 * 4
    first = make(kv_cache_bytes=41 * block_bytes, max_model_len=600)
    hold_saver(home, first, [RNG.randrange(3, 512) for _ in range(500)])
    assert first.engine.blocks.num_retained == 10
    home.put_may_begin.set()
    assert first.engine.wait_saved(10)
    assert first.engine._store is not None
    counts = first.engine._store._store.stats
    wait_for(lambda: counts().saves == {"saved": 5, "dropped": 10})


def test_the_queue_of_saves_is_bounded(make: MakeEngine, home: ScriptedHome) -> None:
    first = make(store={"save_queue": 2})
    hold_saver(home, first, PROMPT)
    home.put_may_begin.set()
    assert first.engine.wait_saved(10)
    assert len(home.objects) in (2, 3)


def test_stop_while_a_save_hangs_in_the_store(
    folder: Path, home: ScriptedHome, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr("tandem.engine.store.flow.STOP_S", 0.2)
    engine = EngineUnderTest(folder, EngineStore(home, chunk_tokens=CHUNK))
    engine.engine.start()
    hold_saver(home, engine, PROMPT)
    assert engine.engine.stop(10.0)
    assert "does not return" in caplog.text
    engine.engine.check_integrity()
    assert engine.engine.blocks.num_retained == 2, "what hangs keeps its blocks"
    home.put_may_begin.set()
    wait_for(lambda: not [thread for thread in threading.enumerate() if thread.name.startswith("kv-")])


def test_stop_during_saves_keeps_what_is_complete(folder: Path, home: ScriptedHome) -> None:
    engine = EngineUnderTest(folder, EngineStore(home, chunk_tokens=CHUNK))
    engine.engine.start()
    hold_saver(home, engine, PROMPT)
    stop: Callable[[], None] = home.put_may_begin.set
    threading.Timer(0.2, stop).start()
    assert engine.engine.stop(10.0)
    engine.engine.check_integrity()
    assert engine.engine.blocks.num_retained == 0
    assert home.commits == len(home.objects) == 1


def test_what_a_request_shares_is_saved_once(make: MakeEngine, home: ScriptedHome) -> None:
    first = make()
    for index in range(5):
        fill(first, [*PROMPT[:130], index + 3])
    assert len(home.puts) == 4
    infos = [info for _, info in home.puts]
    assert {(info.owner, info.model, info.num_tokens) for info in infos} == {("default", "tiny", CHUNK)}
    assert all(info.size == len(home.objects[key][1]) for key, info in home.puts)
    assert infos[-1].recompute_s >= 0.0


def test_a_tenants_kv_is_charged_to_it(make: MakeEngine, home: ScriptedHome) -> None:
    fill(make(), PROMPT, tenant="acme")
    assert {info.owner for _, info in home.puts} == {"acme"}
