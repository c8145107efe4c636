"""What the engine generates, whatever happens around it: equal to transformers and to itself."""

from __future__ import annotations

import random
import time
from pathlib import Path

import pytest
import torch

from tandem.common.errors import ConfigError
from tandem.engine.request import FinishReason
from tests.engine_harness import EngineUnderTest

RNG = random.Random(5)
PROMPT = [RNG.randrange(3, 512) for _ in range(150)]


def transformers_greedy(folder: Path, prompt: list[int], count: int) -> list[int]:
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    out = model.generate(
        torch.tensor([prompt]), max_new_tokens=count, do_sample=False, eos_token_id=None, use_cache=True
    )
    tokens: list[int] = out[0, len(prompt) :].tolist()
    return tokens


def test_greedy_continuation_equals_transformers(folder: Path, engine: EngineUnderTest) -> None:
    assert engine.generate("a", PROMPT, max_tokens=64) == transformers_greedy(folder, PROMPT, 64)


def test_chunked_prefill_gives_the_same_tokens(folder: Path, engine: EngineUnderTest) -> None:
    whole = engine.generate("a", PROMPT, max_tokens=30)
    with EngineUnderTest(folder, max_num_batched_tokens=48, max_num_seqs=8) as chunked:
        assert chunked.generate("a", PROMPT, max_tokens=30) == whole
        assert len(chunked.engine.scheduler.roster.waiting) == 0


def test_a_cached_prefix_gives_the_same_tokens(engine: EngineUnderTest) -> None:
    first = engine.submit("a", PROMPT, max_tokens=20)
    assert engine.tokens(first)
    again = engine.submit("b", PROMPT, max_tokens=20)
    assert engine.tokens(again) == engine.tokens(first)
    reports = [engine.outputs[key][0].prompt for key in (first, again)]
    assert [report.cached_tokens for report in reports if report] == [0, 144]


def test_tenants_do_not_see_each_others_cache(engine: EngineUnderTest) -> None:
    for name in ("one", "two"):
        key = engine.submit(name, PROMPT, cache_salt=name.encode())
        engine.last(key)
        report = engine.outputs[key][0].prompt
        assert report is not None
        assert report.cached_tokens == 0


def test_equal_prompts_at_once_share_blocks_and_agree(engine: EngineUnderTest) -> None:
    keys = [engine.submit(f"n{i}", PROMPT) for i in range(4)]
    outputs = [engine.tokens(key) for key in keys]
    assert all(tokens == outputs[0] for tokens in outputs)
    reports = [engine.outputs[key][0].prompt for key in keys]
    assert sorted(report.cached_tokens for report in reports if report) == [0, 144, 144, 144]


def test_a_pool_too_small_for_everybody_gives_the_same_tokens(folder: Path, engine: EngineUnderTest) -> None:
    prompts = [[(i * 37 + j * 11) % 500 + 3 for j in range(40)] for i in range(6)]
    alone = [engine.generate(f"a{i}", prompt, max_tokens=60) for i, prompt in enumerate(prompts)]
    block_bytes = 2 * 3 * 16 * 32 * 4
    # 20 blocks: a request grows to 7 of them, so six at once do not fit.
    with EngineUnderTest(folder, kv_cache_bytes=21 * block_bytes, max_model_len=300) as small:
        preempted = count_preemptions(small)
        keys = [small.submit(f"a{i}", prompt, max_tokens=60) for i, prompt in enumerate(prompts)]
        assert [small.tokens(key) for key in keys] == alone
        assert preempted


def count_preemptions(under_test: EngineUnderTest) -> list[str]:
    preempted: list[str] = []
    schedule = under_test.engine.scheduler.schedule

    def counting(now: float):  # type: ignore[no-untyped-def]
        plan = schedule(now)
        preempted.extend(sequence.key.request_id for sequence in plan.preempted)
        return plan

    under_test.engine.scheduler.schedule = counting  # type: ignore[method-assign]
    return preempted


def test_a_seed_gives_the_same_tokens_alone_and_in_company(engine: EngineUnderTest) -> None:
    options = {"temperature": 0.9, "top_p": 0.95, "seed": 7, "max_tokens": 30}
    alone = engine.generate("alone", PROMPT, **options)
    company = [engine.submit(f"c{i}", PROMPT[i : i + 50], temperature=1.0, seed=i, max_tokens=40) for i in range(5)]
    assert engine.generate("again", PROMPT, **options) == alone
    assert engine.generate("other", PROMPT, **(options | {"seed": 8})) != alone
    for key in company:
        engine.last(key)


def test_without_a_seed_each_request_draws_its_own(engine: EngineUnderTest) -> None:
    outputs = [tuple(engine.generate(f"r{i}", PROMPT, temperature=1.5, max_tokens=20)) for i in range(3)]
    assert len(set(outputs)) == 3


def test_penalties_see_the_output_so_far(engine: EngineUnderTest) -> None:
    tokens = engine.generate("a", PROMPT[:20], presence_penalty=2.0, repetition_penalty=10.0, max_tokens=60)
    assert len(set(tokens)) == 60, "no token twice under an the greatest penalties"


def test_end_of_sequence_stops_and_is_reported(engine: EngineUnderTest) -> None:
    key = engine.submit("a", PROMPT, ignore_eos=False, logit_bias={2: 100.0}, min_tokens=4, max_tokens=20)
    last = engine.last(key)
    assert last.finish_reason is FinishReason.STOP
    assert last.stop_token_id == 2
    assert len(engine.tokens(key)) == 5
    assert 2 not in engine.tokens(key)[:4]


def test_stop_tokens_stop_even_when_eos_is_ignored(engine: EngineUnderTest) -> None:
    key = engine.submit("a", PROMPT, logit_bias={9: 100.0}, stop_token_ids=(9,), max_tokens=20)
    assert engine.last(key).stop_token_id == 9
    assert engine.tokens(key) == [9]


def test_length_ends_at_max_tokens_and_at_the_context(folder: Path) -> None:
    with EngineUnderTest(folder, max_model_len=160) as engine:
        assert len(engine.generate("a", PROMPT, max_tokens=5)) == 5
        key = engine.submit("b", PROMPT, max_tokens=500)
        assert len(engine.tokens(key)) == 10
        assert engine.last(key).finish_reason is FinishReason.LENGTH


def test_no_output_wanted_scores_the_prompt_only(engine: EngineUnderTest) -> None:
    key = engine.submit("a", PROMPT, max_tokens=0, prompt_logprobs=1)
    last = engine.last(key)
    assert last.finish_reason is FinishReason.LENGTH
    assert last.token_ids == []
    assert len(last.prompt_logprobs) == len(PROMPT)


@pytest.mark.parametrize("budget", [512, 48])
def test_prompt_logprobs_equal_transformers(folder: Path, budget: int) -> None:
    from transformers import AutoModelForCausalLM

    with torch.inference_mode():
        logits = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)(torch.tensor([PROMPT])).logits[0]
    expected = torch.log_softmax(logits, -1)
    with EngineUnderTest(folder, max_num_batched_tokens=budget, max_num_seqs=8) as engine:
        engine.generate("warm", PROMPT)
        key = engine.submit("a", PROMPT, prompt_logprobs=2, logprobs=0)
        engine.last(key)
        first = engine.outputs[key][0]
    assert first.prompt_logprobs[0] is None
    for position, entry in enumerate(first.prompt_logprobs[1:]):
        assert entry is not None
        assert entry.logprob == pytest.approx(expected[position, PROMPT[position + 1]].item(), abs=2e-4)
        assert len(entry.top_ids) == 2
    assert first.logprobs[0].logprob == pytest.approx(expected[-1, first.token_ids[0]].item(), abs=2e-4)
    assert all(not output.prompt_logprobs for output in engine.outputs[key][1:])


def test_a_long_prompt_does_not_stall_others(folder: Path) -> None:
    """Counted in steps: while the long prompt is computed, every step brings a token of each short request."""
    with EngineUnderTest(folder, max_num_batched_tokens=64, max_num_seqs=8) as engine:
        short = [engine.submit(f"s{i}", PROMPT[:5], max_tokens=200, temperature=1.0) for i in range(3)]
        for key in short:
            engine.wait_tokens(key, 3)
        long = engine.submit("long", [*PROMPT, *PROMPT, *PROMPT, *PROMPT], max_tokens=2)
        engine.last(long)
        for key in short:
            engine.last(key)
        both = [step for step in engine.steps if any(output.key in short for output in step)]
        alive = set(short)
        for step in both[3:]:
            seen = {output.key for output in step}
            assert alive <= seen or not alive
            alive -= {output.key for output in step if output.finish_reason is not None}


def test_prompt_report_tells_durations(engine: EngineUnderTest) -> None:
    before = time.monotonic()
    key = engine.submit("a", PROMPT)
    engine.last(key)
    report = engine.outputs[key][0].prompt
    assert report is not None
    assert 0 <= report.queue_s < time.monotonic() - before
    assert 0 < report.prefill_s < time.monotonic() - before
    assert all(output.prompt is None for output in engine.outputs[key][1:])


def test_speeds_are_measured(engine: EngineUnderTest) -> None:
    assert engine.engine.status().decode_step_s == 0
    engine.generate("a", PROMPT)
    assert engine.engine.status().decode_step_s > 0
    assert engine.engine.status().prefill_tokens_per_s > 0


def test_a_pool_that_holds_no_whole_request_is_refused(folder: Path) -> None:
    with pytest.raises(ConfigError, match="kv_cache_bytes"):
        EngineUnderTest(folder, kv_cache_bytes=100_000, max_model_len=512)
    with pytest.raises(ConfigError, match="made for 1024"):
        EngineUnderTest(folder, max_model_len=4096)


def test_the_context_shrinks_to_the_pool_when_nobody_asked_for_more(folder: Path) -> None:
    with EngineUnderTest(folder, kv_cache_bytes=100_000) as small:
        assert small.engine.max_model_len < 1024
        assert len(small.generate("a", PROMPT[:20], max_tokens=5000)) == small.engine.max_model_len - 20
