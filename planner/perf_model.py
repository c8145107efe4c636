"""How long a worker takes: a roofline as a first guess, fitted to what is measured, within bounds.

One model per hardware class and model shape. Three linear laws, each of a few terms with a known first guess:

    prefill   = step + a * tokens + b * (query, key) pairs
    decode    = step + c * requests + d * tokens of KV read
    transfer  = latency + e * tokens            (a hand-over over each link, a fetch from each tier of the store)

No clock, no I/O: measured times are passed in.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

from tandem.planner.fit import Fit
from tandem.planner.hardware import Hardware, hardware
from tandem.planner.links import Link, Links

_TRANSFERS: Mapping[str, tuple[float, float]] = {
    "host": (1e-3, 5e9),
    "disk": (2e-3, 1e9),
    "peer": (3e-3, 1e9),
    "remote": (5e-3, 0.3e9),
}
"""First guesses: latency in seconds, bytes per second."""
_NEAR, _FAR = (5e-3, 10e9), (6e-3, 10e9)
"""The same for a hand-over on one host, and between two. Most of it hides behind the prefill."""


@dataclass(frozen=True, slots=True)
class ModelShape:
    """What the first guess needs to know of a model. Zeros mean unknown: a model of a billion parameters is assumed."""

    num_parameters: int = 0
    weight_bytes: int = 0
    kv_bytes_per_token: int = 0


class PerfModel:
    """First guesses from `hardware_class` and `shape`; every `observe_*` moves them. Impossible figures are ignored."""

    __slots__ = ("_decode", "_links", "_prefill", "_transfers")

    def __init__(self, hardware_class: str = "", shape: ModelShape | None = None) -> None:
        chip, shape = hardware(hardware_class), _filled(shape or ModelShape())
        self._prefill = Fit(_prefill_guess(chip, shape))
        self._decode = Fit(_decode_guess(chip, shape))
        self._transfers = {
            name: Fit((latency_s, shape.kv_bytes_per_token / rate)) for name, (latency_s, rate) in _TRANSFERS.items()
        }
        near, far = ((latency_s, shape.kv_bytes_per_token / rate) for latency_s, rate in (_NEAR, _FAR))
        self._links = Links(near, far)

    def prefill_s(self, uncached_tokens: float, context_tokens: float = 0.0) -> float:
        """Seconds to compute `uncached_tokens` that follow `context_tokens` whose KV is there; 0 where there are
        none."""
        if uncached_tokens <= 0:
            return 0.0
        step, per_token, per_pair = self._prefill.terms
        return step + uncached_tokens * (per_token + per_pair * (context_tokens + 0.5 * uncached_tokens))

    def stall_s(self, uncached_tokens: float, context_tokens: float = 0.0) -> float:
        """Seconds by which that prefill holds up requests that decode on the worker, without the step that they take
        anyway."""
        return max(self.prefill_s(uncached_tokens, context_tokens) - self._prefill.terms[0], 0.0)

    def decode_step_s(self, batch: float, kv_tokens: float) -> float:
        """One token for each of `batch` requests, which read `kv_tokens` of KV together; 0 for an empty batch."""
        if batch <= 0:
            return 0.0
        step, per_request, per_token = self._decode.terms
        return step + per_request * batch + per_token * kv_tokens

    def handover_s(self, tokens: float, link: Link = ("", ""), now: float = 0.0) -> float:
        """Seconds from the first token until the KV of `tokens` is complete on the decode worker: what compute did not
        hide. `link`: hosts of the prefill and the decode worker, equal ones being one."""
        return self._links.seconds(link, tokens, now)

    def fetch_s(self, tier: str, tokens: float) -> float:
        """KV of `tokens` from a tier of the store; infinite from a tier nobody has heard of."""
        fit = self._transfers.get(tier)
        if fit is None:
            return math.inf
        return fit.terms[0] + fit.terms[1] * tokens if tokens > 0 else 0.0

    def observe_prefill(self, uncached_tokens: int, context_tokens: int, seconds: float) -> None:
        if uncached_tokens > 0 and context_tokens >= 0:
            pairs = uncached_tokens * (context_tokens + 0.5 * uncached_tokens)
            self._prefill.observe((1.0, float(uncached_tokens), pairs), seconds)

    def observe_decode(self, batch: int, kv_tokens: int, step_s: float) -> None:
        if batch > 0 and kv_tokens >= 0:
            self._decode.observe((1.0, float(batch), float(kv_tokens)), step_s)

    def observe_handover(self, tokens: int, seconds: float, link: Link = ("", ""), now: float = 0.0) -> None:
        if tokens > 0:
            self._links.observe(link, tokens, seconds, now)

    def handover_failed(self, tokens: int, seconds: float, link: Link, now: float) -> None:
        """The link failed a hand-over after `seconds`: it would have taken at least as long."""
        if tokens > 0:
            self._links.failed(link, tokens, seconds, now)

    def handover_tried(self, link: Link, now: float) -> None:
        """A hand-over over `link` begins."""
        self._links.tried(link, now)

    def observe_fetch(self, tokens_by_tier: Mapping[str, int], seconds: float) -> None:
        """What is loaded at once may come from several tiers: each is taken to have been as slow as all of it, for what
        it is."""
        tiers = {tier: n for tier, n in tokens_by_tier.items() if n > 0 and tier in _TRANSFERS}
        expected = sum(self.fetch_s(tier, n) for tier, n in tiers.items())
        for tier, tokens in tiers.items():
            share = self.fetch_s(tier, tokens) / expected
            self._transfers[tier].observe((1.0, float(tokens)), seconds * share)


def _filled(shape: ModelShape) -> ModelShape:
    parameters = shape.num_parameters or (shape.weight_bytes // 2) or 10**9
    return ModelShape(parameters, shape.weight_bytes or 2 * parameters, shape.kv_bytes_per_token or 64 * 1024)


_QUERIES_PER_KV_HEAD = 4
"""Taken for granted: the worker does not say."""


def _prefill_guess(chip: Hardware, shape: ModelShape) -> tuple[float, ...]:
    rate = chip.flops * chip.compute_share
    bytes_per_value = max(1.0, shape.weight_bytes / shape.num_parameters)
    flops_per_pair = 2.0 * _QUERIES_PER_KV_HEAD * shape.kv_bytes_per_token / bytes_per_value
    step_s = chip.step_overhead_s + shape.weight_bytes / (chip.bytes_per_s * chip.memory_share)
    return step_s, 2.0 * shape.num_parameters / rate, flops_per_pair / rate


def _decode_guess(chip: Hardware, shape: ModelShape) -> tuple[float, ...]:
    bytes_per_s = chip.bytes_per_s * chip.memory_share
    per_request = 2.0 * shape.num_parameters / (chip.flops * chip.compute_share)
    return chip.step_overhead_s + shape.weight_bytes / bytes_per_s, per_request, shape.kv_bytes_per_token / bytes_per_s
