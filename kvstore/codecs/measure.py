"""What each codec costs on this machine: measured once, on rows that look like keys, in a few milliseconds each."""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import partial

import numpy as np

from tandem.kvstore.codecs import CODECS
from tandem.kvstore.codecs.interfaces import Fidelity, LayerShape
from tandem.kvstore.cost import RAW, CodecCost

_SHAPE = LayerShape(256, 8, 128, "bfloat16")
_ROUNDS = 3


def measure_codecs() -> dict[str, CodecCost]:
    """Cost of every codec but raw, by name. Takes a tenth of a second."""
    raw = memoryview(_rows(_SHAPE))
    costs: dict[str, CodecCost] = {}
    for name, codec in CODECS.items():
        if name == RAW:
            continue
        encoded = codec.encode(raw, _SHAPE)
        costs[name] = CodecCost(
            encode_bytes_per_s=raw.nbytes / _fastest(partial(codec.encode, raw, _SHAPE)),
            decode_bytes_per_s=raw.nbytes / _fastest(partial(codec.decode, encoded, _SHAPE)),
            ratio=raw.nbytes / encoded.nbytes,
            exact=codec.fidelity is Fidelity.EXACT,
        )
    return costs


def _rows(shape: LayerShape) -> bytes:
    """Each channel has an offset and a size of its own, as keys do."""
    random = np.random.default_rng(0)
    rows = 2 * shape.num_tokens
    values = random.standard_normal((rows, shape.channels)) * random.uniform(0.2, 2, shape.channels)
    values += random.standard_normal(shape.channels)
    bits = values.astype(np.float32).view(np.uint32)
    return (bits >> 16).astype(np.uint16).tobytes()


def _fastest(work: Callable[[], object]) -> float:
    times = []
    for _ in range(_ROUNDS):
        started = time.perf_counter()
        work()
        times.append(time.perf_counter() - started)
    return max(min(times), 1e-9)
