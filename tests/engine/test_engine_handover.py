"""Prefill in one engine, decode in another: equal to one engine bit for bit, whatever fails in between."""

from __future__ import annotations

import random
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tandem.engine.request import FinishReason, RequestKey, RequestOutput, TokenLogprobs
from tests.engine_harness import DirectExport, DirectImport, EngineUnderTest, wait_for

PROMPT = [(i * 17) % 500 + 3 for i in range(150)]


@pytest.fixture
def prefill(folder: Path) -> Iterator[EngineUnderTest]:
    with EngineUnderTest(folder) as engine:
        yield engine


@pytest.fixture
def decode(folder: Path) -> Iterator[EngineUnderTest]:
    with EngineUnderTest(folder) as engine:
        yield engine


@pytest.fixture(scope="module")
def unified(folder: Path) -> Iterator[EngineUnderTest]:
    with EngineUnderTest(folder, enable_prefix_caching=False) as engine:
        yield engine


def hand_over(
    prefill: EngineUnderTest, decode: EngineUnderTest, name: str, prompt: list[int], fail_at: str = "", **options: Any
) -> tuple[RequestKey, DirectExport, DirectImport]:
    kv_import = DirectImport()
    kv_export = DirectExport(prefill.engine, kv_import, fail_at)
    decode.submit(name, prompt, kv_import=kv_import, **options)
    key = prefill.submit(name, prompt, kv_export=kv_export, **options)
    return key, kv_export, kv_import


def report_of(engine: EngineUnderTest, key: RequestKey):  # type: ignore[no-untyped-def]
    report = engine.outputs[key][0].prompt
    assert report is not None
    return report


@pytest.mark.parametrize("options", [{}, {"temperature": 0.8, "seed": 3, "presence_penalty": 0.5}, {"logprobs": 2}])
def test_disaggregated_equals_unified(
    prefill: EngineUnderTest, decode: EngineUnderTest, unified: EngineUnderTest, options: dict[str, Any]
) -> None:
    name = f"u{sorted(options)}"
    expected = unified.generate(name, PROMPT, max_tokens=40, **options)
    key, kv_export, kv_import = hand_over(prefill, decode, name, PROMPT, max_tokens=40, **options)
    assert decode.tokens(key) == expected
    assert prefill.last(key).finish_reason is FinishReason.HANDED_OVER
    assert prefill.tokens_so_far(key) == [], "tokens come from the decode side only"
    assert report_of(decode, key).recompute_reason == ""
    assert kv_import.is_closed.wait(60)
    assert kv_export.aborted_because is None
    scores = [[entry.logprob for o in e.outputs[key] for entry in o.logprobs] for e in (unified, decode)]
    assert scores[0] == scores[1], "bit for bit"
    assert len(scores[0]) == (40 if "logprobs" in options else 0)


def test_layers_are_announced_in_order_while_computing(prefill: EngineUnderTest, decode: EngineUnderTest) -> None:
    key, kv_export, _ = hand_over(prefill, decode, "a", PROMPT)
    decode.last(key)
    assert kv_export.announced == [(layer, 0, 150) for layer in range(3)]


def test_many_at_once_with_chunked_prefill(folder: Path, decode: EngineUnderTest, unified: EngineUnderTest) -> None:
    prompts = [[(i * 31 + j * 7) % 500 + 3 for j in range(20 + 17 * i)] for i in range(8)]
    expected = [unified.generate(f"many{i}", prompt, max_tokens=20) for i, prompt in enumerate(prompts)]
    with EngineUnderTest(folder, max_num_batched_tokens=64, max_num_seqs=8) as prefill:
        keys = [hand_over(prefill, decode, f"many{i}", p, max_tokens=20)[0] for i, p in enumerate(prompts)]
        assert [decode.tokens(key) for key in keys] == expected


@pytest.mark.parametrize("fail_at", ["begin", "layer", "finished"])
def test_a_failure_anywhere_becomes_a_recompute(
    prefill: EngineUnderTest, decode: EngineUnderTest, unified: EngineUnderTest, fail_at: str
) -> None:
    expected = unified.generate(f"f-{fail_at}", PROMPT, max_tokens=30, logprobs=0)
    key, _, kv_import = hand_over(prefill, decode, f"f-{fail_at}", PROMPT, fail_at, max_tokens=30, logprobs=0)
    assert decode.tokens(key) == expected
    assert report_of(decode, key).recompute_reason == f"lost at {fail_at}"
    scores = [[entry.logprob for o in e.outputs[key] for entry in o.logprobs] for e in (unified, decode)]
    assert scores[0] == scores[1]
    assert kv_import.is_closed.wait(60)
    assert prefill.last(key).finish_reason is FinishReason.HANDED_OVER


def test_what_the_decode_side_has_cached_is_not_needed(
    prefill: EngineUnderTest, decode: EngineUnderTest, unified: EngineUnderTest
) -> None:
    expected = unified.generate("skip", PROMPT, max_tokens=20)
    decode.generate("earlier", PROMPT[:100])
    key, _, kv_import = hand_over(prefill, decode, "skip", PROMPT, max_tokens=20)
    assert decode.tokens(key) == expected
    assert kv_import.reservation is not None
    assert kv_import.reservation.skip_tokens == 96


def test_a_cached_prefix_on_the_prefill_side_is_sent_too(
    prefill: EngineUnderTest, decode: EngineUnderTest, unified: EngineUnderTest
) -> None:
    expected = unified.generate("cached", PROMPT, max_tokens=20)
    warm, _, _ = hand_over(prefill, decode, "warm", PROMPT[:100], cache_salt=b"")
    decode.last(warm)
    with EngineUnderTest(Path(decode.engine.config.model)) as other:
        key, kv_export, _ = hand_over(prefill, other, "cached", PROMPT, max_tokens=20)
        assert other.tokens(key) == expected
        assert {start for _, start, _ in kv_export.announced} == {96}


def test_imported_blocks_enter_the_cache_only_when_complete(decode: EngineUnderTest, prefill: EngineUnderTest) -> None:
    waiting = DirectImport()
    key = decode.submit("half", PROMPT, kv_import=waiting)
    assert waiting.ready.wait(60)
    assert waiting.reservation is not None
    rows = bytes(96 * decode.engine.pool.row_bytes)
    for layer in range(3):
        assert waiting.reservation.write(layer, 0, 96, memoryview(bytearray(rows)))
    probe = decode.submit("probe", PROMPT)
    decode.last(probe)
    assert report_of(decode, probe).cached_tokens == 0
    decode.engine.cancel(key)
    decode.last(key)
    done, _, _ = hand_over(prefill, decode, "whole", [*PROMPT[:50], 9, *PROMPT[51:]])
    decode.last(done)
    follow_up = decode.submit("follow-up", [*PROMPT[:50], 9, *PROMPT[51:]])
    decode.last(follow_up)
    assert report_of(decode, follow_up).cached_tokens == 144


def test_missing_rows_are_noticed(decode: EngineUnderTest) -> None:
    waiting = DirectImport()
    key = decode.submit("gap", PROMPT, kv_import=waiting)
    assert waiting.ready.wait(60)
    reservation = waiting.reservation
    assert reservation is not None
    row = decode.engine.pool.row_bytes
    first = RequestOutput(key, token_ids=[5])
    for layer, start, stop in ((0, 0, 150), (1, 0, 149), (2, 0, 150)):
        assert reservation.write(layer, start, stop, memoryview(bytearray((stop - start) * row)))
    with pytest.raises(ValueError, match="1 rows are missing, the first is row 149 of layer 1"):
        reservation.complete(first)
    for rows in ((0, 0, 151), (3, 0, 5), (0, 5, 5), (0, -1, 5)):
        with pytest.raises(ValueError, match="outside"):
            reservation.write(*rows, memoryview(bytearray(max(rows[2] - rows[1], 0) * row)))
    with pytest.raises(ValueError, match="bytes"):
        reservation.write(0, 0, 2, memoryview(bytearray(row)))
    assert reservation.write(1, 149, 150, memoryview(bytearray(row)))
    with pytest.raises(ValueError, match="neither"):
        reservation.complete(RequestOutput(key))
    reservation.complete(first)
    reservation.fail("too late to matter")
    assert decode.tokens(key)[0] == 5
    assert not reservation.write(0, 0, 1, memoryview(bytearray(row)))


def test_a_first_output_can_be_the_last(prefill: EngineUnderTest, decode: EngineUnderTest) -> None:
    key, _, _ = hand_over(prefill, decode, "one", PROMPT, max_tokens=1)
    assert len(decode.tokens(key)) == 1
    assert decode.last(key).finish_reason is FinishReason.LENGTH
    key, _, _ = hand_over(prefill, decode, "stop", PROMPT, logit_bias={9: 100.0}, stop_token_ids=(9,))
    assert decode.tokens(key) == [9]
    assert decode.last(key).stop_token_id == 9


def test_prompt_logprobs_travel_with_the_first_output(prefill: EngineUnderTest, decode: EngineUnderTest) -> None:
    decode.generate("warm", PROMPT)
    key, _, _ = hand_over(prefill, decode, "scores", PROMPT, prompt_logprobs=1)
    decode.last(key)
    assert len(decode.outputs[key][0].prompt_logprobs) == 150
    assert isinstance(decode.outputs[key][0].prompt_logprobs[1], TokenLogprobs)


def test_cancel_at_the_decode_side_while_waiting_for_kv(decode: EngineUnderTest) -> None:
    waiting = DirectImport()
    key = decode.submit("a", PROMPT, kv_import=waiting)
    assert waiting.ready.wait(60)
    decode.engine.cancel(key)
    assert decode.last(key).finish_reason is FinishReason.CANCELLED
    assert waiting.is_closed.wait(60)
    assert waiting.reservation is not None
    assert not waiting.reservation.write(0, 0, 1, memoryview(bytearray(decode.engine.pool.row_bytes)))
    waiting.reservation.complete(RequestOutput(key, token_ids=[5]))
    waiting.reservation.fail("late")


def test_blocks_are_not_freed_while_bytes_arrive(decode: EngineUnderTest, monkeypatch: pytest.MonkeyPatch) -> None:
    waiting = DirectImport()
    key = decode.submit("a", PROMPT, kv_import=waiting)
    assert waiting.ready.wait(60)
    reservation = waiting.reservation
    assert reservation is not None
    writing, go_on, owned = threading.Event(), threading.Event(), []

    def slow_write(*arguments: Any) -> None:
        writing.set()
        assert go_on.wait(60)
        owned.append(decode.engine.blocks.holds(key))

    monkeypatch.setattr(decode.engine.pool, "write_rows", slow_write)
    rows = memoryview(bytearray(decode.engine.pool.row_bytes))
    thread = threading.Thread(target=reservation.write, args=(0, 0, 1, rows))
    thread.start()
    assert writing.wait(60)
    decode.engine.cancel(key)
    wait_for(lambda: not decode.engine._inbox)
    assert decode.engine.blocks.holds(key)
    go_on.set()
    thread.join(60)
    assert owned == [True]
    assert decode.last(key).finish_reason is FinishReason.CANCELLED


def test_others_run_while_an_import_waits(decode: EngineUnderTest) -> None:
    waiting = DirectImport()
    key = decode.submit("waiting", PROMPT, kv_import=waiting)
    assert waiting.ready.wait(60)
    assert len(decode.generate("other", PROMPT[:30], max_tokens=20)) == 20
    decode.engine.cancel(key)
    decode.last(key)


class SilentExport:
    """Never releases."""

    def __init__(self) -> None:
        self.finished_with: RequestOutput | None = None
        self.aborted_because: str | None = None
        self.begun = threading.Event()

    def begin(self, key: Any, tokens: Any, slots: Any, cached_tokens: int) -> None:
        self.begun.set()

    def layer_ready(self, layer: int, start: int, stop: int) -> None: ...

    def finished(self, output: RequestOutput) -> None:
        self.finished_with = output

    def aborted(self, reason: str) -> None:
        self.aborted_because = reason


def test_blocks_stay_until_released(prefill: EngineUnderTest) -> None:
    export = SilentExport()
    key = prefill.submit("a", PROMPT, kv_export=export)
    wait_for(lambda: export.finished_with)
    prefill.generate("b", PROMPT[:20])
    prefill.engine.check_integrity()
    status = prefill.engine.status()
    assert status.running == 1
    assert status.total_blocks - status.free_blocks == 10
    assert not prefill.ended(key)
    prefill.engine.release(key)
    assert prefill.last(key).finish_reason is FinishReason.HANDED_OVER
    prefill.engine.release(key)


def test_a_lost_release_cannot_leak(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tandem.engine.handover.exports.EXPORT_LEASE_S", 0.1)
    with EngineUnderTest(folder) as prefill:
        export = SilentExport()
        last = prefill.last(prefill.submit("a", PROMPT, kv_export=export))
        assert last.finish_reason is FinishReason.ERROR
        assert last.error_code == "unavailable"
        assert export.aborted_because
        prefill.check_all_free()


def test_a_cancelled_export_is_told_and_keeps_its_blocks_until_released(prefill: EngineUnderTest) -> None:
    export = SilentExport()
    key = prefill.submit("a", PROMPT, kv_export=export)
    wait_for(lambda: export.finished_with)
    prefill.engine.cancel(key)
    assert prefill.last(key).finish_reason is FinishReason.CANCELLED
    assert export.aborted_because == "cancelled"
    prefill.engine.check_integrity()
    status = prefill.engine.status()
    assert status.free_blocks < status.total_blocks
    prefill.engine.release(key)


def test_an_exporter_that_gives_up_ends_the_request(prefill: EngineUnderTest) -> None:
    export = SilentExport()
    key = prefill.submit("a", PROMPT, kv_export=export)
    wait_for(lambda: export.finished_with)
    prefill.engine.release(key, "the decode worker is gone")
    last = prefill.last(key)
    assert last.error_code == "worker_lost"
    assert "gone" in last.error_message


@pytest.mark.parametrize("method", ["begin", "layer_ready", "finished"])
def test_an_exporter_that_raises_fails_its_own_request_only(
    folder: Path, method: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tandem.engine.handover.exports.EXPORT_LEASE_S", 0.2)
    with EngineUnderTest(folder) as prefill:
        export = SilentExport()
        setattr(export, method, lambda *arguments: 1 / 0)
        good = SilentExport()
        good_key = prefill.submit("good", PROMPT[:40], kv_export=good)
        bad_key = prefill.submit("bad", PROMPT, kv_export=export)
        assert prefill.last(bad_key).error_code == "internal"
        wait_for(lambda: good.finished_with)
        prefill.engine.release(good_key)
        assert prefill.last(good_key).finish_reason is FinishReason.HANDED_OVER


def test_a_soak_of_hand_overs_with_random_failures(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tandem.engine.handover.exports.EXPORT_LEASE_S", 1.0)
    rng = random.Random(3)
    block_bytes = 2 * 3 * 16 * 32 * 4
    small = {"kv_cache_bytes": 60 * block_bytes, "max_model_len": 200, "max_num_seqs": 6, "max_num_batched_tokens": 64}
    with (
        EngineUnderTest(folder, enable_prefix_caching=False) as unified,
        EngineUnderTest(folder, **small) as prefill,
        EngineUnderTest(folder, **small) as decode,
    ):
        cases: list[tuple[RequestKey, list[int]]] = []
        for index in range(40):
            prompt = [rng.randrange(3, 500) for _ in range(rng.randint(1, 100))]
            fail_at = rng.choice(("", "", "begin", "layer", "finished"))
            expected = unified.generate(f"r{index}", prompt, max_tokens=12)
            key, _, _ = hand_over(prefill, decode, f"r{index}", prompt, fail_at, max_tokens=12)
            cases.append((key, expected))
            if index % 4 == 3:
                assert [decode.tokens(key) for key, _ in cases[-4:]] == [tokens for _, tokens in cases[-4:]]
        for key, _ in cases:
            assert prefill.last(key).finish_reason is FinishReason.HANDED_OVER
