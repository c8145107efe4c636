"""Random requests, faults, cancels and deadlines against one store: tokens never change, and the books balance."""

from __future__ import annotations

import random
import time
from dataclasses import dataclass
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tandem.engine.store import loading
from tandem.engine.store.cache import EngineStore
from tandem.kvstore.interfaces import Located, TierName
from tests.engine.store.conftest import CHUNK
from tests.engine.store.scripted_home import ScriptedFetch, ScriptedHome
from tests.engine_harness import TIMEOUT_S, EngineUnderTest, wait_for

RNG = random.Random(16)
STEMS = [[RNG.randrange(3, 512) for _ in range(200)] for _ in range(2)]
BLOCK_BYTES = 2 * 3 * 16 * 32 * 4


@dataclass(frozen=True)
class Wish:
    stem: int
    shared: int
    """Tokens of the stem."""
    tail: int
    """One more token, so that prompts part ways."""
    max_tokens: int
    ending: str
    fault: str


WISHES = st.builds(
    Wish,
    stem=st.integers(0, 1),
    shared=st.one_of(st.sampled_from([31, 32, 33, 64, 96, 128]), st.integers(1, 150)),
    tail=st.integers(3, 5),
    max_tokens=st.integers(1, 40),
    ending=st.sampled_from(["", "", "", "cancel", "deadline"]),
    fault=st.sampled_from(["", "", "", "lost", "flip", "locate", "fetch", "refuse", "slow"]),
)


class FaultyHome(ScriptedHome):
    """The fault of the moment hits the next call."""

    def __init__(self, rng: random.Random) -> None:
        super().__init__()
        self.rng = rng
        self.faults: list[str] = []
        self.tier_of = lambda index: list(TierName)[1 + index % 4]

    def _next(self, *wanted: str) -> str:
        return self.faults.pop(0) if self.faults and self.faults[0] in wanted else ""

    def locate(self, keys):  # type: ignore[no-untyped-def]
        if self._next("locate"):
            raise RuntimeError("locate is broken")
        return super().locate(keys)

    def fetch(self, located: list[Located], overlap_s: float = 0.0) -> ScriptedFetch:  # type: ignore[override]
        fault = self._next("fetch", "lost", "flip", "slow")
        if fault == "fetch":
            raise RuntimeError("fetch is broken")
        if fault == "flip" and located:
            self.flip(self.rng.choice(located).key, self.rng.randrange(3))
        self.lost = (self.rng.randrange(len(located)), self.rng.randrange(3)) if fault == "lost" else None
        self.layer_s = 0.02 if fault == "slow" else 0.0
        return super().fetch(located)

    def begin_put(self, key, info):  # type: ignore[no-untyped-def]
        if self._next("refuse"):
            raise RuntimeError("begin_put is broken")
        return super().begin_put(key, info)


def play(
    folder: Path, plain: EngineUnderTest, wishes: list[Wish], max_num_seqs: int, num_blocks: int, seed: int
) -> None:
    home = FaultyHome(random.Random(seed))
    for round_ in range(2):  # the second engine finds what the first has saved
        options = {"max_num_seqs": max_num_seqs, "max_num_batched_tokens": 64 + max_num_seqs, "max_model_len": 240}
        engine = EngineUnderTest(
            folder, EngineStore(home, chunk_tokens=CHUNK), kv_cache_bytes=num_blocks * BLOCK_BYTES, **options
        )
        engine.engine.start()
        keys = []
        for index, wish in enumerate(wishes):
            prompt = [*STEMS[wish.stem][: wish.shared], wish.tail]
            deadline = time.monotonic() + 0.05 if wish.ending == "deadline" else None
            if wish.fault:
                home.faults.append(wish.fault)
            keys.append(engine.submit(f"{round_}-{index}", prompt, max_tokens=wish.max_tokens, deadline=deadline))
            if wish.ending == "cancel":
                engine.engine.cancel(keys[index // 2])
            engine.engine.check_integrity()
        for key, wish in zip(keys, wishes, strict=True):
            last = engine.last(key)
            if last.finish_reason is not None and not last.error_code and last.finish_reason.name == "LENGTH":
                prompt = [*STEMS[wish.stem][: wish.shared], wish.tail]
                assert engine.tokens_so_far(key) == reference(plain, prompt)[: wish.max_tokens]
            else:
                assert last.error_code in ("", "deadline_exceeded")
        engine.check_all_free()
        assert engine.engine.stop(TIMEOUT_S)
        wait_for(lambda: not home.open_fetches)


_REFERENCES: dict[tuple[int, ...], list[int]] = {}


def reference(plain: EngineUnderTest, prompt: list[int]) -> list[int]:
    if tuple(prompt) not in _REFERENCES:
        _REFERENCES[tuple(prompt)] = plain.generate("reference", prompt, max_tokens=40)
    return _REFERENCES[tuple(prompt)]


SCHEDULES = {
    "wishes": st.lists(WISHES, min_size=1, max_size=10),
    "max_num_seqs": st.integers(1, 5),
    "num_blocks": st.sampled_from([17, 24, 60]),
    "seed": st.integers(0, 1000),
}
QUIET = [HealthCheck.function_scoped_fixture, HealthCheck.too_slow]


@pytest.mark.parametrize("early", [False, True])
@settings(max_examples=3, deadline=None, suppress_health_check=QUIET)
@given(**SCHEDULES)
def test_random_schedules(
    folder: Path,
    plain: EngineUnderTest,
    early: bool,
    wishes: list[Wish],
    max_num_seqs: int,
    num_blocks: int,
    seed: int,
) -> None:
    with pytest.MonkeyPatch.context() as patch:
        if early:
            patch.setattr(loading, "arrives_in_time", lambda *_: True)
        play(folder, plain, wishes, max_num_seqs, num_blocks, seed)


@pytest.mark.slow
@pytest.mark.parametrize("early", [False, True])
@settings(max_examples=30, deadline=None, suppress_health_check=QUIET)
@given(**SCHEDULES)
def test_many_random_schedules(
    folder: Path,
    plain: EngineUnderTest,
    early: bool,
    wishes: list[Wish],
    max_num_seqs: int,
    num_blocks: int,
    seed: int,
) -> None:
    with pytest.MonkeyPatch.context() as patch:
        if early:
            patch.setattr(loading, "arrives_in_time", lambda *_: True)
            patch.setattr(loading, "GATE_S", 0.03)
        play(folder, plain, wishes, max_num_seqs, num_blocks, seed)
