"""A prompt whose middle is there: only what lies before and behind it is computed, and the bits are those of computing
all."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from tandem.common.sampling import SamplingParams
from tandem.engine.model.batch import ForwardBatch
from tandem.engine.request import EngineRequest, RequestKey
from tandem.engine.store import loading
from tests.engine.store.conftest import CHUNK, MakeEngine, fill, report_of, scores
from tests.engine.store.scripted_home import ScriptedHome
from tests.engine_harness import EngineUnderTest, wait_for

RNG = random.Random(31)
PROMPT = [RNG.randrange(3, 512) for _ in range(150)]
OTHER = [RNG.randrange(3, 512) for _ in range(200)]
MODE = {"batch_invariant": True}
ROW_BYTES = 2 * 3 * 2 * 16 * 4


def chain_rows(engine: EngineUnderTest) -> list[Tensor]:
    """[layer, K|V, token of the block, ...] of each full block of PROMPT in the prefix cache."""
    chain = engine.engine._requests._intake.sequence(
        EngineRequest(RequestKey("chain", 0), PROMPT, SamplingParams()), 0.0
    ).chain
    blocks = engine.engine.blocks
    assert blocks.cached_prefix(chain, len(PROMPT)) == len(chain) == len(PROMPT) // 16
    return [engine.engine.pool.storage[:, :, blocks._by_hash[block_hash]] for block_hash in chain]


class Recorded:
    """The positions of each prompt's rows, in the order in which they are computed."""

    def __init__(self, engine: EngineUnderTest, patch: pytest.MonkeyPatch) -> None:
        self.positions: list[list[int]] = []
        forward = engine.engine.loaded.decoder.forward

        def recorded(batch: ForwardBatch, *arguments: Any) -> Tensor:
            for piece in batch.prefills:
                self.positions.append(batch.positions[piece.row : piece.row + piece.num_tokens].tolist())
            return forward(batch, *arguments)

        patch.setattr(engine.engine.loaded.decoder, "forward", recorded)


@pytest.mark.parametrize("early", [False, True], ids=["whole", "overlapped"])
@pytest.mark.parametrize(
    ("lost", "end"), [(None, 128), ((1, 2), 96), ((0, 0), 64)], ids=["all comes", "half comes", "nothing comes"]
)
def test_a_prompt_whose_middle_is_loaded_computes_what_lies_around_it(
    make: MakeEngine,
    home: ScriptedHome,
    folder: Path,
    monkeypatch: pytest.MonkeyPatch,
    early: bool,
    lost: tuple[int, int] | None,
    end: int,
) -> None:
    monkeypatch.setattr(loading, "arrives_in_time", lambda *_: early)
    fill(make(**MODE), PROMPT)
    engine = make(store={"save_queue": 1}, **MODE, kv_cache_bytes=14 * 16 * ROW_BYTES)
    assert engine.engine.blocks.usable_blocks == 13
    engine.generate("begins alike", PROMPT[: 2 * CHUNK + 1], max_tokens=1)
    home.locate_may_answer.clear()
    key = engine.submit("gaps", PROMPT, max_tokens=20, logprobs=0)
    wait_for(lambda: home.locates == 3)
    # The device had the first two chunks as the store was asked for the others, and has them no more.
    engine.generate("takes every block", OTHER, max_tokens=1, prompt_logprobs=0)
    recorded = Recorded(engine, monkeypatch)
    home.lost = lost
    home.locate_may_answer.set()
    tokens = engine.tokens(key)

    with EngineUnderTest(folder, **MODE) as whole:
        expected = whole.submit("gaps", PROMPT, max_tokens=20, logprobs=0)
        assert tokens == whole.tokens(expected)
        assert scores(engine, key) == scores(whole, expected)
        for ours, theirs in zip(chain_rows(engine), chain_rows(whole), strict=True):
            assert torch.equal(ours, theirs)
    assert recorded.positions[-1] == [*range(64), *range(end, 150)]
    assert len(recorded.positions) == 1 or (early and lost), "once, and again where the load broke off"
    loaded = end - 64
    assert report_of(engine, key).cached_by_tier == ({"host": loaded} if loaded else {})
