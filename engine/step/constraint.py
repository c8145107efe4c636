"""The masks of constraints as the sampler uses them, and for how long a step waits for one.

What computes them is in `masks/`, outside this process. A mask is asked for as soon as a token is chosen and comes
while the next step is computed. A row whose mask is not there when the step ends is taken out of it and computed again
once it is: it misses steps, and the others do not wait for it.
"""

from __future__ import annotations

from collections.abc import Sequence as Seq

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from tandem.engine.masks.guide import Guide

SHARE = 0.05
"""Share of the time of steps that may be spent on waiting for masks that are late, where others would be sampled."""
LONGEST_WAIT_S = 0.002
SHORTEST_WAIT_S = 0.001
"""What `poll` can wait for; shorter waits are saved up."""
MOST_OWED_S = 0.02
"""What a machine that stood still has taken is not saved up for minutes."""
ALONE_WAIT_S = 0.02
"""Where nobody else would be sampled."""

Bits = npt.NDArray[np.int32]


class Patience:
    """How long steps may wait for masks."""

    def __init__(self) -> None:
        self._saved_s = 0.0

    def of_step(self, step_s: float, alone: bool) -> float:
        """Seconds for a step that took `step_s` so far; `alone`: nobody is sampled but those whose mask is missing."""
        if alone:
            return ALONE_WAIT_S
        self._saved_s = min(self._saved_s + SHARE * step_s, LONGEST_WAIT_S)
        return self._saved_s if self._saved_s >= SHORTEST_WAIT_S else 0.0

    def spend(self, seconds: float) -> None:
        """Others waited so long; what is more than was saved will be saved up first."""
        self._saved_s = max(self._saved_s - seconds, -MOST_OWED_S)


class TokenMasks:
    """Masks for the rows of a step. Engine thread only."""

    def __init__(self, vocab_size: int, device: torch.device) -> None:
        self._vocab_size = vocab_size
        self._device = device

    def of(self, guides: Seq[Guide]) -> Bits:
        """int32 [len(guides), ceil(vocab_size / 32)]: bit t % 32 of word t // 32 says that token t may follow. All of
        them are ready."""
        rows = [np.frombuffer(guide.bits or b"", dtype=np.int32) for guide in guides]
        return np.stack(rows)

    def unpack(self, bits: Bits) -> Tensor:
        """bool [rows, vocab_size] on the device."""
        if self._device.type == "cpu":
            rows = np.unpackbits(bits.view(np.uint8), axis=1, count=self._vocab_size, bitorder="little")
            return torch.from_numpy(rows.view(np.bool_))
        packed = torch.from_numpy(bits.view(np.uint8)).to(self._device, non_blocking=True)
        return unpacked_bits(packed)[:, : self._vocab_size]


def unpacked_bits(packed: Tensor) -> Tensor:
    """bool [rows, 8 * bytes] of uint8 [rows, bytes], the lowest bit first."""
    places = torch.arange(8, dtype=torch.uint8, device=packed.device)
    return packed.unsqueeze(-1).bitwise_right_shift(places).bitwise_and_(1).view(len(packed), -1).bool()


def allows_only(row: Bits, tokens: frozenset[int]) -> bool:
    """Whether the mask [words] has no other token than `tokens`."""
    rest = row.copy().view(np.uint32)
    for token in tokens:
        rest[token // 32] &= ~np.uint32(1 << token % 32)
    return not rest.any()
