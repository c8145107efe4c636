"""KIVI: K quantised per channel, V per token (Liu et al., 2024, arXiv:2402.02750).

K has channels of steady, very different size; V has not. So K shares a scale and a minimum among 32 tokens of one
channel, V among 32 channels of one token, both fp16: `value = min + code * scale`.

Encoded layer: for every 32 tokens a block `K codes | V codes | K scales | V scales | K minima | V minima`, then the raw
K and V rows of the last `num_tokens % 32` tokens. A byte holds codes of one channel and 8 / bits tokens: token t of a
block is in byte row t % (4 * bits), lowest bits first. V is padded to whole groups of 32 channels, by repeating its
last channel.

The minimum is rounded down and the scale up to fp16, so every value lies within half a scale of its code (and fp16's
smallest step, 6e-8). What even that cannot hold (below -65504, infinities) saturates. A group with a NaN becomes NaN.
"""

from __future__ import annotations

from dataclasses import replace
from itertools import accumulate

import numpy as np
from numpy.typing import NDArray

from tandem.kvstore.codecs.floats import buffer, from_float32, to_float32, words
from tandem.kvstore.codecs.interfaces import Fidelity, LayerShape, check_raw

GROUP = 32
_BATCH_VALUES = 1 << 17
"""Values of K, and as many of V, that are worked on at a time: few calls of numpy, and 1.5 MiB of float32 scratch at
most."""
_FP16_MAX = np.float32(65504)
_LEAST_STEP = np.float32(2**-24)
"""Distance of the smallest fp16 numbers: added to a scale, it is never rounded to 0."""
_ROUND_UP = np.float32(1 + 2**-10)
"""More than rounding to fp16 takes away."""

_Floats = NDArray[np.float32]
_Bytes = NDArray[np.uint8]


class KiviCodec:
    """`bits` per value, 8, 4 or 2, plus one fp16 scale and minimum per 32 values."""

    def __init__(self, bits: int, fidelity: Fidelity) -> None:
        self.name = f"kivi-int{bits}"
        self.fidelity = fidelity
        self._bits = bits
        self._levels = np.float32(2**bits - 1)

    def size_bounds(self, shape: LayerShape) -> tuple[int, int]:
        tail = replace(shape, num_tokens=shape.num_tokens % GROUP).raw_bytes
        size = shape.num_tokens // GROUP * _Block(self._bits, shape.channels).size + tail
        return size, size

    def estimate(self, shape: LayerShape) -> int:
        return self.size_bounds(shape)[0]

    def encode(self, raw: memoryview, shape: LayerShape) -> memoryview:
        """Blocks of codes, scales and minima, then the raw tail. Raises ValueError for another size than `shape`
        has."""
        check_raw(raw, shape)
        at = _Block(self._bits, shape.channels)
        rows = words(raw, shape.dtype).reshape(2, shape.num_tokens, shape.channels)
        encoded = np.empty(self.estimate(shape), np.uint8)
        groups = shape.num_tokens // GROUP
        full = rows[:, : groups * GROUP].reshape(2, groups, GROUP, shape.channels)
        blocks = encoded[: groups * at.size].reshape(groups, at.size)
        scratch = np.empty((3, min(at.batch, groups), GROUP, at.padded), np.float32)
        with np.errstate(invalid="ignore", over="ignore"):
            for start in range(0, groups, at.batch):
                now = slice(start, min(start + at.batch, groups))
                self._encode_blocks(full[:, now], blocks[now], scratch[:, : now.stop - now.start], at, shape.dtype)
        encoded[groups * at.size :] = np.ascontiguousarray(rows[:, groups * GROUP :]).view(np.uint8).ravel()
        return buffer(encoded)

    def decode(self, encoded: memoryview, shape: LayerShape) -> memoryview | None:
        """Raw rows, near what was encoded. None: `encoded` is not of that shape."""
        if encoded.nbytes != self.estimate(shape):
            return None
        at = _Block(self._bits, shape.channels)
        source = np.frombuffer(encoded, np.uint8)
        raw = np.empty(shape.raw_bytes, np.uint8)
        rows = words(buffer(raw), shape.dtype).reshape(2, shape.num_tokens, shape.channels)
        groups = shape.num_tokens // GROUP
        full = rows[:, : groups * GROUP].reshape(2, groups, GROUP, shape.channels)
        blocks = source[: groups * at.size].reshape(groups, at.size)
        scratch = np.empty((min(at.batch, groups), GROUP, at.padded), np.float32)
        with np.errstate(invalid="ignore", over="ignore"):
            for start in range(0, groups, at.batch):
                now = slice(start, min(start + at.batch, groups))
                self._decode_blocks(blocks[now], full[:, now], scratch[: now.stop - now.start], at, shape.dtype)
        tail = source[groups * at.size :].view(rows.dtype)
        rows[:, groups * GROUP :] = tail.reshape(2, -1, shape.channels)
        return buffer(raw)

    def _encode_blocks(
        self, rows: NDArray[np.generic], blocks: _Bytes, scratch: _Floats, at: _Block, dtype: str
    ) -> None:
        """`rows` is [K|V][block][token][channel]; `scratch` has room for three times as many values as K."""
        count, channels = len(blocks), at.channels
        keys, values = scratch[0, :, :, :channels], scratch[1]
        to_float32(rows[0], keys, dtype)
        to_float32(rows[1], values[..., :channels], dtype)
        values[..., channels:] = values[..., channels - 1 : channels]
        across = scratch[2].reshape(GROUP, -1)  # reducing the first axis is what numpy vectorises
        np.copyto(across, values.reshape(-1, GROUP).T)
        least, most = (
            np.concatenate((of(keys, axis=1), of(across, axis=0).reshape(count, -1)), axis=1) for of in (np.min, np.max)
        )
        scale, low = self._grid(least, most)
        blocks[:, at.scales] = scale.view(np.uint8)
        blocks[:, at.minima] = low.view(np.uint8)
        self._quantise(keys, values, scale.astype(np.float32), low.astype(np.float32))
        self._pack(keys, blocks[:, at.key_codes])
        self._pack(values, blocks[:, at.value_codes])

    def _decode_blocks(
        self, blocks: _Bytes, rows: NDArray[np.generic], scratch: _Floats, at: _Block, dtype: str
    ) -> None:
        channels = at.channels
        scale = blocks[:, at.scales].view(np.float16).astype(np.float32)
        low = blocks[:, at.minima].view(np.float16).astype(np.float32)
        keys = scratch[..., :channels]
        self._unpack(blocks[:, at.key_codes], keys)
        keys *= scale[:, None, :channels]
        keys += low[:, None, :channels]
        from_float32(keys, rows[0], dtype)
        self._unpack(blocks[:, at.value_codes], scratch)
        grouped = _by_group(scratch)
        grouped *= scale[:, channels:].reshape(_per_group(grouped))
        grouped += low[:, channels:].reshape(_per_group(grouped))
        from_float32(scratch[..., :channels], rows[1], dtype)

    def _grid(self, least: _Floats, most: _Floats) -> tuple[NDArray[np.float16], NDArray[np.float16]]:
        """Scale and minimum of every group."""
        bits = least.view(np.int32)
        down = (bits + ((bits >> 31) & 0x1FFF)) & ~0x1FFF  # fp16's mantissa, rounded away from zero if negative
        low = np.clip(down.view(np.float32), -_FP16_MAX, _FP16_MAX)
        low += np.float32(0)  # -0 becomes 0: which of them is the minimum differs between processors
        np.copyto(low, least, where=np.isnan(least))
        minimum = low.astype(np.float16)
        scale = most - minimum
        scale *= _ROUND_UP / self._levels
        scale += _LEAST_STEP
        return np.minimum(scale, _FP16_MAX).astype(np.float16), minimum

    def _quantise(self, keys: _Floats, values: _Floats, scale: _Floats, low: _Floats) -> None:
        """Changes values in place: they become code + 0.5 plus at most half a step, to be cut off to whole numbers."""
        channels = keys.shape[2]
        start, inverse = low - scale / 2, 1 / scale
        grouped = _by_group(values)
        keys -= start[:, None, :channels]
        keys *= inverse[:, None, :channels]
        grouped -= start[:, channels:].reshape(_per_group(grouped))
        grouped *= inverse[:, channels:].reshape(_per_group(grouped))
        if not (scale.max() < _FP16_MAX and low.min() > -_FP16_MAX):
            np.clip(keys, 0, self._levels, out=keys)
            np.clip(values, 0, self._levels, out=values)

    def _pack(self, values: _Floats, codes: _Bytes) -> None:
        rows = GROUP * self._bits // 8
        target = codes.reshape(len(values), rows, values.shape[2])
        np.copyto(target, values[:, :rows], casting="unsafe")
        for index in range(1, 8 // self._bits):
            part = values[:, index * rows : (index + 1) * rows].astype(np.uint8)
            np.left_shift(part, index * self._bits, out=part)
            np.bitwise_or(target, part, out=target)

    def _unpack(self, codes: _Bytes, values: _Floats) -> None:
        rows = GROUP * self._bits // 8
        source = codes.reshape(len(values), rows, values.shape[2])
        for index in range(8 // self._bits):
            part = source >> (index * self._bits) if index else source
            if (index + 1) * self._bits < 8:
                part = part & (2**self._bits - 1)
            np.copyto(values[:, index * rows : (index + 1) * rows], part)


class _Block:
    """Where what is in the block of 32 tokens."""

    def __init__(self, bits: int, channels: int) -> None:
        padded = -(-channels // GROUP) * GROUP
        lengths = (4 * bits * channels, 4 * bits * padded, 2 * (channels + padded), 2 * (channels + padded))
        edges = list(accumulate(lengths, initial=0))
        self.channels = channels
        self.padded = padded
        self.size = edges[-1]
        self.key_codes, self.value_codes, self.scales, self.minima = map(slice, edges[:-1], edges[1:])
        self.batch = max(1, _BATCH_VALUES // (GROUP * padded))


def _by_group(values: _Floats) -> _Floats:
    """[block][token][channel] as [block][token][group][channel of the group]."""
    return values.reshape(len(values), GROUP, -1, GROUP)


def _per_group(grouped: _Floats) -> tuple[int, ...]:
    """The shape of one number per group."""
    return (*grouped.shape[:3], 1)
