"""Whatever one request does, only that request fails: attacks beside bystanders whose answers must not change."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from tandem.common.errors import TandemError
from tandem.engine.request import FinishReason, Pooling, RequestOutput
from tests.engine_harness import DirectExport, DirectImport, EngineUnderTest
from tests.models import VOCAB_SIZE

PROMPT = [(i * 13) % 500 + 3 for i in range(60)]
BYSTANDERS: list[dict[str, Any]] = [
    {},
    {"temperature": 1.0, "seed": 5, "top_p": 0.9},
    {"logprobs": 2, "frequency_penalty": 0.5, "repetition_penalty": 1.2},
]


class Beside:
    """Bystanders that answer while something is done to the engine that they are in."""

    def __init__(self, engine: EngineUnderTest) -> None:
        self._engine = engine
        self.alone = [
            engine.generate(f"alone {i}", PROMPT[i:], max_tokens=60, **options) for i, options in enumerate(BYSTANDERS)
        ]

    def __enter__(self) -> None:
        self.keys = [
            self._engine.submit(f"bystander {i}", PROMPT[i:], max_tokens=60, **options)
            for i, options in enumerate(BYSTANDERS)
        ]

    def __exit__(self, kind: Any, error: Any, traceback: Any) -> None:
        if kind is None:
            assert [self._engine.tokens(key) for key in self.keys] == self.alone


ATTACKS: dict[str, dict[str, Any]] = {
    "a penalty that overflows": {"repetition_penalty": 1e-40},
    "a temperature that is no number": {"temperature": float("nan")},
    "a bias that is no number": {"logit_bias": {5: float("nan")}},
    "an infinite penalty": {"presence_penalty": float("inf")},
    "stop tokens that cover the vocabulary": {"stop_token_ids": tuple(range(VOCAB_SIZE)), "min_tokens": 3},
    "bad words that cover the vocabulary": {"bad_words": tuple((token,) for token in range(VOCAB_SIZE))},
    "bad pairs that cover the vocabulary": {
        "bad_words": tuple((9, token) for token in range(VOCAB_SIZE)),
        "logit_bias": {9: 100.0},
    },
    "bias against the whole vocabulary, and none allowed": {
        "logit_bias": dict.fromkeys(range(VOCAB_SIZE), -100.0),
        "allowed_token_ids": (4, 5),
        "bad_words": ((4,), (5,)),
    },
    "more alternatives than there are": {"logprobs": 4_000_000_000},
}


@pytest.mark.parametrize("drawn", [{"temperature": 0.0}, {"temperature": 1.0}], ids=["greedy", "drawn"])
@pytest.mark.parametrize("attack", ATTACKS)
def test_a_hostile_request_fails_alone_with_an_error_of_its_own(
    engine: EngineUnderTest, attack: str, drawn: dict[str, Any]
) -> None:
    with Beside(engine):
        lasts = [engine.last(engine.submit(f"attack {i}", PROMPT, **(drawn | ATTACKS[attack]))) for i in range(3)]
    for last in lasts:
        assert (last.finish_reason, last.error_code) == (FinishReason.ERROR, "invalid_request"), last.error_message


EXTREMES: list[dict[str, Any]] = [
    {"repetition_penalty": 0.01, "temperature": 1e-300, "presence_penalty": -2.0, "frequency_penalty": -2.0},
    {"repetition_penalty": 10.0, "temperature": 5e-324, "top_p": 5e-324, "min_p": 1.0, "top_k": 2**31 - 1},
    {"logit_bias": dict.fromkeys(range(VOCAB_SIZE), -100.0), "temperature": 1e-40, "repetition_penalty": 0.01},
    {"logit_bias": dict.fromkeys(range(VOCAB_SIZE), 100.0), "temperature": 2.0, "logprobs": 20, "prompt_logprobs": 20},
    {"stop_token_ids": tuple(range(1, VOCAB_SIZE)), "min_tokens": 8, "max_tokens": 8},
    {"bad_words": tuple((token,) for token in range(1, VOCAB_SIZE)), "logprobs": 20, "top_k": 1},
]


@pytest.mark.parametrize("options", EXTREMES, ids=lambda options: " ".join(options))
def test_extreme_but_valid_settings_get_an_answer(engine: EngineUnderTest, options: dict[str, Any]) -> None:
    with Beside(engine):
        for i in range(3):
            assert engine.generate(f"extreme {i}", PROMPT, **({"temperature": 1.0, "seed": i} | options))


POISON = 7
"""A token that does harm where it is computed."""
CLEAN = [token for token in PROMPT if token != POISON]
POISONED = [*CLEAN[:40], POISON, *CLEAN[40:50]]


def poison_forward(engine: EngineUnderTest, monkeypatch: pytest.MonkeyPatch, error: type[Exception]) -> list[int]:
    """Batches that hold POISON raise, in the middle of the model. Returns the sizes of all batches from now on."""
    decoder, rows = engine.engine.loaded.decoder, []
    forward = decoder.forward

    def failing(batch: Any, pool: Any, on_layer: Any, gate: Any) -> Any:
        rows.append(len(batch.token_ids))
        logits = forward(batch, pool, on_layer, gate)
        if (batch.token_ids == POISON).any():
            raise error("broken kernel")
        return logits

    monkeypatch.setattr(decoder, "forward", failing)
    return rows


@pytest.mark.parametrize("error", [RuntimeError, MemoryError, IndexError])
@pytest.mark.parametrize("count", [1, 5])
def test_those_that_make_a_step_raise_end_and_the_others_are_computed_again(
    engine: EngineUnderTest,
    error: type[Exception],
    count: int,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    beside = Beside(engine)
    rows = poison_forward(engine, monkeypatch, error)
    with beside:
        attacks = [engine.submit(f"attack {i}", POISONED, logprobs=1, prompt_logprobs=1) for i in range(count)]
        lasts = [engine.last(key) for key in attacks]
    for last in lasts:
        assert last.error_code in ("computation_failed", "internal")
        assert error.__name__ in last.error_message
    assert "a step failed" in caplog.text
    assert len(rows) < 60 + 2 * (count + len(BYSTANDERS)) + 20, "the work is bounded"
    engine.check_all_free()


def test_a_token_of_the_output_can_be_the_one_that_raises(
    engine: EngineUnderTest, monkeypatch: pytest.MonkeyPatch
) -> None:
    beside = Beside(engine)
    poison_forward(engine, monkeypatch, RuntimeError)
    with beside:
        engine.wait_tokens(beside.keys[0], 3)
        last = engine.last(engine.submit("attack", CLEAN, logit_bias={POISON: 100.0}))
    assert last.error_code == "computation_failed"
    assert engine.tokens_so_far(last.key) == [POISON]


def test_a_step_that_raises_once_ends_nobody(engine: EngineUnderTest, monkeypatch: pytest.MonkeyPatch) -> None:
    beside = Beside(engine)
    decoder, calls = engine.engine.loaded.decoder, 0
    forward = decoder.forward

    def failing(*arguments: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls % 7 == 3:
            raise MemoryError("out of memory")
        return forward(*arguments)

    monkeypatch.setattr(decoder, "forward", failing)
    with beside:
        pass
    assert engine.generate("one alone", PROMPT) == beside.alone[0][:8]


def test_where_nothing_can_be_computed_the_failure_is_the_workers(
    engine: EngineUnderTest, monkeypatch: pytest.MonkeyPatch
) -> None:
    """So that the router goes on elsewhere."""

    def failing(*arguments: Any) -> Any:
        raise RuntimeError("no device")

    with monkeypatch.context() as patch:
        patch.setattr(engine.engine.loaded.decoder, "forward", failing)
        keys = [engine.submit(f"r{i}", PROMPT) for i in range(5)]
        assert [engine.last(key).error_code for key in keys] == ["internal"] * 5
    assert engine.generate("after", PROMPT)


@pytest.mark.parametrize("stage", ["_edit", "_choose", "_count"])
def test_a_row_that_makes_the_sampler_raise_ends_alone(
    engine: EngineUnderTest, stage: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    beside = Beside(engine)
    sampler = engine.engine._executor._sampler  # type: ignore[attr-defined]
    original = getattr(sampler, stage)

    def failing(first: Any, batch: Any) -> Any:
        if any(each.sequence.key.request_id == "attack" for each in batch):
            raise IndexError("out of range")
        return original(first, batch)

    monkeypatch.setattr(sampler, stage, failing)
    with beside:
        engine.wait_tokens(beside.keys[0], 2)
        last = engine.last(engine.submit("attack", PROMPT, temperature=1.0, logprobs=2))
    assert last.error_code == "computation_failed"


def test_a_request_whose_token_cannot_be_taken_note_of_ends_alone(
    engine: EngineUnderTest, monkeypatch: pytest.MonkeyPatch
) -> None:
    beside = Beside(engine)
    advance = engine.engine._requests.advance

    def failing(chosen: Any) -> None:
        if chosen.sequence.key.request_id == "attack":
            raise KeyError("guide")
        advance(chosen)

    monkeypatch.setattr(engine.engine._requests, "advance", failing)
    with beside:
        assert engine.last(engine.submit("attack", PROMPT)).error_code == "computation_failed"


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("element", [0, 63])
def test_a_damaged_row_of_the_embeddings_ends_those_that_use_its_token(
    engine: EngineUnderTest, value: float, element: int
) -> None:
    beside = Beside(engine)
    engine.engine.loaded.decoder._embedding[POISON, element] = value
    with beside:
        for round_ in range(2):  # what was computed of the first is no prefix of the second
            for name, options in (
                ("whole", {}),
                ("scored", {"prompt_logprobs": 2}),
                ("mean", {"pooling": Pooling.MEAN}),
                ("last", {"pooling": Pooling.LAST}),
                ("written", {"prompt_token_ids": CLEAN, "logit_bias": {POISON: 100.0}, "max_tokens": 20}),
            ):
                prompt = options.pop("prompt_token_ids", POISONED)
                last = engine.last(engine.submit(f"{name} {round_}", prompt, **options))
                assert last.error_code == "computation_failed", (name, last)
                assert "not finite" in last.error_message
    assert engine.generate("after", CLEAN)


def test_no_block_of_a_damaged_prompt_is_kept(folder: Path) -> None:
    with EngineUnderTest(folder, max_num_batched_tokens=80) as engine:
        engine.engine.loaded.decoder._embedding[POISON, 3] = float("nan")
        prompt = [*CLEAN[:20], POISON, *CLEAN[:43]] * 4
        assert engine.last(engine.submit("damaged", prompt)).error_code == "computation_failed"
        cached = engine.engine.blocks
        assert len(cached.cache_log.snapshot()[1]) <= 1, "the block before the token, at the most"


@pytest.mark.parametrize("attention", ["auto", "torch"])
def test_what_a_damaged_request_left_in_the_pool_reaches_nobody(folder: Path, attention: Any) -> None:
    """Its blocks are given to others, whose contexts end in the middle of one."""
    with EngineUnderTest(folder, attention=attention, enable_prefix_caching=False, kv_cache_bytes=1 << 20) as engine:
        expected = [engine.generate(f"before {n}", CLEAN[:n], max_tokens=20) for n in (1, 17, 40, 50)]
        engine.engine.pool.storage[:, :, 1:] = float("nan")
        for n, tokens in zip((1, 17, 40, 50), expected, strict=True):
            assert engine.generate(f"after {n}", CLEAN[:n], max_tokens=20) == tokens


def test_a_hand_over_of_rows_that_are_not_finite_is_computed_again(folder: Path) -> None:
    with EngineUnderTest(folder) as prefill, EngineUnderTest(folder) as decode:
        expected = decode.generate("alone", PROMPT)
        kv_import = DirectImport()
        kv_export = DamagingExport(prefill.engine, kv_import)
        key = decode.submit("r", PROMPT[::-1], kv_import=kv_import)
        prefill.submit("r", PROMPT[::-1], kv_export=kv_export)
        assert decode.tokens(key) == decode.generate("again", PROMPT[::-1])
        assert decode.generate("after", PROMPT) == expected
        report = decode.outputs[key][0].prompt
        assert report is not None
        assert "not finite" in report.recompute_reason


def test_a_first_token_beyond_the_vocabulary_is_not_believed(folder: Path) -> None:
    with EngineUnderTest(folder) as prefill, EngineUnderTest(folder) as decode:
        beside = Beside(decode)
        kv_import = DirectImport()
        kv_export = LyingExport(prefill.engine, kv_import)
        with beside:
            key = decode.submit("r", PROMPT, kv_import=kv_import)
            prefill.submit("r", PROMPT, kv_export=kv_export)
            assert decode.tokens(key) == beside.alone[0][:8]


class DamagingExport(DirectExport):
    def _copy(self, layer: int, start: int, stop: int) -> None:
        self.source.pool.v[layer].view(-1)[-1] = float("nan")
        slots = self.slots
        if layer == 1:
            self.slots = [*slots[:-1], self.source.pool.num_blocks * self.source.pool.block_size - 1]
        super()._copy(layer, start, stop)
        self.slots = slots

    def finished(self, output: RequestOutput) -> None:
        assert self.target.reservation is not None
        with pytest.raises(ValueError, match="not finite") as refusal:
            self.target.reservation.complete(output)
        self.target.reservation.fail(str(refusal.value))
        assert self.key is not None
        self.source.release(self.key)


class LyingExport(DirectExport):
    def finished(self, output: RequestOutput) -> None:
        super().finished(replace(output, token_ids=[2**31]))


def raising_at(call: Any, name: str, times: int = 1) -> Any:
    """`call`, which raises for a request of that name: before it does anything, `times` times."""
    left = times

    def failing(*arguments: Any, **options: Any) -> Any:
        nonlocal left
        keys = [getattr(each, "key", each) for each in arguments]
        if left and any(getattr(key, "request_id", "") == name for key in keys):
            left -= 1
            raise KeyError(name)
        return call(*arguments, **options)

    return failing


@pytest.mark.parametrize("method", ["extend", "allocate"])
def test_a_request_that_cannot_be_planned_ends_alone(
    engine: EngineUnderTest, method: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    beside = Beside(engine)
    monkeypatch.setattr(engine.engine.blocks, method, raising_at(getattr(engine.engine.blocks, method), "attack"))
    with beside:
        engine.wait_tokens(beside.keys[0], 2)
        assert engine.last(engine.submit("attack", PROMPT, max_tokens=60)).error_code == "computation_failed"
    engine.check_all_free()
    assert not engine.engine.is_broken


def test_a_request_whose_blocks_cannot_be_published_ends_alone(
    engine: EngineUnderTest, monkeypatch: pytest.MonkeyPatch
) -> None:
    beside = Beside(engine)
    scheduler = engine.engine.scheduler
    monkeypatch.setattr(scheduler, "publish", raising_at(scheduler.publish, "attack"))
    with beside:
        engine.wait_tokens(beside.keys[0], 2)
        assert engine.last(engine.submit("attack", PROMPT[::-1])).error_code == "computation_failed"
    engine.check_all_free()
    assert not engine.engine.is_broken


def test_an_end_that_raises_and_leaves_nothing_behind_ends_nobody_else(
    engine: EngineUnderTest, monkeypatch: pytest.MonkeyPatch
) -> None:
    beside = Beside(engine)
    exports = engine.engine._requests.exports
    monkeypatch.setattr(exports, "release", raising_at(exports.release, "attack"))
    with beside:
        engine.wait_tokens(beside.keys[0], 2)
        assert engine.generate("attack", PROMPT)
    engine.check_all_free()
    assert not engine.engine.is_broken


def test_an_end_that_loses_blocks_stops_the_engine_and_the_others_may_go_on_elsewhere(
    engine: EngineUnderTest, monkeypatch: pytest.MonkeyPatch
) -> None:
    beside = Beside(engine)
    monkeypatch.setattr(engine.engine.blocks, "free", raising_at(engine.engine.blocks.free, "attack"))
    attack = engine.submit("attack", PROMPT, max_tokens=5, ignore_eos=True)
    key = engine.submit("bystander", PROMPT, max_tokens=400, ignore_eos=True)
    assert engine.tokens(attack)
    assert engine.last(key).error_code == "unavailable"
    had = engine.tokens_so_far(key)
    assert had[:60] == beside.alone[0][: len(had)], "what it was told is right"
    assert engine.engine.is_broken
    with pytest.raises(TandemError, match="shutting down"):
        engine.submit("late", PROMPT)
    engine.engine.blocks.free(attack)  # for the fixture's check


def test_what_is_nobodys_fault_is_not_held_against_the_next_requests(
    engine: EngineUnderTest, monkeypatch: pytest.MonkeyPatch
) -> None:
    def failing(*arguments: Any) -> Any:
        raise RuntimeError("of no request")

    with monkeypatch.context() as patch:
        patch.setattr(engine.engine.scheduler, "_room_of_last_band", failing)
        keys = [engine.submit(f"r{i}", PROMPT[i:]) for i in range(3)]
        assert {engine.last(key).error_code for key in keys} == {"internal"}
    assert engine.generate("after", PROMPT)
