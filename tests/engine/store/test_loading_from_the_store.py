"""What is loaded from the store gives the tokens that computing gives, bit for bit, and says where it came from."""

from __future__ import annotations

import random
from typing import Any

import pytest

from tandem.engine.store.stats import StoreStats
from tandem.kvstore.cost import LinkCosts
from tandem.kvstore.interfaces import TierName
from tests.engine.store.conftest import CHUNK, MakeEngine, assert_same, fill, report_of
from tests.engine.store.scripted_home import ScriptedHome
from tests.engine_harness import EngineUnderTest

RNG = random.Random(11)
PROMPT = [RNG.randrange(3, 512) for _ in range(150)]


def stats(engine: EngineUnderTest) -> StoreStats:
    assert engine.engine._store is not None
    return engine.engine._store._store.stats()


@pytest.mark.parametrize("options", [{}, {"temperature": 0.8, "seed": 3, "presence_penalty": 0.5}, {"logprobs": 2}])
def test_a_second_engine_reuses_what_the_first_computed(
    make: MakeEngine, plain: EngineUnderTest, options: dict[str, Any]
) -> None:
    fill(make(), PROMPT)
    second = make()
    name = f"r{sorted(options)}"
    key = second.submit(name, PROMPT, max_tokens=30, **options)
    expected = plain.submit(name, PROMPT, max_tokens=30, **options)
    assert_same(second, key, plain, expected)
    assert report_of(second, key).cached_by_tier == {"host": 128}
    assert stats(second).loads == {"ok": 1}
    assert stats(second).loaded_tokens == {"host": 128}


@pytest.mark.parametrize("length", [CHUNK - 1, CHUNK, CHUNK + 1, 3 * CHUNK - 1, 3 * CHUNK, 3 * CHUNK + 1, 150])
def test_chunk_boundaries(make: MakeEngine, plain: EngineUnderTest, length: int) -> None:
    prompt = PROMPT[:length]
    fill(make(), prompt)
    second = make()
    key = second.submit(f"b{length}", prompt, max_tokens=10, logprobs=0)
    expected = plain.submit(f"b{length}", prompt, max_tokens=10, logprobs=0)
    assert_same(second, key, plain, expected)
    assert report_of(second, key).cached_tokens == min(length // CHUNK * CHUNK, length - 1)


def test_a_device_prefix_that_ends_inside_a_chunk_is_completed(make: MakeEngine, plain: EngineUnderTest) -> None:
    fill(make(), PROMPT)
    second = make(store={"save_queue": 1})
    second.generate("short", PROMPT[:49], max_tokens=1)
    key = second.submit("mid", PROMPT, max_tokens=20, logprobs=0)
    expected = plain.submit("mid", PROMPT, max_tokens=20, logprobs=0)
    assert_same(second, key, plain, expected)
    assert report_of(second, key).cached_by_tier == {"device": 48, "host": 80}


def test_each_tier_is_reported(make: MakeEngine, home: ScriptedHome, plain: EngineUnderTest) -> None:
    tiers = [TierName.HOST, TierName.DISK, TierName.PEER, TierName.REMOTE]
    home.tier_of = tiers.__getitem__
    fill(make(), PROMPT)
    second = make()
    key = second.submit("tiers", PROMPT)
    assert second.tokens(key) == plain.generate("tiers", PROMPT)
    assert report_of(second, key).cached_by_tier == {tier.value: CHUNK for tier in tiers}


def test_the_next_turn_reuses_the_answer_on_another_engine(
    make: MakeEngine, home: ScriptedHome, plain: EngineUnderTest
) -> None:
    first = make()
    answer = first.generate("turn1", PROMPT, max_tokens=60)
    assert first.engine.wait_saved(10)
    turn = [*PROMPT, *answer, *PROMPT[:30]]
    second = make()
    key = second.submit("turn2", turn, max_tokens=20)
    assert second.tokens(key) == plain.generate("turn2", turn, max_tokens=20)
    computed = (len(PROMPT) + 60 - 1) // CHUNK * CHUNK  # the last token's KV is never computed
    assert computed > len(PROMPT)
    assert report_of(second, key).cached_tokens == computed


def test_two_equal_prompts_at_once_load_once(make: MakeEngine, home: ScriptedHome, plain: EngineUnderTest) -> None:
    fill(make(), PROMPT)
    second = make()
    keys = [second.submit(f"n{i}", PROMPT, max_tokens=12) for i in range(4)]
    expected = plain.generate("n", PROMPT, max_tokens=12)
    assert [second.tokens(key) for key in keys] == [expected] * 4
    loaded = sum(report_of(second, key).cached_by_tier.get("host", 0) for key in keys)
    assert loaded == 128, "the others take it from the device"


def test_tenants_do_not_see_each_others_kv(make: MakeEngine) -> None:
    fill(make(), PROMPT, cache_salt=b"one", tenant="one")
    second = make()
    key = second.submit("other", PROMPT, cache_salt=b"two")
    second.last(key)
    assert report_of(second, key).cached_tokens == 0


def test_prompt_scores_are_computed_not_loaded(make: MakeEngine, plain: EngineUnderTest) -> None:
    fill(make(), PROMPT)
    second = make()
    key = second.submit("scored", PROMPT, prompt_logprobs=1)
    expected = plain.submit("scored", PROMPT, prompt_logprobs=1)
    assert second.tokens(key) == plain.tokens(expected)
    assert second.outputs[key][0].prompt_logprobs == plain.outputs[expected][0].prompt_logprobs
    assert report_of(second, key).cached_tokens == 0


def test_computing_is_preferred_where_it_is_faster(make: MakeEngine, home: ScriptedHome) -> None:
    fill(make(), PROMPT)
    links = LinkCosts()
    second = make({"links": links})
    second.generate("measure", [5] * 100)
    for _ in range(30):
        links.observe("host", 1000, 1, 50.0)
    key = second.submit("slow link", PROMPT)
    second.last(key)
    assert report_of(second, key).cached_tokens == 0
    assert stats(second).lookups["recompute"] == 1


def test_a_preempted_request_that_was_loaded_gives_the_same_tokens(make: MakeEngine, plain: EngineUnderTest) -> None:
    prompts = [[RNG.randrange(3, 512) for _ in range(100)] for _ in range(4)]
    filler = make()
    for prompt in prompts:
        fill(filler, prompt)
    block_bytes = 2 * 3 * 16 * 32 * 4
    small = make(kv_cache_bytes=24 * block_bytes, max_model_len=300, max_num_seqs=4)
    preempted: list[object] = []
    original = small.engine.scheduler.roster.preempt

    def preempt(plan: Any, sequence: Any, why: Any) -> None:
        preempted.append(sequence.key)
        original(plan, sequence, why)

    small.engine.scheduler.roster.preempt = preempt  # type: ignore[method-assign]
    keys = [small.submit(f"p{i}", prompt, max_tokens=80) for i, prompt in enumerate(prompts)]
    expected = [plain.generate(f"p{i}", prompt, max_tokens=80) for i, prompt in enumerate(prompts)]
    assert [small.tokens(key) for key in keys] == expected
    assert preempted
    assert stats(small).loads.get("ok", 0) >= 2
