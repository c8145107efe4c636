"""What `batch_invariant` uses on a GPU. See test_triton_attention.py for how these tests run where there is none."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

from tandem.engine.model.batch import PrefillSlice
from tests.engine.model.triton_scene import DEVICE, DTYPES, HALF, INTERPRETED, TOLERANCE, Scene, assert_agree

from tandem.engine.model.kernels.backend import TritonAttention  # isort: skip
from tandem.engine.model.kernels.fixed_linear import BLOCK_M, TritonLinear  # isort: skip
from tandem.engine.model.kernels.rms_norm import rms_norm  # isort: skip

pytestmark = [] if INTERPRETED else [pytest.mark.gpu]
BITS = 2e-3 if INTERPRETED else 0.0
"""Under the interpreter a product is the processor's BLAS, which may add up a tile's rows in different ways."""


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize(("inputs", "outputs"), [(64, 64), (100, 70), (192, 33)])
def test_linear_layers_agree_with_a_plain_product(inputs: int, outputs: int, bias: bool, dtype: torch.dtype) -> None:
    weight = (torch.randn(outputs, inputs) / inputs**0.5).to(DEVICE, dtype)
    b = torch.randn(outputs).to(DEVICE, dtype) if bias else None
    linear = TritonLinear(weight, b)
    for rows in (0, 1, BLOCK_M, BLOCK_M + 3):
        x, residual = torch.randn(rows, inputs).to(DEVICE, dtype), torch.randn(rows, outputs).to(DEVICE, dtype)
        exact = F.linear(x.float(), weight.float(), None if b is None else b.float())
        torch.testing.assert_close(linear(x).float(), exact, atol=4 * TOLERANCE[dtype], rtol=TOLERANCE[dtype])
        torch.testing.assert_close(
            linear.plus(x, residual).float(), exact + residual.float(), atol=4 * TOLERANCE[dtype], rtol=TOLERANCE[dtype]
        )


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_row_of_a_linear_layer_does_not_depend_on_the_others(dtype: torch.dtype) -> None:
    linear = TritonLinear(torch.randn(70, 200).to(DEVICE, dtype), None)
    x = torch.randn(2 * BLOCK_M + 5, 200).to(DEVICE, dtype)
    whole = linear(x)
    for start, stop in ((0, 1), (3, 20), (BLOCK_M, BLOCK_M + 1), (7, len(x))):
        torch.testing.assert_close(linear(x[start:stop]), whole[start:stop], atol=BITS, rtol=BITS)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(1, 64), (5, 100), (3, 6, 32)])
def test_norms_agree_and_a_row_has_the_same_bits_alone(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    x, weight = torch.randn(shape).to(DEVICE, dtype) * 3, torch.rand(shape[1:]).to(DEVICE) + 0.5
    exact = F.rms_norm(x.float(), shape[-1:], None, 1e-5) * weight
    found = rms_norm(x, weight, 1e-5)
    torch.testing.assert_close(found.float(), exact, atol=2 * TOLERANCE[dtype], rtol=2 * TOLERANCE[dtype])
    assert torch.equal(rms_norm(x[-1:], weight, 1e-5)[0], found[-1])


@pytest.mark.parametrize("window", [None, 20])
def test_attention_of_a_step_agrees_with_the_reference(window: int | None) -> None:
    backend = TritonAttention((window,), batch_invariant=True)
    for scene in (Scene([33, 5], [(6, 20), (9, 0)]), Scene([17], []), Scene([], [(70, 3)])):
        found = backend.attend(0, scene.q, scene.batch, scene.pool)
        assert_agree((found,), (scene.expected(window)[0].flatten(1),), torch.float32)


@pytest.mark.parametrize("window", [None, 20])
def test_a_row_has_the_same_bits_in_any_chunk_with_gaps_and_decoded(window: int | None) -> None:
    scene = Scene([], [(70, 10)], group=3, dtype=HALF)
    backend = TritonAttention((window,), batch_invariant=True)
    whole = backend.attend(0, scene.q, scene.batch, scene.pool)
    blocks = scene.batch.prefills[0].block_ids
    for start, stop in ((0, 1), (1, 38), (69, 70)):
        positions = torch.arange(10 + start, 10 + stop, device=DEVICE)
        part = replace(scene.batch, positions=positions, prefills=[PrefillSlice(0, stop - start, 10 + stop, blocks)])
        found = backend.attend(0, scene.q[start:stop], part, scene.pool)
        torch.testing.assert_close(found, whole[start:stop], atol=BITS, rtol=BITS)
    rows = [0, 5, 69]
    positions = torch.tensor(rows, device=DEVICE) + 10
    apart = replace(scene.batch, positions=positions, prefills=[PrefillSlice(0, len(rows), 80, blocks)])
    found = backend.attend(0, scene.q[rows], apart, scene.pool)
    torch.testing.assert_close(found, whole[rows], atol=BITS, rtol=BITS)
    decoded = replace(
        scene.batch,
        positions=positions,
        num_decode=len(rows),
        block_tables=blocks.repeat(len(rows), 1),
        context_lens=positions + 1,
        max_context_len=80,
        prefills=[],
    )
    found = backend.attend(0, scene.q[rows], decoded, scene.pool)
    torch.testing.assert_close(found, whole[rows], atol=BITS, rtol=BITS)
