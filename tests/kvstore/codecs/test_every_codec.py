"""What holds for every codec: sizes as announced, exact where it says so, and no surprise from wrong bytes."""

from __future__ import annotations

import numpy as np
import pytest
import zstandard
from hypothesis import given, settings
from hypothesis import strategies as st

from tandem.kvstore.codecs import CODECS, DTYPE_BYTES, Fidelity, LayerShape, get_codec
from tests.kvstore.codecs.test_kivi import SHAPES, from_floats, rows

NAMES = st.sampled_from(sorted(CODECS))


@settings(max_examples=60, deadline=None)
@given(name=NAMES, shape=SHAPES, seed=st.integers(0, 100))
def test_sizes_are_within_the_announced_bounds(name: str, shape: LayerShape, seed: int) -> None:
    codec = CODECS[name]
    raw = memoryview(rows(shape, seed))
    encoded = codec.encode(raw, shape)
    least, most = codec.size_bounds(shape)
    assert least <= encoded.nbytes <= most
    assert least <= codec.estimate(shape) <= most
    decoded = codec.decode(encoded, shape)
    assert decoded is not None
    assert decoded.nbytes == shape.raw_bytes
    if codec.fidelity is Fidelity.EXACT:
        assert decoded == raw


@settings(max_examples=60, deadline=None)
@given(shape=SHAPES, data=st.data())
def test_exact_codecs_keep_every_bit_pattern(shape: LayerShape, data: st.DataObject) -> None:
    raw = memoryview(np.random.default_rng(data.draw(st.integers(0, 1000))).bytes(shape.raw_bytes))
    for name in ("raw", "lossless"):
        decoded = CODECS[name].decode(CODECS[name].encode(raw, shape), shape)
        assert decoded == raw


@settings(max_examples=100, deadline=None)
@given(name=NAMES, shape=SHAPES, content=st.binary(max_size=300), data=st.data())
@pytest.mark.filterwarnings("error")
def test_wrong_bytes_decode_to_nothing_or_to_rows(
    name: str, shape: LayerShape, content: bytes, data: st.DataObject
) -> None:
    codec = CODECS[name]
    least, most = codec.size_bounds(shape)
    fitting = data.draw(st.integers(least, most))
    for candidate in (content, np.random.default_rng(fitting).bytes(fitting)):
        decoded = codec.decode(memoryview(candidate), shape)
        assert decoded is None or decoded.nbytes == shape.raw_bytes
        if not least <= len(candidate) <= most:
            assert decoded is None


@pytest.mark.parametrize("name", CODECS)
def test_raw_rows_of_another_size_are_refused(name: str) -> None:
    with pytest.raises(ValueError, match="raw has 3 bytes"):
        CODECS[name].encode(memoryview(b"abc"), LayerShape(1, 1, 1, "bfloat16"))


def test_unknown_names_are_refused_with_the_known_ones() -> None:
    assert get_codec("raw") is CODECS["raw"]
    with pytest.raises(ValueError, match=r"'zip'; use one of raw, lossless, kivi-int8, kivi-int4, kivi-int2"):
        get_codec("zip")


@pytest.mark.parametrize("dtype", DTYPE_BYTES)
def test_lossless_against_one_word_at_a_time(dtype: str) -> None:
    """Rotate each word left by one bit; its highest byte goes to the compressed part, the others stay."""
    shape = LayerShape(40, 2, 64, dtype)
    raw, width = rows(shape), DTYPE_BYTES[dtype]
    rest, top = bytearray(), bytearray()
    for start in range(0, len(raw), width):
        word = int.from_bytes(raw[start : start + width], "little")
        rotated = (word << 1 | word >> (8 * width - 1)) % 2 ** (8 * width)
        *low, high = rotated.to_bytes(width, "little")
        rest += bytes(low)
        top.append(high)
    encoded = CODECS["lossless"].encode(memoryview(raw), shape)
    assert encoded[: len(rest)] == rest
    assert zstandard.decompress(encoded[len(rest) :]) == top


def test_lossless_makes_ordinary_rows_smaller_and_noise_no_larger() -> None:
    shape = LayerShape(256, 2, 64, "bfloat16")
    normal = np.random.default_rng(0).standard_normal((2, 256, 128)).astype(np.float32)
    assert CODECS["lossless"].encode(memoryview(from_floats(normal, "bfloat16")), shape).nbytes < shape.raw_bytes / 1.45
    noise = memoryview(np.random.default_rng(0).bytes(shape.raw_bytes))
    assert CODECS["lossless"].encode(noise, shape).nbytes == shape.raw_bytes
