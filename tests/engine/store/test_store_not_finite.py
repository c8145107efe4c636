"""Numbers that are not finite go neither into the store nor, where it holds some, into a request."""

from __future__ import annotations

import random

import pytest

from tests.engine.store.conftest import MakeEngine, fill, report_of
from tests.engine.store.scripted_home import ScriptedHome
from tests.engine.store.test_loading_from_the_store import stats
from tests.engine_harness import EngineUnderTest, wait_for

RNG = random.Random(13)
POISON = 7
PROMPT = [RNG.randrange(8, 512) for _ in range(150)]


def fill_with_infinity(engine: EngineUnderTest, home: ScriptedHome) -> None:
    home.put_may_begin.clear()
    engine.generate("spoilt", PROMPT, max_tokens=1)
    engine.engine.pool.storage[-1, 1, 1:] = float("inf")
    home.put_may_begin.set()
    assert engine.engine.wait_saved(10)


def test_of_a_prompt_with_a_damaged_token_only_what_comes_before_it_is_saved(
    make: MakeEngine, home: ScriptedHome
) -> None:
    engine = make(max_num_batched_tokens=80)
    engine.engine.loaded.decoder._embedding[POISON, 5] = float("nan")
    last = engine.last(engine.submit("damaged", [*PROMPT[:100], POISON, *PROMPT[100:]]))
    assert last.error_code == "computation_failed"
    assert engine.engine.wait_saved(10)
    before = set(home.objects)
    assert len(before) <= 3, "chunks of 32 tokens"
    fill(engine, PROMPT)
    assert before < set(home.objects)
    assert len(home.objects) == 4


def test_rows_that_became_infinite_are_not_saved(make: MakeEngine, home: ScriptedHome) -> None:
    engine = make()
    fill_with_infinity(engine, home)
    assert not home.objects
    wait_for(lambda: stats(engine).saves == {"failed": 4})


def test_a_stored_object_with_such_rows_is_dropped_and_the_prompt_computed(
    make: MakeEngine, home: ScriptedHome, plain: EngineUnderTest, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr("tandem.engine.store.saving.all_finite", lambda *_: True)
        fill_with_infinity(make(), home)
    assert len(home.objects) == 4
    second = make()
    key = second.submit("b", PROMPT, max_tokens=20)
    assert second.tokens(key) == plain.generate("b", PROMPT, max_tokens=20)
    assert report_of(second, key).cached_tokens == 0
    assert stats(second).loads == {"corrupt": 1}
    assert ["not finite" in why for _, why in home.quarantined] == [True]
