"""How fast one replica is: the interface that router, simulator, planner and operator share.

Back-ends: `roofline.Roofline` (from a model's and a device's data), `measured.Table` (from measured points), and either
of them `Adjusted`. Seconds and tokens everywhere. No clock, no I/O.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol

from tandem.planner.objectives import Replica


class Chunk(NamedTuple):
    """Part of a prompt that a step computes."""

    tokens: float
    context: float = 0.0
    """Tokens before it whose KV is there."""
    last: bool = True
    """It ends the prompt, so that the step yields the first token."""


class Performance(Replica, Protocol):
    """One replica: all the devices that serve one copy of a model."""

    def step_s(self, chunks: Sequence[Chunk], batch: float, kv_tokens: float) -> float:
        """One step of the engine: chunks of prompts, beside one token for each of `batch` requests, which have
        `kv_tokens` of KV together; 0 for nothing."""

    @property
    def startup_s(self) -> float:
        """From the decision to have it until it serves, as far as is known beforehand."""


@dataclass(frozen=True, slots=True)
class Peak:
    """Four numbers that say what a replica can do at a context length."""

    concurrency: int
    """Requests of that context whose KV fits."""
    prefill_s: float
    """Seconds for a prompt as long as the context."""
    decode_s: float
    """Seconds for one token, with as many requests as fit."""
    switch_s: float
    """KV of the context from the device to the host's memory: what it takes to put a request aside."""


def peak(performance: Performance, context: int) -> Peak:
    """The four numbers at `context` tokens; a decode time of infinity where not one request fits."""
    fits = max_concurrency(performance, context)
    decode_s = performance.decode_step_s(fits, float(fits) * context) if fits else math.inf
    return Peak(fits, performance.prefill_s(context), decode_s, context_switch_s(performance, context))


def max_concurrency(performance: Performance, context: float) -> int:
    """Requests of `context` tokens whose KV fits into its memory."""
    return int(performance.kv_tokens / max(context, 1.0))


def context_switch_s(performance: Performance, tokens: float) -> float:
    """Seconds to move a request's KV out to the host's memory, or back."""
    return performance.transfer_s("host", tokens)


class Adjusted:
    """A replica that turned out to be slower or faster than its model says, by a factor for prompts and one for
    decoding."""

    __slots__ = ("_base", "_decode", "_prefill")

    def __init__(self, base: Performance, prefill: float = 1.0, decode: float = 1.0) -> None:
        """Factors of time, kept between 1/100 and 100; what is no number is 1."""
        self._base = base
        self._prefill = _bounded(prefill)
        self._decode = _bounded(decode)

    def step_s(self, chunks: Sequence[Chunk], batch: float, kv_tokens: float) -> float:
        """Decoding as if it were alone, and the chunks for what they add to it."""
        alone = self._base.decode_step_s(batch, kv_tokens)
        if not chunks:
            return self._decode * alone
        added = max(self._base.step_s(chunks, batch, kv_tokens) - alone, 0.0)
        return self._decode * alone + self._prefill * added

    def prefill_s(self, uncached_tokens: float, context_tokens: float = 0.0) -> float:
        return self._prefill * self._base.prefill_s(uncached_tokens, context_tokens)

    def decode_step_s(self, batch: float, kv_tokens: float) -> float:
        return self._decode * self._base.decode_step_s(batch, kv_tokens)

    def transfer_s(self, link: str, tokens: float) -> float:
        return self._base.transfer_s(link, tokens)

    @property
    def kv_tokens(self) -> float:
        return self._base.kv_tokens

    @property
    def startup_s(self) -> float:
        return self._base.startup_s


MAX_ADJUSTMENT = 100.0


def _bounded(factor: float) -> float:
    return min(max(factor, 1.0 / MAX_ADJUSTMENT), MAX_ADJUSTMENT) if 0.0 < factor < math.inf else 1.0
