"""A request whose output another worker began goes on as if nothing had happened, on every path."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tandem.common.sampling import SamplingParams
from tandem.engine.request import FinishReason, PromptReport, RequestKey
from tandem.engine.store import flow
from tandem.engine.store.cache import EngineStore
from tandem.proto import worker_pb2
from tandem.worker.wire import request_from_proto
from tests.engine.store.scripted_home import ScriptedHome
from tests.engine_harness import DirectExport, DirectImport, EngineUnderTest

PROMPT = [(i * 17) % 500 + 3 for i in range(150)]
KINDS: list[dict[str, Any]] = [
    {},
    {"temperature": 0.9, "top_p": 0.95, "seed": 11},
    {"temperature": 0.7, "seed": 3, "presence_penalty": 0.6, "frequency_penalty": 0.4, "repetition_penalty": 1.2},
    {"logprobs": 2, "seed": 5, "temperature": 0.5, "logit_bias": {7: 1.5}},
]
CUTS = [1, 9, 10, 42, 47]
"""Lengths of the output when it is interrupted: the first token; around the end of a block (150 + 10 = 160); the last
but one of 48."""


@pytest.fixture(scope="module")
def whole(folder: Path) -> Iterator[EngineUnderTest]:
    """Never interrupted, caches nothing."""
    with EngineUnderTest(folder, enable_prefix_caching=False) as engine:
        yield engine


def report_of(engine: EngineUnderTest, key: RequestKey) -> PromptReport:
    (report,) = [output.prompt for output in engine.outputs[key] if output.prompt is not None]
    return report


def scores(engine: EngineUnderTest, key: RequestKey) -> list[float]:
    return [entry.logprob for output in engine.outputs[key] for entry in output.logprobs]


class Uninterrupted:
    """What `engine` says to PROMPT in one go."""

    def __init__(self, engine: EngineUnderTest, **options: Any) -> None:
        name = f"whole-{len(engine.outputs)}"
        self.key = engine.submit(name, PROMPT, max_tokens=48, **options)
        self.tokens = engine.tokens(self.key)
        self.scores = scores(engine, self.key)

    def check(self, engine: EngineUnderTest, key: RequestKey, cut: int) -> None:
        assert engine.tokens(key) == self.tokens[cut:]
        assert engine.outputs[key][0].start_index == cut
        assert engine.last(key).finish_reason is FinishReason.LENGTH
        if engine.engine.loaded.row_invariant:
            assert scores(engine, key) == self.scores[cut:], "bit for bit"
        else:
            assert scores(engine, key) == pytest.approx(self.scores[cut:], abs=1e-4)


@pytest.mark.parametrize("options", KINDS, ids=["greedy", "seeded", "penalties", "logprobs"])
def test_goes_on_at_any_point(whole: EngineUnderTest, engine: EngineUnderTest, options: dict[str, Any]) -> None:
    expected = Uninterrupted(whole, **options)
    keys = [
        engine.submit(f"cut{cut}", PROMPT, max_tokens=48, output_token_ids=expected.tokens[:cut], **options)
        for cut in CUTS
    ]
    for key, cut in zip(keys, CUTS, strict=True):
        expected.check(engine, key, cut)


@pytest.mark.parametrize("options", KINDS[:3], ids=["greedy", "seeded", "penalties"])
def test_goes_on_with_small_steps_and_preemptions(
    folder: Path, whole: EngineUnderTest, options: dict[str, Any]
) -> None:
    expected = Uninterrupted(whole, **options)
    block_bytes = 2 * 3 * 16 * 32 * 4
    small = {"kv_cache_bytes": 30 * block_bytes, "max_model_len": 256, "max_num_seqs": 4, "max_num_batched_tokens": 48}
    with EngineUnderTest(folder, **small, enable_prefix_caching=False) as engine:
        keys = [
            engine.submit(f"cut{cut}", PROMPT, max_tokens=48, output_token_ids=expected.tokens[:cut], **options)
            for cut in CUTS
        ]
        for key, cut in zip(keys, CUTS, strict=True):
            expected.check(engine, key, cut)


def test_goes_on_from_the_prefix_cache_and_reports_the_prompt_only(
    whole: EngineUnderTest, engine: EngineUnderTest
) -> None:
    expected = Uninterrupted(whole)
    engine.generate("before", PROMPT, max_tokens=48)
    key = engine.submit("again", PROMPT, max_tokens=48, output_token_ids=expected.tokens[:42])
    expected.check(engine, key, 42)
    report = report_of(engine, key)
    assert report.cached_tokens == len(PROMPT), "of 192 tokens that are cached, 150 are the prompt's"
    assert report.cached_by_tier == {"device": len(PROMPT)}


def hand_over(
    prefill: EngineUnderTest, decode: EngineUnderTest, output: list[int], fail_at: str = "", **options: Any
) -> RequestKey:
    kv_import = DirectImport()
    kv_export = DirectExport(prefill.engine, kv_import, fail_at)
    name = f"handover-{len(decode.outputs)}"
    key = decode.submit(name, PROMPT, max_tokens=48, kv_import=kv_import, output_token_ids=output, **options)
    prefill.submit(name, PROMPT, max_tokens=48, kv_export=kv_export, output_token_ids=output, **options)
    return key


@pytest.mark.parametrize("options", KINDS, ids=["greedy", "seeded", "penalties", "logprobs"])
@pytest.mark.parametrize("cut", [1, 42])
def test_goes_on_after_a_hand_over(
    folder: Path, whole: EngineUnderTest, engine: EngineUnderTest, options: dict[str, Any], cut: int
) -> None:
    expected = Uninterrupted(whole, **options)
    with EngineUnderTest(folder, max_num_batched_tokens=64, max_num_seqs=8) as prefill:
        expected.check(engine, hand_over(prefill, engine, expected.tokens[:cut], **options), cut)


def test_prompt_and_output_are_computed_apart(folder: Path, whole: EngineUnderTest, engine: EngineUnderTest) -> None:
    """So the prompt keeps the shapes that it had the first time, where a kernel's last bits depend on them."""
    expected = Uninterrupted(whole)
    with EngineUnderTest(folder) as prefill:
        kv_import = DirectImport()
        kv_export = DirectExport(prefill.engine, kv_import)
        options: dict[str, Any] = {"max_tokens": 48, "output_token_ids": expected.tokens[:42]}
        key = engine.submit("apart", PROMPT, kv_import=kv_import, **options)
        prefill.submit("apart", PROMPT, kv_export=kv_export, **options)
        expected.check(engine, key, 42)
    assert {(start, stop) for _, start, stop in kv_export.announced} == {(0, 150), (150, 192)}


@pytest.mark.parametrize("fail_at", ["begin", "layer", "finished"])
def test_goes_on_after_a_hand_over_that_failed(
    folder: Path, whole: EngineUnderTest, engine: EngineUnderTest, fail_at: str
) -> None:
    expected = Uninterrupted(whole, logprobs=0)
    with EngineUnderTest(folder) as prefill:
        key = hand_over(prefill, engine, expected.tokens[:42], fail_at, logprobs=0)
        expected.check(engine, key, 42)
        assert report_of(engine, key).recompute_reason == f"lost at {fail_at}"


def test_a_hand_over_that_ends_with_the_next_token(
    folder: Path, whole: EngineUnderTest, engine: EngineUnderTest
) -> None:
    expected = Uninterrupted(whole)
    with EngineUnderTest(folder) as prefill:
        expected.check(engine, hand_over(prefill, engine, expected.tokens[:47]), 47)


def test_goes_on_from_the_store(folder: Path, whole: EngineUnderTest, monkeypatch: pytest.MonkeyPatch) -> None:
    """The lost worker saved the chunks of its answer; they are loaded and not computed again."""
    for limit in ("LOOKUP_S", "LEAST_LOAD_S", "UNKNOWN_LOAD_S"):
        monkeypatch.setattr(flow, limit, 10.0)
    expected = Uninterrupted(whole)
    home = ScriptedHome()
    options: dict[str, Any] = {"chunk_tokens": 32, "model": "tiny"}
    with EngineUnderTest(folder, EngineStore(home, worker_id="w1", **options)) as lost:
        lost.generate("before", PROMPT, max_tokens=43)
        assert lost.engine.wait_saved(10)
    with EngineUnderTest(folder, EngineStore(home, worker_id="w2", **options)) as engine:
        key = engine.submit("again", PROMPT, max_tokens=48, output_token_ids=expected.tokens[:43])
        expected.check(engine, key, 43)
        report = report_of(engine, key)
        assert sum(report.cached_by_tier.values()) == report.cached_tokens == len(PROMPT)
        assert [len(fetch.sources) for fetch in home.fetches] == [6], "192 tokens in chunks of 32"


def test_limits_count_from_the_beginning(whole: EngineUnderTest, engine: EngineUnderTest) -> None:
    options = {"ignore_eos": False, "logit_bias": {2: 100.0}, "min_tokens": 6, "max_tokens": 20}
    first = whole.submit("whole", PROMPT, **options)
    tokens = whole.tokens(first)
    assert len(tokens) == 7
    key = engine.submit("cut", PROMPT, output_token_ids=tokens[:4], **options)
    assert engine.tokens(key) == tokens[4:]
    assert engine.last(key).finish_reason is FinishReason.STOP
    assert engine.last(key).stop_token_id == 2


@pytest.mark.parametrize(
    ("output", "max_tokens", "names"),
    [([5] * 8, 8, "nothing is left"), ([5] * 874, 2000, "nothing is left"), ([5, 512], 8, "token ids are 0 to 511")],
)
def test_what_cannot_go_on_is_refused(engine: EngineUnderTest, output: list[int], max_tokens: int, names: str) -> None:
    last = engine.last(engine.submit("bad", PROMPT, output_token_ids=output, max_tokens=max_tokens))
    assert last.error_code == "invalid_request"
    assert "output_token_ids" in last.error_message
    assert names in last.error_message


def test_output_so_far_comes_with_the_submit() -> None:
    submit = worker_pb2.Submit(prompt_token_ids=[1, 2], output_token_ids=[3, 4], sampling=SamplingParams().to_proto())
    request = request_from_proto(submit)
    assert (request.prompt_token_ids, request.output_token_ids, request.token_ids) == ([1, 2], [3, 4], [1, 2, 3, 4])
