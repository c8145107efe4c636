"""bfloat16, float16 and float32 rows as numpy arrays. numpy has no bfloat16: such rows are uint16 words."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

_WORD_TYPES: dict[str, np.dtype[np.generic]] = {
    "bfloat16": np.dtype("<u2"),
    "float16": np.dtype("<f2"),
    "float32": np.dtype("<f4"),
}


def words(raw: memoryview, dtype: str) -> NDArray[np.generic]:
    """A view of `raw`, writable where that is: uint16 for bfloat16, else the numpy type of that name."""
    return np.frombuffer(raw, _WORD_TYPES[dtype])


def buffer(array: NDArray[np.generic]) -> memoryview:
    """The bytes of a contiguous array; no copy."""
    return array.data.cast("B")


def to_float32(rows: NDArray[np.generic], out: NDArray[np.float32], dtype: str) -> None:
    """Exact."""
    if dtype == "bfloat16":
        bits = out.view(np.uint32)
        np.copyto(bits, rows)
        np.left_shift(bits, 16, out=bits)
    else:
        np.copyto(out, rows)


def from_float32(values: NDArray[np.float32], out: NDArray[np.generic], dtype: str) -> None:
    """Rounds to the nearest; a tie in bfloat16 goes away from zero, which saves a pass. Spoils `values`."""
    if dtype == "bfloat16":
        bits = values.view(np.uint32)
        np.add(bits, 1 << 15, out=bits)
        np.right_shift(bits, 16, out=bits)
        np.copyto(out, bits, casting="unsafe")
    else:
        np.copyto(out, values, casting="same_kind")
