"""Embeddings: one vector for a prompt, made of the hidden states that the model ends with instead of logits."""

from __future__ import annotations

from collections.abc import Sequence as Seq
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from tandem.engine.request import Pooling

if TYPE_CHECKING:
    from tandem.engine.schedule.plan import Chunk


class Pooler:
    """Gathers the vector of one prompt, chunk by chunk."""

    def __init__(self, pooling: Pooling) -> None:
        """`pooling` is MEAN or LAST."""
        self.every_row = pooling is Pooling.MEAN
        """Whether it needs the row of each prompt token, and so none of them from a cache; else of the last one."""
        self._sum: np.typing.NDArray[np.float64] | None = None
        self._count = 0

    def add(self, rows: Tensor) -> None:
        """rows [n, hidden_size], the next ones: of tokens in order."""
        if not self.every_row:
            self.restart()
        numbers = rows.to("cpu", torch.float64).numpy()
        if self._sum is not None:
            numbers = np.concatenate((self._sum[None], numbers))
        # One after the other: how a prompt is cut into chunks does not change the sum.
        self._sum = np.add.accumulate(numbers, axis=0)[-1]
        self._count += len(rows)

    def restart(self) -> None:
        """Everything is computed again."""
        self._sum, self._count = None, 0

    def result(self) -> bytes:
        """float32, little-endian [hidden_size]. Raises ValueError before any row, and where a number is not finite."""
        if self._sum is None:
            raise ValueError("there is nothing to pool")
        mean = (self._sum / self._count).astype("<f4")
        if not np.isfinite(mean).all():
            raise ValueError("the model computed numbers that are not finite")
        return mean.tobytes()


def pool_rows(chunks: Seq[Chunk], hidden: Tensor) -> None:
    """Gives the poolers of a step their rows: `hidden` [rows, hidden_size], in the order of `chunks`."""
    row = 0
    for chunk in chunks:
        if chunk.sequence.pooler is not None and (count := pooled_rows(chunk)):
            chunk.sequence.pooler.add(hidden[row : row + count])
            row += count


def pooled_rows(chunk: Chunk) -> int:
    """How many of the last rows of `chunk` its pooler wants."""
    if chunk.sequence.pooler is None:
        return 0
    if chunk.sequence.pooler.every_row:
        return chunk.num_tokens
    return 1 if chunk.num_tokens == chunk.sequence.remaining else 0
