"""The Triton attention kernels against a reference that can be checked by eye.

On a GPU these tests run as they are. Without one they run under Triton's interpreter, which must be chosen before
triton is first imported: `test_triton_interpreter.py` runs this file in a child process with TRITON_INTERPRET=1.
"""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise

import pytest
import torch

from tandem.engine.model.batch import PrefillSlice
from tests.engine.model.triton_scene import DEVICE, DTYPES, HALF, INTERPRETED, Scene, assert_agree, reference

from tandem.engine.model.kernels import paged_decode as decode_module  # isort: skip
from tandem.engine.model.kernels.backend import TritonAttention  # isort: skip
from tandem.engine.model.kernels.paged_decode import paged_decode  # isort: skip
from tandem.engine.model.kernels.paged_prefill import paged_prefill  # isort: skip

pytestmark = [] if INTERPRETED else [pytest.mark.gpu]

# group, head_dim, block_size, window: every value of each appears, not every combination.
SHAPES = [
    (1, 32, 16, None),
    (3, 64, 48, 5),
    (4, 128, 16, 33),
    (8, 64, 32, None),
    (5, 80, 16, 100),
    (20, 32, 16, 1),
]
SHAPE_IDS = [f"group{g}-dim{d}-block{b}-window{w}" for g, d, b, w in SHAPES]


@pytest.fixture
def short_splits(monkeypatch: pytest.MonkeyPatch) -> None:
    """Many splits at lengths that the interpreter can do."""
    monkeypatch.setattr(decode_module, "MIN_SPLIT_KEYS", 16)
    monkeypatch.setattr(decode_module, "MAX_SPLITS", 4)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("group", "head_dim", "block_size", "window"), SHAPES, ids=SHAPE_IDS)
def test_decode_agrees_with_the_reference(
    group: int, head_dim: int, block_size: int, window: int | None, dtype: torch.dtype
) -> None:
    contexts = [1, block_size, block_size + 1, 101]
    scene = Scene(contexts, [], group=group, head_dim=head_dim, block_size=block_size, dtype=dtype)
    assert_agree(scene.decode(window), scene.expected(window), dtype)


@pytest.mark.usefixtures("short_splits")
@pytest.mark.parametrize("window", [None, 1, 40, 1000])
def test_decode_in_splits_agrees_with_the_reference(window: int | None) -> None:
    scene = Scene([270, 1, 17, 65, 128], [], group=3, dtype=HALF)
    assert_agree(scene.decode(window), scene.expected(window), HALF)


def test_decode_splits_a_long_context_by_default() -> None:
    scene = Scene([2 * decode_module.MIN_SPLIT_KEYS + 1, decode_module.MIN_SPLIT_KEYS], [], group=1, dtype=HALF)
    assert_agree(scene.decode(), scene.expected(None), HALF)


@pytest.mark.usefixtures("short_splits")
@pytest.mark.parametrize("window", [None, 50])
def test_decode_of_a_request_is_bit_identical_in_any_batch(window: int | None) -> None:
    scene = Scene([15, 200, 90], [], dtype=HALF)
    together, lse_together = scene.decode(window)
    whole = scene.batch
    for row in range(3):
        own = int(whole.context_lens[row])
        scene.batch = replace(
            whole,
            num_decode=1,
            block_tables=whole.block_tables[row : row + 1],
            context_lens=whole.context_lens[row : row + 1],
        )
        q, scene.q = scene.q, scene.q[row : row + 1]
        alone, lse_alone = scene.decode(window, max_context_len=own)
        scene.q = q
        assert torch.equal(alone[0], together[row])
        assert torch.equal(lse_alone[0], lse_together[row])


def test_decode_without_context_is_the_neutral_element_of_a_merge() -> None:
    scene = Scene([20, 20], [])
    scene.batch.context_lens[0] = 0
    for bound in (20, 600):
        o, lse = scene.decode(max_context_len=bound)
        assert not o[0].any()
        assert (lse[0] == -torch.inf).all()
        assert o[1].isfinite().all()


def test_parts_of_a_context_merge_to_the_whole() -> None:
    scene = Scene([100], [])
    o, lse = scene.decode()
    table = scene.batch.block_tables
    parts = []
    for start, stop, keys in ((0, 3, 48), (3, 7, 52)):
        scene.batch.block_tables = table[:, start:stop]
        scene.batch.context_lens = torch.tensor([keys], device=DEVICE)
        parts.append(scene.decode(max_context_len=keys))
    merged_lse = torch.logaddexp(parts[0][1], parts[1][1])
    merged = sum(part * (part_lse - merged_lse).exp()[..., None] for part, part_lse in parts)
    torch.testing.assert_close(merged, o, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(merged_lse, lse, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("group", "head_dim", "block_size", "window"), SHAPES, ids=SHAPE_IDS)
def test_prefill_agrees_with_the_reference(
    group: int, head_dim: int, block_size: int, window: int | None, dtype: torch.dtype
) -> None:
    slices = [(1, 0), (block_size, 0), (7, block_size - 3), (1, 2 * block_size), (33, 31)]
    scene = Scene([], slices, group=group, head_dim=head_dim, block_size=block_size, dtype=dtype)
    assert_agree(scene.prefill(window), scene.expected(window), dtype)


@pytest.mark.parametrize("window", [None, 3, 70])
def test_prefill_of_several_tiles_agrees_with_the_reference(window: int | None) -> None:
    scene = Scene([], [(75, 50), (3, 62), (3, 63), (3, 64)], group=4, dtype=HALF)
    assert_agree(scene.prefill(window), scene.expected(window), HALF)


@pytest.mark.parametrize("window", [None, 20])
def test_chunked_prefill_is_bit_identical_to_whole_prefill(window: int | None) -> None:
    scene = Scene([], [(90, 10)], group=3, dtype=HALF)
    whole, whole_lse = scene.prefill(window)
    blocks = scene.batch.prefills[0].block_ids
    bounds = [0, 1, 38, 77, 90]
    scene.batch.prefills = [PrefillSlice(start, stop - start, 10 + stop, blocks) for start, stop in pairwise(bounds)]
    chunked, chunked_lse = scene.prefill(window)
    # Under the interpreter a product is the processor's BLAS, which may add up a tile's rows in different ways.
    tolerance = 0.0 if torch.cuda.is_available() else 2e-3
    torch.testing.assert_close(chunked, whole, rtol=tolerance, atol=tolerance)
    torch.testing.assert_close(chunked_lse, whole_lse, rtol=tolerance, atol=tolerance)


SCATTERED = ([0, 1, 2, 60, 61, 63, 64, 65, 130], [*range(5, 25), *range(90, 140)], [199])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("window", [None, 20])
def test_rows_that_do_not_follow_one_another_see_what_is_before_each(window: int | None, dtype: torch.dtype) -> None:
    scene = Scene([17], [(9, 4)], scattered=SCATTERED, group=3, dtype=dtype)
    found = TritonAttention((window,)).attend(0, scene.q, scene.batch, scene.pool)
    assert_agree((found,), (scene.expected(window)[0].flatten(1),), dtype)


def test_rows_of_no_slice_are_left_alone() -> None:
    scene = Scene([], [(5, 3), (4, 0)])
    out = torch.full_like(scene.q, 7.0)
    first = scene.batch.prefills[0]
    paged_prefill(
        scene.q,
        scene.pool.k[0],
        scene.pool.v[0],
        first.block_ids,
        torch.tensor([[first.row, first.num_tokens, 0]], dtype=torch.int32, device=DEVICE),
        scene.batch.positions,
        max_tokens=300,
        scale=1.0,
        out=out,
    )
    assert (out[5:] == 7.0).all()
    assert not (out[:5] == 7.0).any()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_backend_serves_decode_and_prefill_rows_of_one_step(dtype: torch.dtype) -> None:
    backend = TritonAttention((None, 9, None))
    scene = Scene([33, 5], [(6, 20), (9, 0)], num_layers=3, dtype=dtype)
    # A fused projection hands over q as a part of wider rows.
    q = torch.cat([scene.q, scene.q], dim=1)[:, : scene.q.shape[1]]
    for layer in range(3):
        found = backend.attend(layer, q, scene.batch, scene.pool)
        expected, _ = scene.expected(backend.sliding_windows[layer])
        assert found.shape == (q.shape[0], q.shape[1] * q.shape[2])
        assert_agree((found,), (expected.flatten(1),), dtype)


def test_backend_notices_the_next_step() -> None:
    backend = TritonAttention((None,))
    for scene in (Scene([], [(6, 20)]), Scene([3], [(2, 1), (9, 40)]), Scene([3, 17], [])):
        found = backend.attend(0, scene.q, scene.batch, scene.pool)
        assert_agree((found,), (scene.expected(None)[0].flatten(1),), torch.float32)


@pytest.mark.slow
def test_blocks_beyond_two_to_the_31_elements_are_reached() -> None:
    kv_heads, head_dim, block_size = 8, 128, 16
    num_blocks = 2**31 // (kv_heads * head_dim * block_size) + 4
    k = torch.empty(num_blocks, block_size, kv_heads, head_dim, dtype=torch.float16, device=DEVICE)
    v = k
    k[-2:] = torch.randn(2, block_size, kv_heads, head_dim).to(k)
    q = torch.randn(1, kv_heads, head_dim).to(k)
    table = torch.tensor([[num_blocks - 1, num_blocks - 2]], device=DEVICE)
    rows = k[[-1, -2]].flatten(0, 1)[:30]
    lens = torch.tensor([30], device=DEVICE)
    expected = reference(q, rows, rows, [29], None)
    found = paged_decode(q, k, v, table, lens, max_context_len=30, scale=head_dim**-0.5)
    assert_agree(found, expected, torch.float16)
    piece = torch.tensor([[0, 1, 0]], dtype=torch.int32, device=DEVICE)
    found = paged_prefill(q, k, v, table[0], piece, lens - 1, max_tokens=1, scale=head_dim**-0.5)
    assert_agree(found, expected, torch.float16)


def test_layouts_that_do_not_fit_are_refused() -> None:
    scene = Scene([20], [])
    good = (scene.pool.k[0], scene.pool.v[0], scene.batch.block_tables, scene.batch.context_lens)
    for q, k in (
        (scene.q[:, :3], good[0]),
        (scene.q.double(), good[0]),
        (scene.q[..., :16], good[0]),
        (scene.q, good[0].transpose(1, 2)),
    ):
        with pytest.raises(ValueError, match=r"group|dtype|contiguous|want q"):
            paged_decode(q, k, good[1], *good[2:], max_context_len=20, scale=1.0)
