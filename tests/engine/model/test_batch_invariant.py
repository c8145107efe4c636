"""`batch_invariant`: the same bits on every path and beside everybody, or a start that is refused with the remedy."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from tandem.common.errors import ConfigError
from tandem.engine.model import batch_invariance, fixed_linear, native_build
from tandem.engine.model.fixed_linear import FixedLinear, fixed_kernels
from tandem.engine.model.loader import load_model
from tandem.engine.request import Pooling, RequestKey
from tandem.engine.step.sampler import Sampler
from tests.engine.store.scripted_home import ScriptedHome
from tests.engine_harness import DirectExport, DirectImport, EngineUnderTest, make_sequence
from tests.models import tiny_model

DTYPES = (torch.float32, torch.bfloat16)
PROMPT = [(i * 17) % 500 + 3 for i in range(150)]
OPTIONS: list[dict[str, Any]] = [
    {"logprobs": 3},
    {"logprobs": 3, "temperature": 0.9, "top_p": 0.9, "top_k": 40, "seed": 11, "presence_penalty": 0.4},
]


def random(*shape: int, dtype: torch.dtype, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def fixed(
    inputs: int, outputs: int, dtype: torch.dtype, bias: bool = True
) -> tuple[FixedLinear, Tensor, Tensor | None]:
    kernels = fixed_kernels(dtype)
    assert kernels is not None
    weight = random(outputs, inputs, dtype=dtype) / inputs**0.5
    b = random(outputs, dtype=dtype, seed=1) if bias else None
    return FixedLinear(weight, b, kernels), weight, b


INSTRUCTIONS = {
    "plain": (),
    "avx2": native_build._AVX2,
    "avx512": native_build._AVX512,
    "here": native_build.instruction_flags(),
}


@pytest.fixture(params=INSTRUCTIONS)
def instructions(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Fixed layers compiled for each set of instructions that this processor has."""
    flags = INSTRUCTIONS[request.param]
    if not set(flags) <= set(INSTRUCTIONS["here"]):
        pytest.skip("not on this processor")
    monkeypatch.setattr(native_build, "instruction_flags", lambda: flags)
    caches = (native_build.compiled, fixed_kernels)
    for cache in caches:
        cache.cache_clear()
    yield
    for cache in caches:
        cache.cache_clear()


@pytest.mark.usefixtures("instructions")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize(("inputs", "outputs"), [(1, 1), (3, 65), (101, 67), (384, 640), (1025, 64), (2050, 30)])
def test_fixed_layers_agree_with_a_plain_product(inputs: int, outputs: int, bias: bool, dtype: torch.dtype) -> None:
    linear, weight, b = fixed(inputs, outputs, dtype, bias)
    for rows in (1, 5, 6, 7, 97, 200):
        x, residual = random(rows, inputs, dtype=dtype, seed=2), random(rows, outputs, dtype=dtype, seed=3)
        exact = F.linear(x.double(), weight.double(), None if b is None else b.double())
        error = 2**-8 if dtype == torch.bfloat16 else 1e-5
        torch.testing.assert_close(linear(x).double(), exact, rtol=error, atol=2e-5)
        torch.testing.assert_close(linear.plus(x, residual).double(), exact + residual.double(), rtol=error, atol=2e-5)


@pytest.mark.usefixtures("instructions")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_fixed_layers_add_the_inputs_in_their_order(dtype: torch.dtype) -> None:
    """So it is the order that is promised, not merely the same one for all rows: 1 is lost beside 2^30, then it is
    not."""
    kernels = fixed_kernels(dtype)
    assert kernels is not None
    big = 2.0**30
    weight = torch.tensor([[big, 0, 1, 0, -big, 0], [big, 0, -big, 0, 1, 0]], dtype=dtype)
    assert FixedLinear(weight, None, kernels)(torch.ones(1, 6, dtype=dtype)).tolist() == [[0.0, 1.0]]


@pytest.mark.usefixtures("instructions")
@settings(
    max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow]
)
@given(
    inputs=st.integers(1, 300),
    outputs=st.integers(1, 150),
    rows=st.integers(1, 220),
    data=st.data(),
    dtype=st.sampled_from(DTYPES),
)
def test_a_row_of_a_fixed_layer_depends_on_nothing_else(
    inputs: int, outputs: int, rows: int, data: st.DataObject, dtype: torch.dtype
) -> None:
    linear, _, _ = fixed(inputs, outputs, dtype)
    x, residual = random(rows, inputs, dtype=dtype, seed=2), random(rows, outputs, dtype=dtype, seed=3)
    whole = linear.plus(x, residual)
    start = data.draw(st.integers(0, rows - 1))
    stop = data.draw(st.integers(start + 1, rows))
    assert torch.equal(linear.plus(x[start:stop], residual[start:stop]), whole[start:stop])
    order = torch.randperm(rows, generator=torch.Generator().manual_seed(rows))
    assert torch.equal(linear.plus(x[order], residual[order]), whole[order])


def test_threads_do_not_change_a_fixed_layer(monkeypatch: pytest.MonkeyPatch) -> None:
    linear, _, _ = fixed(200, 1000, torch.float32)
    x = random(50, 200, dtype=torch.float32, seed=4)
    alone = linear(x)
    monkeypatch.setattr(fixed_linear, "_PARALLEL_WORK", 1 << 16)
    for threads in (2, 3, 16):
        monkeypatch.setattr(torch, "get_num_threads", lambda threads=threads: threads)
        assert torch.equal(linear(x), alone)


@pytest.fixture(scope="module", params=["float32", "bfloat16"])
def dtype(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def settings_of(dtype: str) -> dict[str, Any]:
    return {"dtype": dtype, "batch_invariant": True}


def everything(engine: EngineUnderTest, key: RequestKey) -> tuple[list[int], list[Any]]:
    """Tokens, and log-probabilities to the bit."""
    return engine.tokens(key), [entry for output in engine.outputs[key] for entry in output.logprobs]


@pytest.fixture
def expected(folder: Path, settings_of: dict[str, Any]) -> list[tuple[list[int], list[Any]]]:
    """For each of OPTIONS: alone, in one go, without any cache."""
    with EngineUnderTest(folder, enable_prefix_caching=False, **settings_of) as engine:
        keys = [(engine.submit(str(n), PROMPT, max_tokens=40, **options)) for n, options in enumerate(OPTIONS)]
        return [everything(engine, key) for key in keys]


def bystanders(engine: EngineUnderTest, count: int) -> None:
    for n in range(count):
        size = (5, 31, 64, 200, 90)[n % 5]
        options = {"temperature": 0.8, "seed": n, "logprobs": n % 3} if n % 2 else {}
        engine.submit(
            f"bystander-{n}", [(n * 29 + i * 13) % 500 + 3 for i in range(size)], max_tokens=30 + n, **options
        )


def test_alone_or_beside_others_in_any_chunks(
    folder: Path, settings_of: dict[str, Any], expected: list[tuple[list[int], list[Any]]]
) -> None:
    for limits in ({}, {"max_num_batched_tokens": 48, "max_num_seqs": 16}):
        with EngineUnderTest(folder, **settings_of, **limits) as engine:
            bystanders(engine, 7)
            keys = [engine.submit(f"ours-{n}", PROMPT, max_tokens=40, **options) for n, options in enumerate(OPTIONS)]
            assert [everything(engine, key) for key in keys] == expected
            again = [
                engine.submit(f"cached-{n}", PROMPT, max_tokens=40, **options) for n, options in enumerate(OPTIONS)
            ]
            assert [everything(engine, key) for key in again] == expected, "from the prefix cache"


def test_preempted_and_computed_again(
    folder: Path, settings_of: dict[str, Any], expected: list[tuple[list[int], list[Any]]]
) -> None:
    size = 4 if settings_of["dtype"] == "float32" else 2
    small = {"kv_cache_bytes": 26 * 2 * 3 * 16 * 32 * size, "max_model_len": 256, "max_num_seqs": 6}
    with EngineUnderTest(folder, **settings_of, **small, enable_prefix_caching=False) as engine:
        bystanders(engine, 5)
        keys = [engine.submit(f"ours-{n}", PROMPT, max_tokens=40, **options) for n, options in enumerate(OPTIONS)]
        assert [everything(engine, key) for key in keys] == expected


@pytest.mark.parametrize("cut", [0, 1, 17])
def test_handed_over_and_resumed_after_a_loss(
    folder: Path, settings_of: dict[str, Any], expected: list[tuple[list[int], list[Any]]], cut: int
) -> None:
    with (
        EngineUnderTest(folder, max_num_batched_tokens=80, max_num_seqs=16, **settings_of) as prefill,
        EngineUnderTest(folder, **settings_of) as decode,
    ):
        bystanders(prefill, 3)
        bystanders(decode, 4)
        keys = []
        for n, options in enumerate(OPTIONS):
            kv_import = DirectImport()
            fields: dict[str, Any] = {"max_tokens": 40, "output_token_ids": expected[n][0][:cut], **options}
            kv_export = DirectExport(prefill.engine, kv_import)
            keys.append(decode.submit(f"ours-{n}", PROMPT, kv_import=kv_import, **fields))
            prefill.submit(f"ours-{n}", PROMPT, kv_export=kv_export, **fields)
        found = [everything(decode, key) for key in keys]
        assert found == [(tokens[cut:], scores[cut:]) for tokens, scores in expected]


def test_embeddings_do_not_depend_on_chunks_or_others(folder: Path, settings_of: dict[str, Any]) -> None:
    vectors = set()
    for limits in ({}, {"max_num_batched_tokens": 32, "max_num_seqs": 16}, {"max_num_batched_tokens": 80}):
        with EngineUnderTest(folder, **settings_of, **({"max_num_seqs": 16} | limits)) as engine:
            bystanders(engine, len(limits) * 3)
            key = engine.submit("embedding", PROMPT, pooling=Pooling.MEAN, max_tokens=1)
            vectors.add(engine.last(key).embedding)
    assert len(vectors) == 1


def test_a_drawn_token_does_not_depend_on_the_other_rows() -> None:
    """With a vocabulary whose rows do not begin where vectors do."""
    vocab = 1003
    options = {"temperature": 0.7, "top_p": 0.8, "top_k": 300, "min_p": 1e-4, "logprobs": 5}
    sequences = [make_sequence(str(n), [5, 6], seed=n, **options) for n in range(9)]
    logits = random(9, vocab, dtype=torch.float32) * 3

    def sampler() -> Sampler:
        made = Sampler(9, vocab, torch.device("cpu"), batch_invariant=True)
        for row, sequence in enumerate(sequences):
            made.admit(sequence, row)
        return made

    together = sampler().sample(logits.clone(), sequences)
    assert together[1] is not None
    for row, sequence in enumerate(sequences):
        tokens, scores = sampler().sample(logits[row : row + 1].clone(), [sequence])
        assert scores is not None
        assert (tokens[0], scores[0]) == (together[0][row], together[1][row])


def test_kv_of_the_mode_is_kept_apart(folder: Path) -> None:
    common: dict[str, Any] = {"dtype": "float32", "device": "cpu", "quantization": None}
    plain, mode, again = (load_model(folder, **common, batch_invariant=value) for value in (False, True, True))
    assert plain.namespace != mode.namespace == again.namespace
    assert plain.compatibility != mode.compatibility == again.compatibility


def test_kv_of_another_instruction_set_is_kept_apart(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its sums have other bits: a prefix from there would not be what is computed here."""
    common: dict[str, Any] = {"dtype": "float32", "device": "cpu", "quantization": None, "batch_invariant": True}
    here = load_model(folder, **common)
    batch_invariance.arithmetic.cache_clear()
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "another")
    try:
        assert load_model(folder, **common).namespace != here.namespace
    finally:
        batch_invariance.arithmetic.cache_clear()


def test_the_store_gives_what_a_worker_of_the_mode_saved(
    folder: Path, settings_of: dict[str, Any], expected: list[tuple[list[int], list[Any]]]
) -> None:
    from tandem.engine.store.cache import EngineStore

    home = ScriptedHome()
    options: dict[str, Any] = {"chunk_tokens": 32, "model": "tiny"}
    with EngineUnderTest(folder, EngineStore(home, worker_id="w1", **options), **settings_of) as first:
        bystanders(first, 3)
        first.generate("before", PROMPT, max_tokens=2)
        assert first.engine.wait_saved(30)
    with EngineUnderTest(folder, EngineStore(home, worker_id="w2", **options), **settings_of) as second:
        keys = [second.submit(f"ours-{n}", PROMPT, max_tokens=40, **options) for n, options in enumerate(OPTIONS)]
        assert [everything(second, key) for key in keys] == expected
    with EngineUnderTest(folder, EngineStore(home, worker_id="w3", **options), dtype=settings_of["dtype"]) as other:
        key = other.submit("plain", PROMPT)
        other.last(key)
        (report,) = [output.prompt for output in other.outputs[key] if output.prompt is not None]
        assert report.cached_tokens == 0, "a worker without the mode has other KV"


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        ({"dtype": "float16"}, "float32 or bfloat16"),
        ({"quantization": "int8"}, "quantization int8"),
        ({"attention": "torch"}, "attention torch"),
    ],
)
def test_what_rules_it_out_is_named(folder: Path, arguments: dict[str, Any], complaint: str) -> None:
    settings: dict[str, Any] = {"dtype": "float32", "device": "cpu", "quantization": None, "batch_invariant": True}
    with pytest.raises(ConfigError, match=f"batch_invariant: .*{complaint}"):
        load_model(folder, **(settings | arguments))


def test_sizes_that_the_kernels_do_not_take_are_named(tmp_path: Path) -> None:
    folder = tiny_model("llama", tmp_path / "odd", head_dim=24, intermediate_size=100, num_hidden_layers=1)
    with pytest.raises(ConfigError, match=r"multiples of 16.*100.*24"):
        load_model(folder, dtype="float32", device="cpu", quantization=None, batch_invariant=True)


@pytest.fixture
def no_compiler(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    from tandem.engine.model import native

    caches = (native_build.compiled, fixed_linear.fixed_kernels, native.load_kernels)
    for cache in caches:
        cache.cache_clear()
    monkeypatch.setattr(native_build.shutil, "which", lambda name: None)
    yield
    for cache in caches:
        cache.cache_clear()


@pytest.mark.usefixtures("no_compiler")
def test_without_a_compiler_the_start_is_refused(folder: Path) -> None:
    with pytest.raises(ConfigError, match=r"C compiler.*install gcc or clang"):
        load_model(folder, dtype="float32", device="cpu", quantization=None, batch_invariant=True)
