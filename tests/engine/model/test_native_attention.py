"""The native attention kernel: right against a slow reference, and the same bits for a row on every path.

What the processor lacks or `ATEN_CPU_CAPABILITY` forbids is not compiled; what older processors get is tried, too."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from tandem.engine.model import native_attention, native_build
from tandem.engine.model.attention import partial_attention, visible_keys
from tandem.engine.model.batch import ForwardBatch, KvPool, PrefillSlice
from tandem.engine.model.native import MACROS, SOURCE, NativeKernels, load_kernels, supports_attention
from tandem.engine.model.native_attention import NativeAttention

CPU = torch.device("cpu")
DTYPES = (torch.float32, torch.bfloat16)
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 2e-2}


@pytest.fixture(scope="module", autouse=True)
def compiler() -> None:
    if load_kernels(torch.float32) is None:
        pytest.skip("no C compiler")


def kernels(dtype: torch.dtype) -> NativeKernels:
    loaded = load_kernels(dtype)
    assert loaded is not None
    return loaded


@dataclass(frozen=True)
class Shape:
    dtype: torch.dtype
    kv_heads: int = 2
    group: int = 3
    dim: int = 64
    block: int = 16
    window: int | None = None


class Requests:
    """Random q, k and v of some requests, [tokens, heads, dim] each."""

    def __init__(self, shape: Shape, lengths: Sequence[int], seed: int = 0) -> None:
        self.shape = shape
        self.kernels = kernels(shape.dtype)
        generator = torch.Generator().manual_seed(seed)

        def some(heads: int, scale: float) -> list[Tensor]:
            sizes = [(length, heads, shape.dim) for length in lengths]
            return [(torch.randn(size, generator=generator) * scale).to(shape.dtype) for size in sizes]

        self.q = some(shape.kv_heads * shape.group, 2.0)
        self.k, self.v = some(shape.kv_heads, 1.0), some(shape.kv_heads, 1.0)

    def exact(self, request: int) -> Tensor:
        """float32 [tokens, heads * dim] by the reference."""
        positions = torch.arange(len(self.q[request]))
        visible = visible_keys(positions, positions, self.shape.window)
        return partial_attention(self.q[request], self.k[request], self.v[request], visible)[0].flatten(1)

    def attend(
        self, decodes: Sequence[tuple[int, int]], prefills: Sequence[tuple[int, int, int]], seed: int = 0
    ) -> list[Tensor]:
        """One step: `decodes` are (request, position), `prefills` (request, first position, tokens)."""
        return self.attend_at(
            decodes, [(request, range(first, first + count)) for request, first, count in prefills], seed
        )

    def attend_at(
        self, decodes: Sequence[tuple[int, int]], prefills: Sequence[tuple[int, Sequence[int]]], seed: int = 0
    ) -> list[Tensor]:
        """One step: `decodes` are (request, position), `prefills` (request, positions). The pool holds what such a step
        would find: keys of later positions are noise, as are all blocks that belong to nobody."""
        shape = self.shape
        ends = dict(decodes) | {request: place[-1] for request, place in prefills}
        need = {request: -(-(end + 1) // shape.block) for request, end in ends.items()}
        generator = torch.Generator().manual_seed(seed)
        pool = KvPool(1, sum(need.values()) + 3, shape.block, shape.kv_heads, shape.dim, shape.dtype, CPU)
        pool.storage.copy_(torch.randn(pool.storage.shape, generator=generator) * 1e30)
        pool.storage[:, :, 0] = torch.nan
        order = (torch.randperm(pool.num_blocks - 1, generator=generator) + 1).tolist()
        tables = {}
        for request, count in need.items():
            tables[request] = torch.tensor([order.pop() for _ in range(count)])
            place = torch.arange(ends[request] + 1)
            slots = tables[request][place // shape.block] * shape.block + place % shape.block
            pool.write(0, slots, self.k[request][: len(place)], self.v[request][: len(place)])
        rows = [self.q[request][position][None] for request, position in decodes]
        slices, row = [], len(decodes)
        positions = [position for _, position in decodes]
        for request, place in prefills:
            rows.append(self.q[request][list(place)])
            slices.append(PrefillSlice(row, len(place), place[-1] + 1, tables[request]))
            positions += place
            row += len(place)
        table = torch.zeros(len(decodes), max((need[request] for request, _ in decodes), default=0), dtype=torch.int64)
        for index, (request, _) in enumerate(decodes):
            table[index, : need[request]] = tables[request]
        lengths = torch.tensor([position + 1 for _, position in decodes], dtype=torch.int64)
        unused = torch.zeros(row, dtype=torch.int64)
        longest = max(lengths.tolist(), default=0)
        batch = ForwardBatch(
            unused, torch.tensor(positions), unused, len(decodes), table, lengths, longest, slices, unused
        )
        wider = torch.cat(rows)
        q = torch.cat((wider, wider[:, : shape.kv_heads]), dim=1)[:, : wider.shape[1]]  # rows of q lie apart
        out = NativeAttention((shape.window,), self.kernels).attend(0, q, batch, pool)
        return list(out.split([1] * len(decodes) + [len(place) for _, place in prefills]))


def assert_close(ours: Tensor, exact: Tensor, dtype: torch.dtype) -> None:
    assert ours.dtype == dtype
    torch.testing.assert_close(ours.float(), exact, rtol=0, atol=TOLERANCE[dtype])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("window", [None, 1, 70])
@pytest.mark.parametrize(
    ("kv_heads", "group", "dim", "block"),
    [(2, 3, 64, 16), (1, 1, 16, 16), (2, 4, 32, 48), (1, 7, 80, 16), (1, 2, 96, 32), (1, 2, 256, 128)],
)
def test_it_agrees_with_the_reference(
    kv_heads: int, group: int, dim: int, block: int, window: int | None, dtype: torch.dtype
) -> None:
    shape = Shape(dtype, kv_heads, group, dim, block, window)
    lengths = (1, 63, 64, 65, 200)
    requests = Requests(shape, lengths)
    everything = [(request, 0, length) for request, length in enumerate(lengths)]
    for request, ours in enumerate(requests.attend([], everything)):
        assert_close(ours, requests.exact(request), dtype)
    decoded = requests.attend([(request, length - 1) for request, length in enumerate(lengths)], [])
    for request, ours in enumerate(decoded):
        assert_close(ours, requests.exact(request)[-1:], dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("flags", [(), native_build._AVX2, native_build._AVX512], ids=["plain", "avx2", "avx512"])
def test_it_is_right_with_the_instructions_of_older_processors(
    flags: tuple[str, ...], dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not set(flags) <= set(native_build.instruction_flags()):
        pytest.skip("not on this processor")
    monkeypatch.setattr(native_build, "instruction_flags", lambda: flags)
    requests = Requests(Shape(dtype, dim=80, window=100), [150])
    native_build.compiled.cache_clear()
    path = native_build.compiled(SOURCE, *MACROS[dtype])
    native_build.compiled.cache_clear()
    assert path is not None
    requests.kernels = NativeKernels(path)
    (prompt,) = requests.attend([], [(0, 0, 150)])
    assert_close(prompt, requests.exact(0), dtype)
    for position in (0, 63, 64, 149):
        assert torch.equal(requests.attend([(0, position)], [], seed=position)[0], prompt[position : position + 1])


def test_more_query_heads_of_a_key_than_a_block_of_rows() -> None:
    requests = Requests(Shape(torch.float32, kv_heads=1, group=150, dim=16), [70])
    assert_close(requests.attend([], [(0, 0, 70)])[0], requests.exact(0), torch.float32)


def test_a_long_context() -> None:
    requests = Requests(Shape(torch.float32, kv_heads=1, group=2, dim=32), [5000])
    (ours,) = requests.attend([], [(0, 4900, 100)])
    assert_close(ours, requests.exact(0)[4900:], torch.float32)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_scores_far_apart_do_not_overflow(dtype: torch.dtype) -> None:
    requests = Requests(Shape(dtype), [150])
    requests.q[0] *= 40
    (ours,) = requests.attend([], [(0, 0, 150)])
    tolerance = 10 * TOLERANCE[dtype]
    torch.testing.assert_close(ours.float(), requests.exact(0), rtol=0, atol=tolerance)


@settings(deadline=None, max_examples=40)
@given(data=st.data())
def test_a_row_has_the_same_bits_on_every_path(data: st.DataObject) -> None:
    shape = Shape(
        data.draw(st.sampled_from(DTYPES)),
        data.draw(st.integers(1, 2)),
        data.draw(st.sampled_from([1, 2, 3, 7])),
        data.draw(st.sampled_from([16, 48, 64])),
        data.draw(st.sampled_from([16, 32, 48])),
        data.draw(st.sampled_from([None, 1, 17, 64, 100])),
    )
    lengths = data.draw(st.lists(st.integers(1, 260), min_size=1, max_size=3))
    requests = Requests(shape, lengths)
    whole = [requests.attend([], [(request, 0, length)])[0] for request, length in enumerate(lengths)]
    for step in range(3):
        decodes: list[tuple[int, int]] = []
        prefills: list[tuple[int, Sequence[int]]] = []
        for request, length in enumerate(lengths):
            first = data.draw(st.integers(0, length - 1))
            path = data.draw(st.sampled_from(["decoded", "a run", "scattered"]))
            if path == "decoded":
                decodes.append((request, first))
            elif path == "a run":
                prefills.append((request, range(first, data.draw(st.integers(first + 1, length)))))
            else:
                chosen = data.draw(st.sets(st.integers(0, length - 1), min_size=1))
                prefills.append((request, sorted(chosen)))
        parts = requests.attend_at(decodes, prefills, seed=step + 1)
        places = [(request, [first]) for request, first in decodes] + prefills
        for ours, (request, place) in zip(parts, places, strict=True):
            assert torch.equal(ours, whole[request][list(place)])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("part", ["q", "k", "v"])
@pytest.mark.parametrize("window", [None, 20])
def test_a_bad_value_reaches_only_rows_that_see_it(
    part: str, bad: float, dtype: torch.dtype, window: int | None
) -> None:
    requests = Requests(Shape(dtype, window=window), [200, 200])
    good = [requests.attend([], [(request, 0, 200)])[0] for request in (0, 1)]
    getattr(requests, part)[0][100, 1] = bad
    spoilt, beside = requests.attend([], [(0, 0, 200), (1, 0, 200)])
    assert torch.equal(beside, good[1])
    last = {"q": 101, "k": 200, "v": 200}[part] if window is None or part == "q" else 100 + window
    unaware = [*range(100), *range(last, 200)]
    assert torch.equal(spoilt[unaware], good[0][unaware])
    if part != "k" or bad != -torch.inf:
        assert not spoilt[100].isfinite().all()
    decoded = requests.attend([(0, 90), (1, 199)], [], seed=3)
    assert torch.equal(torch.cat(decoded), torch.stack((good[0][90], good[1][199])))
    seeing = requests.attend([(0, 110)], [], seed=3)[0]
    assert torch.equal(seeing.nan_to_num(7.0), spoilt[110:111].nan_to_num(7.0))


def test_threads_share_the_work_and_change_no_bit(monkeypatch: pytest.MonkeyPatch) -> None:
    requests = Requests(Shape(torch.bfloat16), [400, 90])
    alone = requests.attend([(1, 80)], [(0, 100, 300)])
    monkeypatch.setattr(native_attention, "_WORK_OF_A_THREAD", 1 << 14)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 3)
    for ours, expected in zip(requests.attend([(1, 80)], [(0, 100, 300)]), alone, strict=True):
        assert torch.equal(ours, expected)


def test_sizes_that_it_does_not_know_are_refused() -> None:
    assert supports_attention(torch.float32, CPU, 80)
    assert not supports_attention(torch.float32, CPU, 24)
    assert not supports_attention(torch.float32, CPU, 272)
    assert not supports_attention(torch.float16, CPU, 64)
    assert not supports_attention(torch.float32, torch.device("cuda"), 64)
