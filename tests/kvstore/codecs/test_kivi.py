"""KIVI against a slow reference, its error bound, its sizes, and growing tails."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tandem.kvstore.codecs import CODECS, DTYPE_BYTES, KiviCodec, LayerShape
from tests.kvstore.codecs import reference

BITS = [8, 4, 2]
SHAPES = st.builds(
    LayerShape,
    num_tokens=st.integers(1, 70),
    num_kv_heads=st.integers(1, 2),
    head_dim=st.sampled_from([1, 7, 16, 32, 40]),
    dtype=st.sampled_from(sorted(DTYPE_BYTES)),
)


def kivi(bits: int) -> KiviCodec:
    codec = CODECS[f"kivi-int{bits}"]
    assert isinstance(codec, KiviCodec)
    return codec


def rows(shape: LayerShape, seed: int = 0, *, scale: float = 1.0, offset: float = 0.0) -> bytes:
    rng = np.random.default_rng(seed)
    channels = np.exp(rng.standard_normal(shape.channels))
    values = rng.standard_normal((2, shape.num_tokens, shape.channels)) * channels * scale + offset
    return from_floats(values.astype(np.float32), shape.dtype)


def from_floats(values: np.ndarray[tuple[int, ...], np.dtype[np.float32]], dtype: str) -> bytes:
    if dtype == "bfloat16":
        return (values.astype("<f4").view("<u4") >> 16).astype("<u2").tobytes()
    return values.astype(reference.FORMATS[dtype]).tobytes()


def encode(raw: bytes, shape: LayerShape, bits: int) -> memoryview:
    return kivi(bits).encode(memoryview(raw), shape)


def decode(encoded: memoryview, shape: LayerShape, bits: int) -> bytes:
    raw = kivi(bits).decode(encoded, shape)
    assert raw is not None
    return bytes(raw)


@settings(max_examples=20, deadline=None)
@given(
    shape=SHAPES,
    bits=st.sampled_from(BITS),
    seed=st.integers(0, 1000),
    scale=st.sampled_from([1.0, 1e-3, 1e-7, 0.0, 300.0]),
    offset=st.sampled_from([0.0, 5.0, -100.0]),
)
def test_the_slow_reference_gives_the_same_bytes(
    shape: LayerShape, bits: int, seed: int, scale: float, offset: float
) -> None:
    raw = rows(shape, seed, scale=scale, offset=offset)
    encoded = encode(raw, shape, bits)
    assert bytes(encoded) == reference.encode(raw, shape, bits)
    assert decode(encoded, shape, bits) == reference.decode(bytes(encoded), shape, bits)


@pytest.mark.parametrize(("bits", "ratio"), [(8, 64 / 36), (4, 64 / 20), (2, 64 / 12)])
def test_sizes_are_exact(bits: int, ratio: float) -> None:
    shape = LayerShape(256, 2, 64, "bfloat16")
    encoded = encode(rows(shape), shape, bits)
    assert kivi(bits).size_bounds(shape) == (encoded.nbytes, encoded.nbytes)
    assert shape.raw_bytes / encoded.nbytes == ratio
    tail = replace(shape, num_tokens=8)
    longer = replace(shape, num_tokens=264)
    assert encode(rows(longer), longer, bits).nbytes == encoded.nbytes + tail.raw_bytes


@settings(max_examples=40, deadline=None)
@given(
    shape=SHAPES.filter(lambda shape: shape.num_tokens >= 32),
    bits=st.sampled_from(BITS),
    seed=st.integers(0, 1000),
    scale=st.sampled_from([1.0, 1e-4, 200.0]),
    offset=st.sampled_from([0.0, 20.0, -3.0]),
)
def test_errors_are_at_most_half_a_step(shape: LayerShape, bits: int, seed: int, scale: float, offset: float) -> None:
    raw = rows(shape, seed, scale=min(scale, 10.0) if shape.dtype == "float16" else scale, offset=offset)
    decoded = decode(encode(raw, shape, bits), shape, bits)
    before, after = (
        np.array(reference.to_values(content, shape.dtype)).reshape(2, shape.num_tokens, shape.channels)
        for content in (raw, decoded)
    )
    for start in range(0, shape.num_tokens - 31, 32):
        block = slice(start, start + 32)
        for channel in range(shape.channels):
            check_group(before[0, block, channel], after[0, block, channel], bits, shape.dtype)
        for token in range(start, start + 32):
            for first in range(0, shape.channels, 32):
                group = slice(first, first + 32)
                check_group(before[1, token, group], after[1, token, group], bits, shape.dtype)


Values = np.ndarray[tuple[int, ...], np.dtype[np.float32]]


def check_group(before: Values, after: Values, bits: int, dtype: str) -> None:
    low, high = float(before.min()), float(before.max())
    # The minimum may lie one fp16 step lower, the scale one fp16 step higher than they would be in real numbers.
    span = high - low + abs(low) * 2**-10 + 2**-24
    step = span / (2**bits - 1) * (1 + 2**-9) + 2**-23
    rounding = {"bfloat16": 2**-8, "float16": 2**-10, "float32": 2**-21}[dtype]
    allowed = step / 2 + 2**-24 + np.abs(after) * rounding
    assert (np.abs(before - after) <= allowed).all()


@pytest.mark.parametrize("bits", BITS)
def test_constant_rows_come_back_exactly(bits: int) -> None:
    shape = LayerShape(32, 1, 32, "bfloat16")
    for value in (0.0, 1.0, -2.5):
        raw = from_floats(np.full((2, 32, 32), value, np.float32), shape.dtype)
        assert decode(encode(raw, shape, bits), shape, bits) == raw


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("bits", BITS)
def test_what_fp16_cannot_hold_saturates_and_spoils_only_its_group(bits: int) -> None:
    shape = LayerShape(32, 1, 64, "bfloat16")
    good = np.ones((2, 32, 64), np.float32)
    for wild in (np.inf, -np.inf, 3e38, -3e38, np.nan):
        values = good.copy()
        values[1, 3, 5] = wild
        raw = from_floats(values, shape.dtype)
        decoded = decode(encode(raw, shape, bits), shape, bits)
        after = np.array(reference.to_values(decoded, shape.dtype)).reshape(2, 32, 64)
        spoiled = np.zeros((2, 32, 64), bool)
        spoiled[1, 3, :32] = True
        assert (after[~spoiled] == 1).all()
        if np.isnan(wild):
            assert np.isnan(after[spoiled]).all()
        else:
            assert np.isfinite(after).all()
            with np.errstate(all="ignore"):
                assert encode(raw, shape, bits) == reference.encode(raw, shape, bits)
            assert np.sign(after[1, 3, 5]) == np.sign(wild)


def test_every_kind_of_nan_spoils_its_group() -> None:
    shape = LayerShape(32, 1, 32, "float32")
    for pattern in (0x7F800001, 0xFF800001, 0x7FC00000, 0xFFFFFFFF):
        values = np.ones((2, 32, 32), np.float32)
        values.view(np.uint32)[0, 4, 7] = pattern
        decoded = decode(encode(values.tobytes(), shape, 8), shape, 8)
        after = np.frombuffer(decoded, np.float32).reshape(2, 32, 32)
        assert np.isnan(after[0, :, 7]).all(), hex(pattern)
        assert (np.delete(after[0], 7, axis=1) == 1).all()
        assert (after[1] == 1).all()
