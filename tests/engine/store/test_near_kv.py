"""KV that is not exact is used where it is allowed, and said; it stays out of everything that promises bits."""

from __future__ import annotations

import random

import pytest

from tandem.common.sampling import SamplingParams
from tandem.engine.request import EngineRequest, RequestKey
from tandem.kvstore.bundle import parse, transcode
from tandem.kvstore.codecs import Fidelity
from tandem.kvstore.interfaces import ObjectKey
from tests.engine.store.conftest import CHUNK, MakeEngine, assert_same, fill, report_of
from tests.engine.store.scripted_home import ScriptedHome
from tests.engine.store.test_loading_from_the_store import stats
from tests.engine_harness import DirectExport, DirectImport, EngineUnderTest

RNG = random.Random(22)
PROMPT = [RNG.randrange(3, 512) for _ in range(150)]
NEAR = {"near_allowed": True}


@pytest.fixture(params=[False, True], ids=["whole", "overlapped"])
def early(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> bool:
    monkeypatch.setattr("tandem.engine.store.loading.arrives_in_time", lambda *_: request.param)
    return bool(request.param)


def make_near(home: ScriptedHome, *places: int) -> None:
    """The objects at `places` of the chain have been through kivi-int8."""
    keys = list(home.objects)
    for place in places:
        encoded = transcode(memoryview(home.objects[keys[place]][1]), "kivi-int8")
        assert encoded is not None
        home.change(keys[place], bytes(encoded))


def cached(engine: EngineUnderTest, key: RequestKey) -> int:
    """Leading tokens of PROMPT that the worker would give to the next one, and tells routers of."""
    chain = engine.engine._requests._intake.sequence(EngineRequest(key, PROMPT, SamplingParams()), 0.0).chain
    told = set(engine.engine.cache_log.snapshot()[1])
    count = engine.engine.blocks.cached_prefix(chain, len(PROMPT))
    assert [each in told for each in chain] == [index < count for index in range(len(chain))]
    return count * 16


def exact_keys(home: ScriptedHome) -> set[ObjectKey]:
    bundles = {key: parse(memoryview(content)) for key, (_, content) in home.objects.items()}
    return {key for key, bundle in bundles.items() if bundle and bundle.header.fidelity is Fidelity.EXACT}


def near_engine(make: MakeEngine) -> EngineUnderTest:
    engine = make(NEAR)
    engine.generate("measure", [7] * 20, max_tokens=1)
    return engine


@pytest.mark.parametrize(
    ("near", "inexact_from", "near_tokens"),
    [((0, 1, 2, 3), 0, 128), ((2,), 64, 32), ((1, 3), 32, 64), ((3,), 96, 32), ((), None, 0)],
)
def test_from_the_first_near_row_on_nothing_is_exact(
    make: MakeEngine, home: ScriptedHome, early: bool, near: tuple[int, ...], inexact_from: int | None, near_tokens: int
) -> None:
    fill(make(), PROMPT)
    make_near(home, *near)
    before = exact_keys(home)
    engine = near_engine(make)
    key = engine.submit("n", PROMPT, max_tokens=60)
    engine.last(key)
    report = report_of(engine, key)
    assert (report.cached_tokens, report.near_tokens, report.inexact_from) == (128, near_tokens, inexact_from)
    assert cached(engine, key) == (144 if inexact_from is None else inexact_from)
    assert engine.engine.wait_saved(10)
    saved = len(exact_keys(home) - before)
    assert saved == (0 if near else (150 + 59) // CHUNK - 4), "an answer after near KV is the next turn's prefix"
    assert stats(engine).loads == {"ok": 1}


def test_a_near_object_behind_cached_blocks_spoils_what_it_fills(
    make: MakeEngine, home: ScriptedHome, early: bool
) -> None:
    engine = near_engine(make)
    fill(engine, PROMPT[:48])
    fill(make(), PROMPT)
    make_near(home, 1, 2, 3)
    key = engine.submit("n", PROMPT, max_tokens=2)
    engine.last(key)
    report = report_of(engine, key)
    assert (report.cached_by_tier, report.near_tokens, report.inexact_from) == ({"device": 48, "host": 80}, 80, 48)
    assert cached(engine, key) == 48


@pytest.mark.parametrize(
    ("lost", "inexact_from"), [((3, 2), 32), ((1, 1), None), ((0, 0), None)], ids=["behind", "itself", "before"]
)
def test_a_load_that_breaks_off(
    make: MakeEngine, home: ScriptedHome, early: bool, lost: tuple[int, int], inexact_from: int | None
) -> None:
    """Rows that are computed after near ones are not exact; near ones that did not come spoil nothing."""
    fill(make(), PROMPT)
    make_near(home, 1)
    engine = near_engine(make)
    home.lost = lost
    key = engine.submit("n", PROMPT, max_tokens=2)
    engine.last(key)
    home.lost = None
    report = report_of(engine, key)
    assert (report.inexact_from, report.near_tokens) == (inexact_from, 0 if inexact_from is None else 32)
    assert cached(engine, key) == (144 if inexact_from is None else inexact_from)


def test_the_next_worker_without_near_kv_answers_as_if_there_were_none(
    make: MakeEngine, home: ScriptedHome, plain: EngineUnderTest, early: bool
) -> None:
    fill(make(), PROMPT)
    make_near(home, 1, 2)
    first = near_engine(make)
    answer = first.generate("n", PROMPT, max_tokens=60)
    assert first.engine.wait_saved(10)
    second, turn = make(), [*PROMPT, *answer, 5, 6, 7]
    key = second.submit("turn", turn, logprobs=0)
    assert_same(second, key, plain, plain.submit("turn", turn, logprobs=0))
    report = report_of(second, key)
    assert (report.near_tokens, report.inexact_from) == (0, None)


def test_equal_prompts_do_not_wait_for_blocks_that_nobody_will_cache(make: MakeEngine, home: ScriptedHome) -> None:
    fill(make(), PROMPT)
    make_near(home, 0)
    engine = near_engine(make)
    keys = [engine.submit(f"n{index}", PROMPT, max_tokens=40) for index in range(3)]
    first, *others = [engine.tokens(key) for key in keys]
    assert [report_of(engine, key).inexact_from for key in keys] == [0, 0, 0]
    assert others == [first, first]


def test_a_request_may_ask_for_exact_kv(
    make: MakeEngine, home: ScriptedHome, plain: EngineUnderTest, early: bool
) -> None:
    """A named context is computed so, and all of it that is new is saved."""
    fill(make(), PROMPT[:64])
    make_near(home, 0)
    engine = near_engine(make)
    key = engine.submit("exact", PROMPT, near_allowed=False, logprobs=0)
    assert_same(engine, key, plain, plain.submit("exact", PROMPT, logprobs=0))
    assert report_of(engine, key).inexact_from is None
    assert engine.engine.wait_saved(10)
    assert len(exact_keys(home)) == 3
    assert cached(engine, key) == 144


def hand_over(prefill: EngineUnderTest, decode: EngineUnderTest, prompt: list[int], max_tokens: int) -> RequestKey:
    kv_import = DirectImport()
    key = decode.submit("h", prompt, kv_import=kv_import, max_tokens=max_tokens)
    prefill.submit("h", prompt, kv_export=DirectExport(prefill.engine, kv_import), max_tokens=max_tokens)
    return key


def test_the_decode_worker_learns_what_it_was_handed(make: MakeEngine, home: ScriptedHome, early: bool) -> None:
    fill(make(), PROMPT)
    make_near(home, 2)
    before = exact_keys(home)
    prefill, decode = near_engine(make), near_engine(make)
    key = hand_over(prefill, decode, PROMPT, 60)
    decode.last(key)
    report = report_of(decode, key)
    assert (report.cached_tokens, report.near_tokens, report.inexact_from) == (128, 32, 64)
    assert cached(prefill, key) == cached(decode, key) == 64
    assert decode.engine.wait_saved(10)
    assert exact_keys(home) == before


def test_what_the_decode_worker_had_itself_stays_exact(make: MakeEngine, home: ScriptedHome) -> None:
    decode = near_engine(make)
    fill(decode, PROMPT[:112])
    fill(make(), PROMPT)
    make_near(home, 1)
    key = hand_over(near_engine(make), decode, PROMPT, 30)
    decode.last(key)
    assert report_of(decode, key).inexact_from == 32, "the first token depends on it"
    assert cached(decode, key) == 112
