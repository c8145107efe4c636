"""Codecs of the KV store: MB/s of raw rows and how much smaller they get, on one core.

    python bench/codecs.py [--rounds 7] [--json FILE]

Prints a table on stderr and JSON on stdout.

Two kinds of bfloat16 rows. `normal`: independent standard normal values, the worst case for every codec. `smooth`: each
channel has its own size and offset and drifts slowly from token to token, as K does before rotation. Peers: `memcpy`
(the bound), `zstd-1` (a general compressor on the raw bytes) and `xxh3` (the checksum that every layer pays anyway).
Rounds are interleaved; figures are medians of CPU time of the calling thread, so that neighbours on a shared machine
disturb them little; `spread` is the slowest against the fastest round.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import xxhash
import zstandard

from tandem.kvstore.codecs import CODECS, LayerShape

SHAPES = {
    "small model (2 x 64), 128 KiB": LayerShape(256, 2, 64, "bfloat16"),
    "8B model (8 x 128), 1 MiB": LayerShape(256, 8, 128, "bfloat16"),
}
BYTES_PER_ROUND = 8 << 20


@dataclass(frozen=True, slots=True)
class Contender:
    """`encode` and `decode` take and return bytes-like objects."""

    name: str
    encode: Callable[[memoryview], memoryview | bytes]
    decode: Callable[[memoryview], object] | None
    """None: there is nothing to decode."""


@dataclass(frozen=True, slots=True)
class Row:
    shape: str
    data: str
    name: str
    ratio: float
    """Raw bytes to encoded bytes."""
    encode_mb_s: float
    decode_mb_s: float | None
    spread: float
    """Slowest to fastest round, the worse of both directions."""
    max_error: float | None
    """Largest difference to a raw value; None for peers."""


def rows(kind: str, shape: LayerShape) -> memoryview:
    rng = np.random.default_rng(0)
    size = (2, shape.num_tokens, shape.channels)
    values = rng.standard_normal(size)
    if kind == "smooth":
        drift = np.cumsum(rng.standard_normal(size), axis=1) / np.sqrt(shape.num_tokens)
        values = np.exp(rng.standard_normal(shape.channels)) * (drift + rng.standard_normal(shape.channels) * 3)
    return memoryview((values.astype("<f4").view("<u4") >> 16).astype("<u2").tobytes())


def floats(raw: memoryview) -> np.ndarray[tuple[int, ...], np.dtype[np.float32]]:
    return (np.frombuffer(raw, "<u2").astype("<u4") << 16).view("<f4")


def contenders(shape: LayerShape) -> list[Contender]:
    target = bytearray(shape.raw_bytes)

    def memcpy(raw: memoryview) -> memoryview:
        target[:] = raw
        return memoryview(target)

    def xxh3(raw: memoryview) -> memoryview:
        xxhash.xxh3_64_intdigest(raw)
        return raw

    peers = [
        Contender("memcpy", memcpy, memcpy),
        Contender("xxh3", xxh3, None),
        Contender("zstd-1", zstandard.ZstdCompressor(level=1).compress, zstandard.ZstdDecompressor().decompress),
    ]
    ours = [
        Contender(
            name, lambda raw, codec=codec: codec.encode(raw, shape), lambda raw, codec=codec: codec.decode(raw, shape)
        )
        for name, codec in CODECS.items()
        if name != "raw"  # no work at all: the rows are the encoding
    ]
    return peers + ours


def cpu_seconds(call: Callable[[], object], times: int) -> float:
    start = time.thread_time()
    for _ in range(times):
        call()
    return (time.thread_time() - start) / times


def measure(label: str, shape: LayerShape, kind: str, rounds: int) -> list[Row]:
    raw = rows(kind, shape)
    times = max(1, BYTES_PER_ROUND // shape.raw_bytes)
    racing = contenders(shape)
    encoded = {one.name: memoryview(one.encode(raw)) for one in racing}
    spent: dict[tuple[str, str], list[float]] = {}
    for _ in range(rounds):
        for one in racing:
            spent.setdefault((one.name, "encode"), []).append(cpu_seconds(lambda one=one: one.encode(raw), times))
            if one.decode is not None:
                call = lambda one=one: one.decode(encoded[one.name])  # noqa: E731
                spent.setdefault((one.name, "decode"), []).append(cpu_seconds(call, times))
    result: list[Row] = []
    for one in racing:
        both = [spent[one.name, way] for way in ("encode", "decode") if (one.name, way) in spent]
        speeds = [shape.raw_bytes / statistics.median(seconds) / 1e6 for seconds in both]
        error = None
        if one.name in CODECS and one.decode is not None:
            decoded = one.decode(encoded[one.name])
            assert isinstance(decoded, memoryview)
            error = float(np.abs(floats(decoded) - floats(raw)).max())
        result.append(
            Row(
                label,
                kind,
                one.name,
                round(shape.raw_bytes / encoded[one.name].nbytes, 3),
                round(speeds[0]),
                round(speeds[1]) if len(speeds) > 1 else None,
                round(max(max(seconds) / min(seconds) for seconds in both), 2),
                error,
            )
        )
    return result


def table(measured: list[Row]) -> str:
    lines: list[str] = []
    for row in measured:
        heading = f"\n{row.shape}, {row.data}"
        if heading not in lines:
            lines += [
                heading,
                f"{'codec':<12}{'ratio':>8}{'encode MB/s':>13}{'decode MB/s':>13}{'spread':>8}{'max error':>11}",
            ]
        decode = "-" if row.decode_mb_s is None else f"{row.decode_mb_s:.0f}"
        error = "-" if row.max_error is None else f"{row.max_error:.4f}"
        lines.append(
            f"{row.name:<12}{row.ratio:>8.2f}{row.encode_mb_s:>13.0f}{decode:>13}{row.spread:>8.2f}{error:>11}"
        )
    return "\n".join(lines)


def processor() -> str:
    for line in Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []:
        if line.startswith("model name"):
            return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()


def main() -> None:
    parser = argparse.ArgumentParser(description="KV codecs: speed and size")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--json", type=Path, help="write the JSON here instead of to stdout")
    options = parser.parse_args()
    measured = [
        row
        for label, shape in SHAPES.items()
        for kind in ("normal", "smooth")
        for row in measure(label, shape, kind, options.rounds)
    ]
    report = {
        "machine": {"processor": processor(), "cores": os.cpu_count(), "python": platform.python_version()},
        "numpy": np.__version__,
        "zstd": ".".join(map(str, zstandard.ZSTD_VERSION)),
        "rounds": options.rounds,
        "rows": [asdict(row) for row in measured],
    }
    print(table(measured), file=sys.stderr)
    text = json.dumps(report, indent=1)
    if options.json:
        options.json.write_text(text + "\n")
    else:
        print(text)


if __name__ == "__main__":
    main()
