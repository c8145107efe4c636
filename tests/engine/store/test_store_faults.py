"""Whatever the store does wrong, the tokens are those that computing gives, and what went wrong is counted."""

from __future__ import annotations

import random
import threading
from collections.abc import Callable

import pytest

from tandem.engine.store import flow
from tandem.kvstore.bundle import transcode
from tandem.kvstore.interfaces import ObjectKey, Refusal
from tests.engine.store.conftest import CHUNK, MakeEngine, assert_same, fill, report_of
from tests.engine.store.scripted_home import ScriptedHome
from tests.engine.store.test_loading_from_the_store import stats
from tests.engine_harness import EngineUnderTest, wait_for

RNG = random.Random(12)
PROMPT = [RNG.randrange(3, 512) for _ in range(150)]
Fault = Callable[[ScriptedHome, list[ObjectKey]], None]


def corrupt_layer(layer: int, index: int) -> Fault:
    return lambda home, keys: home.flip(keys[index], layer)


def lose(index: int, layer: int) -> Fault:
    def fault(home: ScriptedHome, keys: list[ObjectKey]) -> None:
        home.lost = (index, layer)

    return fault


def truncate(home: ScriptedHome, keys: list[ObjectKey]) -> None:
    home.change(keys[1], home.objects[keys[1]][1][:-64])


def swap(home: ScriptedHome, keys: list[ObjectKey]) -> None:
    home.change(keys[1], home.objects[keys[2]][1])


def rubbish(home: ScriptedHome, keys: list[ObjectKey]) -> None:
    home.change(keys[0], b"\0" * 5000)


def near(home: ScriptedHome, keys: list[ObjectKey]) -> None:
    encoded = transcode(memoryview(home.objects[keys[2]][1]), "kivi-int8")
    assert encoded is not None
    home.change(keys[2], bytes(encoded))


def vanish(home: ScriptedHome, keys: list[ObjectKey]) -> None:
    """It is located, and gone by the time of the fetch."""
    locate = home.locate

    def lying(wanted: list[ObjectKey]) -> list[object]:
        found = locate(wanted)
        home.objects.pop(keys[1], None)
        return found  # type: ignore[return-value]

    home.locate = lying  # type: ignore[assignment, method-assign]


def raising(name: str) -> Fault:
    return lambda home, keys: home.raises.add(name)


@pytest.mark.parametrize(
    ("fault", "outcome", "loaded"),
    [
        (corrupt_layer(0, 0), "corrupt", 0),
        (corrupt_layer(2, 0), "corrupt", 0),
        (corrupt_layer(1, 2), "corrupt", 2 * CHUNK),
        (lose(0, 0), "missing", 0),
        (lose(2, 1), "missing", 2 * CHUNK),
        (lose(3, 2), "missing", 3 * CHUNK),
        (truncate, "corrupt", CHUNK),
        (swap, "mismatch", CHUNK),
        (rubbish, "corrupt", 0),
        (near, "fidelity", 2 * CHUNK),
        (vanish, "missing", CHUNK),
        (raising("fetch"), "", 0),
        (raising("locate"), "", 0),
        (raising("wait"), "internal", 0),
    ],
    ids=lambda value: getattr(value, "__qualname__", value),
)
@pytest.mark.parametrize("early", [False, True])
def test_a_fault_becomes_a_recompute(
    make: MakeEngine,
    home: ScriptedHome,
    plain: EngineUnderTest,
    monkeypatch: pytest.MonkeyPatch,
    fault: Fault,
    outcome: str,
    loaded: int,
    early: bool,
) -> None:
    if early:
        monkeypatch.setattr("tandem.engine.store.loading.arrives_in_time", lambda *_: True)
    fill(make(), PROMPT)
    keys = list(home.objects)
    fault(home, keys)
    second = make()
    second.generate("measure", [7] * 20, max_tokens=1)
    companion = second.submit("companion", [9] * 20, max_tokens=40)
    key = second.submit("f", PROMPT, max_tokens=20, logprobs=0)
    expected = plain.submit("f", PROMPT, max_tokens=20, logprobs=0)
    assert_same(second, key, plain, expected)
    assert second.tokens(companion) == plain.generate("companion", [9] * 20, max_tokens=40)
    assert report_of(second, key).cached_tokens == loaded
    if outcome:
        assert stats(second).loads == {outcome: 1}
    assert len(home.quarantined) == (outcome in ("corrupt", "mismatch"))
    home.raises.clear()
    home.lost = None


def test_what_was_quarantined_is_saved_again(make: MakeEngine, home: ScriptedHome) -> None:
    fill(make(), PROMPT)
    keys = list(home.objects)
    home.flip(keys[1], 0)
    fill(make(), PROMPT)
    assert set(home.objects) == set(keys)


def test_a_slow_look_up_is_a_miss(
    make: MakeEngine, home: ScriptedHome, plain: EngineUnderTest, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(flow, "LOOKUP_S", 0.05)
    fill(make(), PROMPT)
    second = make()
    home.locate_may_answer.clear()
    assert second.generate("late", PROMPT) == plain.generate("late", PROMPT)
    assert stats(second).lookups == {"slow": 1}
    home.locate_may_answer.set()


def test_a_slow_load_is_given_up(
    make: MakeEngine, home: ScriptedHome, plain: EngineUnderTest, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(flow, "UNKNOWN_LOAD_S", 0.2)
    monkeypatch.setattr(flow, "LEAST_LOAD_S", 0.2)
    fill(make(), PROMPT)
    second = make()
    home.layers_may_come.clear()
    home.free_layers = 1
    key = second.submit("slow", PROMPT)
    assert second.tokens(key) == plain.generate("slow", PROMPT)
    assert stats(second).loads == {"slow": 1}
    assert report_of(second, key).cached_tokens == 0


def test_a_load_whose_thread_hangs_is_given_up_by_the_engine(
    make: MakeEngine, home: ScriptedHome, plain: EngineUnderTest, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(flow, "UNKNOWN_LOAD_S", 0.1)
    monkeypatch.setattr(flow, "LEAST_LOAD_S", 0.1)
    monkeypatch.setattr(flow, "STUCK_S", 0.1)
    fill(make(), PROMPT)
    second = make()
    fetch = home.fetch

    def hanging(located: list[object], overlap_s: float) -> object:
        result = fetch(located, overlap_s)  # type: ignore[arg-type]
        monkeypatch.setattr(result, "wait", lambda *_: home.layers_may_come.wait(60))
        return result

    monkeypatch.setattr(home, "fetch", hanging)
    home.layers_may_come.clear()
    assert second.generate("hang", PROMPT) == plain.generate("hang", PROMPT)
    assert stats(second).loads["stuck"] == 1
    home.layers_may_come.set()


@pytest.mark.parametrize("refusal", list(Refusal))
def test_refused_puts_change_nothing(
    make: MakeEngine, home: ScriptedHome, plain: EngineUnderTest, refusal: Refusal
) -> None:
    home.refusal = refusal
    first = make()
    assert first.generate("refused", PROMPT) == plain.generate("refused", PROMPT)
    assert first.engine.wait_saved(5)
    wait_for(lambda: stats(first).saves == {refusal.value: 4})
    assert not home.objects


@pytest.mark.parametrize("fault", ["lapsed", "begin_put", "commit"])
def test_a_failed_save_is_counted_and_tried_again_later(make: MakeEngine, home: ScriptedHome, fault: str) -> None:
    first = make()
    home.lapse = fault == "lapsed"
    home.raises = {fault}
    first.generate("a", PROMPT, max_tokens=1)
    assert first.engine.wait_saved(5)
    wait_for(lambda: stats(first).saves == {"lapsed" if fault == "lapsed" else "failed": 4})
    home.lapse, home.raises = False, set()
    first.generate("b", PROMPT, max_tokens=1)
    assert first.engine.wait_saved(5)
    assert len(home.objects) == 4


def test_only_so_many_requests_prefetch(
    make: MakeEngine, home: ScriptedHome, plain: EngineUnderTest, monkeypatch: pytest.MonkeyPatch
) -> None:
    prompts = [[RNG.randrange(3, 512) for _ in range(70)] for _ in range(6)]
    filler = make()
    for prompt in prompts:
        fill(filler, prompt)
    second = make(max_num_seqs=1, max_num_batched_tokens=64)
    assert second.engine._store is not None
    second.engine._store._store.prefetches = threading.BoundedSemaphore(2)
    second.slow_down(monkeypatch)
    first = second.submit("running", [5] * 20, max_tokens=900)
    second.wait_tokens(first, 1)
    keys = [second.submit(f"w{i}", prompt) for i, prompt in enumerate(prompts)]
    wait_for(lambda: stats(second).lookups.get("fetch", 0) == 6)
    assert home.open_fetches == 2
    second.engine.cancel(first)
    assert [second.tokens(key) for key in keys] == [plain.generate(f"w{i}", p) for i, p in enumerate(prompts)]
    assert all(report_of(second, key).cached_tokens == 64 for key in keys)
