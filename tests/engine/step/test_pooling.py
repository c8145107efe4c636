"""Embeddings equal those of transformers, however the prompt is chunked, cached or interrupted."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tandem.common.errors import TandemError
from tandem.common.sampling import Constraint
from tandem.engine.request import FinishReason, Pooling, RequestKey, RequestOutput
from tandem.engine.step.pooling import Pooler
from tandem.engine.store.cache import EngineStore
from tandem.proto import worker_pb2
from tandem.worker.wire import output_from_proto, output_to_proto, request_from_proto
from tests.engine.store.scripted_home import ScriptedHome
from tests.engine_harness import DirectExport, DirectImport, EngineUnderTest
from tests.models import tiny_model

PROMPTS = [[(n * 31 + i * 17) % 500 + 3 for i in range(length)] for n, length in enumerate((1, 16, 50, 150))]
KINDS = (Pooling.MEAN, Pooling.LAST)


@pytest.fixture(scope="module")
def references(folder: Path) -> list[dict[Pooling, Any]]:
    """transformers' hidden states after the final norm, pooled."""
    return [reference(folder, prompt) for prompt in PROMPTS]


def reference(folder: Path, prompt: list[int]) -> dict[Pooling, Any]:
    from transformers import AutoModel

    model = AutoModel.from_pretrained(folder, dtype=torch.float32)
    with torch.inference_mode():
        hidden = model(torch.tensor([prompt])).last_hidden_state[0].double()
    return {Pooling.MEAN: hidden.mean(dim=0).numpy(), Pooling.LAST: hidden[-1].numpy()}


def vector(engine: EngineUnderTest, key: RequestKey) -> Any:
    last = engine.last(key)
    assert (last.finish_reason, last.error_code, last.token_ids) == (FinishReason.STOP, "", [])
    assert len([output for output in engine.outputs[key] if output.preempted is None]) == 1
    return np.frombuffer(last.embedding, "<f4")


def check(engine: EngineUnderTest, keys: dict[tuple[int, Pooling], RequestKey], references: Any) -> None:
    for (index, pooling), key in keys.items():
        np.testing.assert_allclose(vector(engine, key), references[index][pooling], rtol=1e-4, atol=1e-4)


def ask_all(engine: EngineUnderTest, **options: Any) -> dict[tuple[int, Pooling], RequestKey]:
    return {
        (index, pooling): engine.submit(f"{pooling.name} {index}", prompt, pooling=pooling, **options)
        for index, prompt in enumerate(PROMPTS)
        for pooling in KINDS
    }


@pytest.mark.parametrize("settings", [{}, {"max_num_batched_tokens": 48, "max_num_seqs": 8}], ids=["whole", "chunks"])
def test_embeddings_equal_those_of_transformers(folder: Path, settings: dict[str, int], references: Any) -> None:
    with EngineUnderTest(folder, **settings) as engine:
        check(engine, ask_all(engine), references)


@pytest.mark.parametrize("family", ["qwen2", "qwen3"])
def test_of_other_families_too(tmp_path: Path, family: str) -> None:
    folder = tiny_model(family, tmp_path / family)
    with EngineUnderTest(folder) as engine:
        expected = reference(folder, PROMPTS[2])
        for pooling in KINDS:
            found = vector(engine, engine.submit(pooling.name, PROMPTS[2], pooling=pooling))
            np.testing.assert_allclose(found, expected[pooling], rtol=1e-4, atol=1e-4)


def test_a_cached_prefix_serves_the_last_and_not_the_mean(engine: EngineUnderTest, references: Any) -> None:
    engine.generate("first", PROMPTS[3])
    keys = {(3, pooling): engine.submit(pooling.name, PROMPTS[3], pooling=pooling) for pooling in KINDS}
    check(engine, keys, references)
    cached = [engine.last(key).prompt.cached_tokens for key in keys.values()]  # type: ignore[union-attr]
    assert cached == [0, 144]


def test_a_mean_leaves_its_blocks_to_others(engine: EngineUnderTest) -> None:
    vector(engine, engine.submit("mean", PROMPTS[3], pooling=Pooling.MEAN))
    key = engine.submit("next", PROMPTS[3])
    engine.tokens(key)
    report = engine.outputs[key][0].prompt
    assert report is not None
    assert report.cached_tokens == 144


def test_generation_in_the_same_batch_is_left_alone(engine: EngineUnderTest, references: Any) -> None:
    options: dict[str, Any] = {"max_tokens": 40, "temperature": 0.8, "seed": 3, "logprobs": 1, "prompt_logprobs": 1}
    alone = engine.submit("alone", PROMPTS[2], cache_salt=b"a", **options)
    expected = engine.tokens(alone)
    generating = engine.submit("company", PROMPTS[2], cache_salt=b"b", **options)
    keys = ask_all(engine)
    assert engine.tokens(generating) == expected
    first = [engine.outputs[key][0].prompt_logprobs for key in (alone, generating)]
    scores = [[entry.logprob for entry in entries if entry] for entries in first]
    assert scores[1] == pytest.approx(scores[0], abs=1e-4)
    check(engine, keys, references)


@pytest.mark.parametrize("pooling", KINDS)
def test_after_a_preemption(folder: Path, pooling: Pooling) -> None:
    """Decodes of a higher priority grow and push a long prompt out half-way."""
    prompt, block_bytes = [(i * 17) % 500 + 3 for i in range(304)], 2 * 3 * 16 * 32 * 4
    small = EngineUnderTest(
        folder, max_num_batched_tokens=24, max_num_seqs=8, kv_cache_bytes=28 * block_bytes, max_model_len=320
    )
    preempted: list[str] = []
    schedule = small.engine.scheduler.schedule

    def counting(now: float):  # type: ignore[no-untyped-def]
        plan = schedule(now)
        preempted.extend(sequence.key.request_id for sequence in plan.preempted)
        return plan

    small.engine.scheduler.schedule = counting  # type: ignore[method-assign]
    for i in range(4):
        small.submit(f"d{i}", [(i * 37 + j * 11) % 500 + 3 for j in range(14)], max_tokens=60, priority=-1)
    key = small.submit("pooled", prompt, pooling=pooling)
    with small:
        found = vector(small, key)
    assert "pooled" in preempted
    np.testing.assert_allclose(found, reference(folder, prompt)[pooling], rtol=1e-4, atol=1e-4)


def test_the_context_may_be_filled(folder: Path) -> None:
    with EngineUnderTest(folder, max_model_len=50) as engine:
        assert len(vector(engine, engine.submit("fits", PROMPTS[2], pooling=Pooling.LAST, max_tokens=5))) == 64
        last = engine.last(engine.submit("not", PROMPTS[3], pooling=Pooling.LAST))
        assert last.error_code == "context_length_exceeded"


def test_with_a_store(folder: Path, references: Any) -> None:
    home = ScriptedHome()
    with EngineUnderTest(folder, EngineStore(home, chunk_tokens=32)) as first:
        vector(first, first.submit("a", PROMPTS[3], pooling=Pooling.MEAN))
    with EngineUnderTest(folder, EngineStore(home, chunk_tokens=32)) as second:
        keys = {(3, pooling): second.submit(pooling.name, PROMPTS[3], pooling=pooling) for pooling in KINDS}
        check(second, keys, references)
        cached = {pooling: second.last(key).prompt.cached_tokens for (_, pooling), key in keys.items()}  # type: ignore[union-attr]
        assert cached[Pooling.MEAN] == 0
        assert cached[Pooling.LAST] >= 128


@pytest.mark.parametrize(
    "options",
    [
        {"output_token_ids": [5]},
        {"constraint": Constraint("regex", "a")},
        {"prompt_logprobs": 0},
        {"kv_import": DirectImport()},
    ],
    ids=lambda options: next(iter(options)),
)
def test_what_does_not_go_with_pooling_is_refused(engine: EngineUnderTest, options: dict[str, Any]) -> None:
    last = engine.last(engine.submit("a", PROMPTS[2], pooling=Pooling.MEAN, **options))
    assert last.error_code == "invalid_request"
    assert "pooling" in last.error_message


def test_a_hand_over_of_an_embedding_is_refused(engine: EngineUnderTest) -> None:
    kv_export = DirectExport(engine.engine, DirectImport())
    last = engine.last(engine.submit("a", PROMPTS[2], pooling=Pooling.LAST, kv_export=kv_export))
    assert last.error_code == "invalid_request"
    assert kv_export.aborted_because


def test_the_wire_carries_it() -> None:
    for pooling in Pooling:
        submit = worker_pb2.Submit(prompt_token_ids=[1], pooling=int(pooling))  # type: ignore[arg-type]
        submit.sampling.top_p = submit.sampling.repetition_penalty = 1.0
        assert request_from_proto(submit).pooling is pooling
    submit.pooling = 9  # type: ignore[assignment]
    with pytest.raises(TandemError, match="pooling"):
        request_from_proto(submit)
    output = RequestOutput(RequestKey("a", 0), finish_reason=FinishReason.STOP, embedding=b"\0\0\x80\x3f")
    assert output_from_proto(output_to_proto(output)) == output


def test_the_mean_does_not_depend_on_the_chunks() -> None:
    rows = torch.randn(1000, 8, generator=torch.Generator().manual_seed(0))
    vectors = set()
    for size in (1, 7, 1000):
        pooler = Pooler(Pooling.MEAN)
        for start in range(0, 1000, size):
            pooler.add(rows[start : start + size])
        vectors.add(pooler.result())
    assert len(vectors) == 1
    with pytest.raises(ValueError, match="nothing"):
        Pooler(Pooling.MEAN).result()
