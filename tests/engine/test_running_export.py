"""A request that is handed over in the middle of its life goes on elsewhere as if nothing had happened."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest

from tandem.engine.request import FinishReason, Pooling, RequestKey, RequestOutput
from tests.engine_harness import TIMEOUT_S, DirectExport, DirectImport, EngineUnderTest

PROMPT = [(i * 13) % 500 + 3 for i in range(70)]
TOKENS = 60
DRAWN = {"temperature": 1.0, "seed": 5, "frequency_penalty": 0.5}


@pytest.fixture
def source(folder: Path) -> Iterator[EngineUnderTest]:
    with EngineUnderTest(folder) as running:
        yield running


@pytest.fixture
def target(folder: Path) -> Iterator[EngineUnderTest]:
    with EngineUnderTest(folder) as running:
        yield running


class Migration(DirectExport):
    """Has the request, as far as it is known when the export begins, go on in `elsewhere`."""

    def __init__(self, source: EngineUnderTest, elsewhere: EngineUnderTest, **options: Any) -> None:
        super().__init__(source.engine, DirectImport())
        self.elsewhere = elsewhere
        self.options = options
        self.tokens: list[int] = []
        self.begun_with = (0, 0)
        self.begun = threading.Event()
        self.ended = threading.Event()

    def begin(self, key: RequestKey, tokens: Sequence[int], slots: Sequence[int], cached_tokens: int) -> None:
        self.tokens, self.begun_with = list(tokens), (len(tokens), cached_tokens)
        assert len(slots) == len(tokens)
        prompt, output = self.tokens[: len(PROMPT)], self.tokens[len(PROMPT) :]
        self.elsewhere.submit("r", prompt, output_token_ids=output, kv_import=self.target, **self.options)
        super().begin(key, tokens, slots, cached_tokens)
        self.begun.set()

    def finished(self, output: RequestOutput) -> None:
        super().finished(output)
        self.ended.set()

    def aborted(self, reason: str) -> None:
        super().aborted(reason)
        self.ended.set()


@pytest.mark.parametrize(
    "options", [{}, {"temperature": 1.0, "seed": 5, "frequency_penalty": 0.5}], ids=["greedy", "drawn"]
)
@pytest.mark.parametrize("after", [1, 9, 11, 12, 33])
def test_a_request_that_decodes_goes_on_elsewhere(
    source: EngineUnderTest,
    target: EngineUnderTest,
    after: int,
    options: dict[str, Any],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Also where its next token begins a block: after 70 + 11 tokens 80 have KV."""
    options = options | {"max_tokens": TOKENS}
    expected = source.generate("alone", PROMPT, **options)
    source.slow_down(monkeypatch)
    migration = Migration(source, target, **options)
    key = source.submit("r", PROMPT, **options)
    source.wait_tokens(key, after)
    source.engine.export(key, migration)
    assert source.last(key).finish_reason is FinishReason.HANDED_OVER
    told_here = source.tokens_so_far(key)
    assert target.tokens(key) == expected[len(told_here) :]
    assert told_here == expected[: len(told_here)] == migration.tokens[len(PROMPT) :]
    known, there = migration.begun_with
    assert (known, there) == (len(PROMPT) + len(told_here), known - 1)


def test_each_request_beside_it_goes_on_here(source: EngineUnderTest, target: EngineUnderTest) -> None:
    expected = [source.generate(f"alone {i}", PROMPT[i:], max_tokens=TOKENS) for i in range(4)]
    keys = [source.submit(f"r{i}" if i else "r", PROMPT[i:], max_tokens=TOKENS) for i in range(4)]
    migration = Migration(source, target, max_tokens=TOKENS)
    source.engine.export(keys[0], migration)
    assert [source.tokens(key) for key in keys[1:]] == expected[1:]
    assert source.tokens(keys[0]) + target.tokens(keys[0]) == expected[0]


def test_a_request_that_waits_or_prefills_is_handed_over_with_its_first_token(
    source: EngineUnderTest, target: EngineUnderTest, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = source.generate("alone", PROMPT, max_tokens=TOKENS, cache_salt=b"x")
    migration = Migration(source, target, max_tokens=TOKENS)
    key = RequestKey("r", 0)
    with monkeypatch.context() as patch:
        schedule = source.engine.scheduler.schedule

        def attach_first(now: float) -> Any:
            if key in source.engine._requests.sequences and not migration.begun.is_set():
                source.engine._requests.export(key, migration)
            return schedule(now)

        patch.setattr(source.engine.scheduler, "schedule", attach_first)
        source.submit("r", PROMPT, max_tokens=TOKENS)
        assert migration.begun.wait(TIMEOUT_S)
    assert target.tokens(key) == expected
    assert source.last(key).finish_reason is FinishReason.HANDED_OVER
    assert source.tokens_so_far(key) == []


def test_what_cannot_be_handed_over_stays(source: EngineUnderTest, target: EngineUnderTest) -> None:
    gone = Migration(source, target)
    source.engine.export(RequestKey("nobody", 0), gone)
    assert gone.ended.wait(TIMEOUT_S)
    assert "ended" in (gone.aborted_because or "")
    vector = source.submit("vector", PROMPT * 3, pooling=Pooling.MEAN)
    pooled = Migration(source, target)
    source.engine.export(vector, pooled)
    assert pooled.ended.wait(TIMEOUT_S)
    assert pooled.aborted_because
    assert source.last(vector).embedding


def test_without_a_block_for_the_next_token_a_request_stays(
    source: EngineUnderTest, target: EngineUnderTest, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = source.generate("alone", PROMPT, max_tokens=TOKENS)
    source.slow_down(monkeypatch)
    key = source.submit("r", PROMPT, max_tokens=TOKENS)
    source.wait_tokens(key, 3)
    exports = source.engine._requests.exports
    monkeypatch.setattr(exports, "_has_room", lambda sequence: False)
    migration = Migration(source, target)
    source.engine.export(key, migration)
    assert migration.ended.wait(TIMEOUT_S)
    assert "no block" in (migration.aborted_because or "")
    assert source.tokens(key) == expected


@pytest.mark.parametrize("method", ["begin", "layer_ready", "finished"])
def test_an_exporter_that_raises_ends_its_request_alone(
    source: EngineUnderTest, target: EngineUnderTest, method: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tandem.engine.handover.exports.EXPORT_LEASE_S", 0.2)
    expected = source.generate("alone", PROMPT, max_tokens=TOKENS)
    source.slow_down(monkeypatch)
    beside = source.submit("beside", PROMPT, max_tokens=TOKENS)
    key = source.submit("r", PROMPT, max_tokens=TOKENS)
    source.wait_tokens(key, 3)

    class Broken(DirectExport):
        def _copy(self, layer: int, start: int, stop: int) -> None:
            pass

    broken = Broken(source.engine, DirectImport())
    setattr(broken, method, lambda *arguments: 1 / 0)
    source.engine.export(key, broken)
    assert source.last(key).error_code == "internal"
    assert source.tokens(beside) == expected
