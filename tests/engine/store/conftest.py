"""A model, an engine without a store to compare with, and engines that share one scripted store node."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest

from tandem.engine.request import PromptReport, RequestKey
from tandem.engine.store import flow
from tandem.engine.store.cache import EngineStore
from tandem.kvstore.cost import LinkCosts
from tests.engine.store.scripted_home import ScriptedHome
from tests.engine_harness import EngineUnderTest, tiny_llama, wait_for

CHUNK = 32
MakeEngine = Callable[..., EngineUnderTest]


@pytest.fixture(scope="package")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_llama(tmp_path_factory.mktemp("models") / "llama")


class Reference(EngineUnderTest):
    """Computes everything itself. Tests share it, so it numbers their requests."""

    def submit(self, name: str, prompt: Sequence[int], **options: Any) -> RequestKey:
        return super().submit(f"{name}-{len(self.outputs)}", prompt, **options)


@pytest.fixture(scope="package")
def plain(folder: Path) -> Iterator[EngineUnderTest]:
    with Reference(folder, enable_prefix_caching=False) as engine:
        yield engine


@pytest.fixture(autouse=True)
def patient(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a busy machine nothing is given up for being slow. Tests of that set limits of their own."""
    monkeypatch.setattr(flow, "LOOKUP_S", 10.0)
    monkeypatch.setattr(flow, "LEAST_LOAD_S", 5.0)
    monkeypatch.setattr(flow, "UNKNOWN_LOAD_S", 5.0)


class UnmovedLinks(LinkCosts):
    """A copy that a busy machine held up does not make computing look faster from then on."""

    def observe(self, link: str, num_bytes: int, num_objects: int, seconds: float) -> None:
        pass


@pytest.fixture
def home() -> Iterator[ScriptedHome]:
    scripted = ScriptedHome()
    yield scripted
    for event in (scripted.locate_may_answer, scripted.layers_may_come, scripted.put_may_begin):
        event.set()
    wait_for(lambda: not scripted.open_fetches)


@pytest.fixture
def make(folder: Path, home: ScriptedHome) -> Iterator[MakeEngine]:
    """Engines with the store; each is checked and stopped at the end, and leaves no thread behind."""
    before = set(threading.enumerate())
    engines: list[EngineUnderTest] = []

    def make(store: dict[str, Any] | None = None, **settings: Any) -> EngineUnderTest:
        options: dict[str, Any] = {"chunk_tokens": CHUNK, "worker_id": "w1", "model": "tiny", "links": UnmovedLinks()}
        options |= store or {}
        engine = EngineUnderTest(folder, EngineStore(home, **options), **settings)
        engine.engine.start()
        engines.append(engine)
        return engine

    yield make
    for event in (home.locate_may_answer, home.layers_may_come, home.put_may_begin):
        event.set()
    for engine in engines:
        engine.__exit__(None, None, None)
        assert engine.engine._store is not None
        assert not engine.engine._store._states, "what is kept of a sequence goes with it"
    wait_for(lambda: not set(threading.enumerate()) - before)


def report_of(engine: EngineUnderTest, key: RequestKey) -> PromptReport:
    report = next(output.prompt for output in engine.outputs[key] if output.prompt is not None)
    assert sum(report.cached_by_tier.values()) == report.cached_tokens
    return report


def fill(engine: EngineUnderTest, prompt: list[int], **options: Any) -> None:
    """Computes `prompt` and waits until it is in the store."""
    engine.generate(f"fill{len(engine.outputs)}", prompt, **({"max_tokens": 1} | options))
    assert engine.engine.wait_saved(10)


def scores(engine: EngineUnderTest, key: RequestKey) -> list[float]:
    return [entry.logprob for output in engine.outputs[key] for entry in output.logprobs]


def assert_same(engine: EngineUnderTest, key: RequestKey, plain: EngineUnderTest, expected: RequestKey) -> None:
    """Equal tokens; equal log-probabilities, bit for bit where this processor computes a row the same in any batch."""
    assert engine.tokens(key) == plain.tokens(expected)
    got, wanted = scores(engine, key), scores(plain, expected)
    if plain.engine.loaded.row_invariant:
        assert got == wanted
    else:
        assert got == pytest.approx(wanted, abs=1e-4)
