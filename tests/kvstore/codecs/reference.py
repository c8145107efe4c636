"""KIVI one value at a time: slow, obvious, and byte for byte what the codec has to produce."""

from __future__ import annotations

import math
import struct

import numpy as np

from tandem.kvstore.codecs import LayerShape

f32 = np.float32
FORMATS = {"float16": "<f2", "float32": "<f4"}


def to_values(raw: bytes, dtype: str) -> list[np.float32]:
    if dtype == "bfloat16":
        return [f32(struct.unpack("<f", b"\0\0" + raw[i : i + 2])[0]) for i in range(0, len(raw), 2)]
    return [f32(value) for value in np.frombuffer(raw, FORMATS[dtype])]


def to_raw(values: list[np.float32], dtype: str) -> bytes:
    if dtype != "bfloat16":
        return np.array(values, FORMATS[dtype]).tobytes()
    out = b""
    for value in values:
        bits = struct.unpack("<I", struct.pack("<f", value))[0]
        out += struct.pack("<H", (bits + 0x8000 >> 16) & 0xFFFF)
    return out


def half(value: float) -> bytes:
    return struct.pack("<e", value)


def floor_to_half(value: float) -> float:
    """The largest number with fp16's 11 significant bits that is not above `value`; exponents are not limited."""
    mantissa, exponent = math.frexp(value)
    return math.ldexp(math.floor(mantissa * 2048), exponent - 11)


def quantise(group: list[np.float32], bits: int) -> tuple[list[int], bytes, bytes]:
    """Codes, scale and minimum of one group."""
    levels = f32(2**bits - 1)
    minimum = half(floor_to_half(max(float(min(group)), -65504.0)))
    low = f32(struct.unpack("<e", minimum)[0])
    wanted = (max(group) - low) * (f32(1 + 2**-10) / levels) + f32(2**-24)
    stored = half(float(np.float16(min(wanted, f32(65504)))))
    scale = f32(struct.unpack("<e", stored)[0])
    start, inverse = low - scale / f32(2), f32(1) / scale
    return [int(min(max((value - start) * inverse, f32(0)), levels)) for value in group], stored, minimum


def encode(raw: bytes, shape: LayerShape, bits: int) -> bytes:
    tokens, channels = shape.num_tokens, shape.channels
    values = to_values(raw, shape.dtype)
    keys = [values[t * channels : (t + 1) * channels] for t in range(tokens)]
    rows = [values[(tokens + t) * channels : (tokens + t + 1) * channels] for t in range(tokens)]
    padded = -(-channels // 32) * 32
    out = b""
    for start in range(0, tokens - 31, 32):
        k = [quantise([keys[start + t][c] for t in range(32)], bits) for c in range(channels)]
        out += pack([[k[c][0][t] for c in range(channels)] for t in range(32)], bits)
        v = []
        for t in range(32):
            row = rows[start + t] + [rows[start + t][-1]] * (padded - channels)
            v.append([quantise(row[c : c + 32], bits) for c in range(0, padded, 32)])
        out += pack([[code for group in row for code in group[0]] for row in v], bits)
        for which in (1, 2):
            out += b"".join(group[which] for group in k) + b"".join(group[which] for row in v for group in row)
    tail = tokens - tokens % 32
    for part in (keys, rows):
        out += b"".join(to_raw(row, shape.dtype) for row in part[tail:])
    return out


def pack(codes: list[list[int]], bits: int) -> bytes:
    """codes[token][channel] of 32 tokens."""
    per_byte = 8 // bits
    rows = 32 // per_byte
    packed = [[0] * len(codes[0]) for _ in range(rows)]
    for token, row in enumerate(codes):
        for channel, code in enumerate(row):
            packed[token % rows][channel] |= code << (bits * (token // rows))
    return b"".join(bytes(row) for row in packed)


def decode(encoded: bytes, shape: LayerShape, bits: int) -> bytes:
    tokens, channels = shape.num_tokens, shape.channels
    padded = -(-channels // 32) * 32
    keys: list[list[np.float32]] = []
    rows: list[list[np.float32]] = []
    at = 0

    def take(count: int) -> bytes:
        nonlocal at
        at += count
        return encoded[at - count : at]

    for _ in range(tokens // 32):
        k = unpack(take(4 * bits * channels), channels, bits)
        v = unpack(take(4 * bits * padded), padded, bits)
        k_scales, v_scales = halves(take(2 * channels)), halves(take(2 * padded))
        k_lows, v_lows = halves(take(2 * channels)), halves(take(2 * padded))
        keys += [[f32(k[t][c]) * k_scales[c] + k_lows[c] for c in range(channels)] for t in range(32)]
        for t in range(32):
            groups = [t * (padded // 32) + c // 32 for c in range(channels)]
            rows.append([f32(v[t][c]) * v_scales[g] + v_lows[g] for c, g in enumerate(groups)])
    tail = to_values(encoded[at:], shape.dtype)
    ends = [tail[: len(tail) // 2], tail[len(tail) // 2 :]]
    raw = b""
    for part, end in zip((keys, rows), ends, strict=True):
        raw += b"".join(to_raw(row, shape.dtype) for row in part) + to_raw(end, shape.dtype)
    return raw


def unpack(packed: bytes, channels: int, bits: int) -> list[list[int]]:
    rows = 4 * bits
    return [
        [packed[(t % rows) * channels + c] >> (bits * (t // rows)) & (2**bits - 1) for c in range(channels)]
        for t in range(32)
    ]


def halves(raw: bytes) -> list[np.float32]:
    return [f32(value) for (value,) in struct.iter_unpack("<e", raw)]
