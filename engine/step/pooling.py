"""Embeddings: one vector for a prompt, made of the hidden states that the model ends with instead of logits."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from tandem.engine.request import Pooling
from tandem.engine.schedule.plan import Chunk


class Pooler:
    """Gathers the vector of one prompt, chunk by chunk."""

    def __init__(self, pooling: Pooling) -> None:
        """`pooling` is MEAN or LAST."""
        self._every_row = pooling is Pooling.MEAN
        self._sum: np.typing.NDArray[np.float64] | None = None
        self._count = 0

    def add(self, rows: Tensor) -> None:
        """rows [n, hidden_size], the next ones: of tokens in order."""
        if not self._every_row:
            self._sum, self._count = None, 0
        numbers = rows.to("cpu", torch.float64).numpy()
        if self._sum is not None:
            numbers = np.concatenate((self._sum[None], numbers))
        # One after the other: how a prompt is cut into chunks does not change the sum.
        self._sum = np.add.accumulate(numbers, axis=0)[-1]
        self._count += len(rows)

    def result(self) -> bytes:
        """float32, little-endian [hidden_size]. Raises ValueError before any row, and where a number is not finite."""
        if self._sum is None:
            raise ValueError("there is nothing to pool")
        mean = (self._sum / self._count).astype("<f4")
        if not np.isfinite(mean).all():
            raise ValueError("the model computed numbers that are not finite")
        return mean.tobytes()


def pooled_rows(chunk: Chunk) -> int:
    """How many of the last rows of `chunk` its request for an embedding wants; 0 where it is for none."""
    match chunk.sequence.request.pooling:
        case Pooling.MEAN:
            return chunk.num_tokens
        case Pooling.LAST:
            return 1 if chunk.num_tokens == chunk.sequence.remaining else 0
    return 0
