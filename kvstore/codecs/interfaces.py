"""What a codec promises. Pure functions of bytes; safe from any thread; most of the time is spent outside the GIL."""

from __future__ import annotations

import enum
from dataclasses import dataclass
from typing import Protocol

DTYPE_BYTES = {"bfloat16": 2, "float16": 2, "float32": 4}


class Fidelity(enum.IntEnum):
    """How close decoded rows are to the computed ones. Greater is worse, so `max` composes."""

    EXACT = 1
    """Bit for bit."""
    NEAR = 2
    """An error far below what changes an answer: 8-bit codes."""
    LOSSY = 3


@dataclass(frozen=True, slots=True)
class LayerShape:
    """Raw rows of one layer: `[K|V][token][kv_head][dim]` of `dtype`."""

    num_tokens: int
    num_kv_heads: int
    head_dim: int
    dtype: str
    """A key of DTYPE_BYTES."""

    @property
    def channels(self) -> int:
        return self.num_kv_heads * self.head_dim

    @property
    def raw_bytes(self) -> int:
        return 2 * self.num_tokens * self.channels * DTYPE_BYTES[self.dtype]


class Codec(Protocol):
    """A way to write the KV rows of one layer in fewer bytes."""

    @property
    def name(self) -> str: ...

    @property
    def fidelity(self) -> Fidelity: ...

    def size_bounds(self, shape: LayerShape) -> tuple[int, int]:
        """Least and most bytes that `encode` can return: a reader refuses other lengths before it allocates."""

    def estimate(self, shape: LayerShape) -> int:
        """Bytes to expect of ordinary KV."""

    def encode(self, raw: memoryview, shape: LayerShape) -> memoryview:
        """`raw` has `shape.raw_bytes`; ValueError otherwise. May return `raw` itself."""

    def decode(self, encoded: memoryview, shape: LayerShape) -> memoryview | None:
        """Raw rows. None: these bytes are not an encoding of that shape. May return `encoded` itself."""


def check_raw(raw: memoryview, shape: LayerShape) -> None:
    """Raises ValueError when `raw` has not the size of `shape`."""
    if raw.nbytes != shape.raw_bytes:
        raise ValueError(f"raw has {raw.nbytes} bytes; {shape} takes {shape.raw_bytes}")
