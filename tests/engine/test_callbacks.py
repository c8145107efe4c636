"""What the store and the mask processes post to the engine thread ends the requests that it is about and no other."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tandem.common.sampling import Constraint
from tandem.engine.store.cache import EngineStore
from tests.engine.store.scripted_home import ScriptedHome
from tests.engine_harness import EngineUnderTest, wait_for

PROMPT = [(i * 13) % 500 + 3 for i in range(70)]
VICTIM = [(i * 7) % 400 + 50 for i in range(70)]


@pytest.fixture
def engine(folder: Path) -> Iterator[EngineUnderTest]:
    with EngineUnderTest(folder, EngineStore(ScriptedHome(), chunk_tokens=32)) as running:
        yield running


def test_an_answer_of_the_store_that_raises_ends_its_request(
    engine: EngineUnderTest, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = engine.generate("alone", PROMPT, max_tokens=60)
    store = engine.engine._store
    assert store is not None
    answered = store._answered

    def failing(sequence: Any, lookup: Any) -> None:
        if sequence.key.request_id == "victim":
            raise KeyError("books")
        answered(sequence, lookup)

    monkeypatch.setattr(store, "_answered", failing)
    beside = engine.submit("beside", PROMPT, max_tokens=60)
    assert engine.last(engine.submit("victim", VICTIM)).error_code == "computation_failed"
    assert engine.tokens(beside) == expected


def test_a_save_that_cannot_be_taken_note_of_ends_nobody(
    engine: EngineUnderTest, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = engine.engine._store
    assert store is not None
    saver, saved, raised = store._saver, store._saver.ended, []

    def failing(save: Any) -> None:
        saved(save)
        raised.append(save)
        raise KeyError("books")

    monkeypatch.setattr(saver, "ended", failing)
    assert len(engine.generate("a", PROMPT, max_tokens=60)) == 60
    wait_for(lambda: raised)
    engine.engine.check_integrity()


@pytest.mark.parametrize("stage", ["_came", "receive"])
def test_masks_that_raise_end_requests_with_a_constraint_alone(
    engine: EngineUnderTest, stage: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = engine.generate("alone", PROMPT, max_tokens=60)
    guided = engine.engine._requests.guided

    def failing(*arguments: Any) -> None:
        raise KeyError("books")

    beside = engine.submit("beside", PROMPT, max_tokens=60)
    with monkeypatch.context() as patch:
        patch.setattr(*((guided, "_came", failing) if stage == "_came" else (guided.masks, "receive", failing)))
        victim = engine.submit("victim", VICTIM, constraint=Constraint("regex", "a+"))
        assert engine.last(victim).error_code in ("computation_failed", "internal")
    assert engine.tokens(beside) == expected
