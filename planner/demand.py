"""How much traffic comes, from the routers' counters: rates, lengths, and a short forecast.

Counters are totals since a router's start; a smaller total than before means that it was started again. The forecast
is Holt's exponential smoothing with a damped trend (Gardner and McKenzie, 1985): it follows a ramp for as long as a
worker takes to start, and levels off. A rate far above what was forecast is a burst, which is believed at once.

Pure: time and counters are passed in. Nothing seen is a demand of zero; a router that says nothing makes the demand
stale, and what was known before is held.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from tandem.planner.lengths import Lengths
from tandem.planner.objectives import Demand

MAX_ROUTERS = 1024
_BURST_DEVIATIONS = 3.0
_MAX_BURSTINESS = 16.0


@dataclass(frozen=True, slots=True)
class LengthCounts:
    """A histogram as routers count it: requests by length, in buckets."""

    bounds: tuple[float, ...] = ()
    """Upper bounds of the buckets in tokens, rising; a last bucket without bound follows."""
    counts: tuple[float, ...] = ()
    """Requests in each bucket, one more than there are bounds."""
    tokens: float = 0.0
    """Sum of all lengths."""

    def since(self, before: LengthCounts) -> LengthCounts:
        """What came after `before`, a histogram with the same buckets."""
        counts = tuple(max(now - then, 0.0) for now, then in zip(self.counts, before.counts, strict=True))
        return LengthCounts(self.bounds, counts, max(self.tokens - before.tokens, 0.0))


@dataclass(frozen=True, slots=True)
class Traffic:
    """One router's totals since its start."""

    requests: float = 0.0
    cached_tokens: float = 0.0
    """Prompt tokens whose KV was found in a cache."""
    prompts: LengthCounts = field(default_factory=LengthCounts)
    outputs: LengthCounts = field(default_factory=LengthCounts)

    def since(self, before: Traffic) -> Traffic:
        """What came after `before`; all of it where the router was started again meanwhile."""
        if self.requests < before.requests or self.prompts.bounds != before.prompts.bounds:
            return self
        return Traffic(
            self.requests - before.requests,
            max(self.cached_tokens - before.cached_tokens, 0.0),
            self.prompts.since(before.prompts),
            self.outputs.since(before.outputs),
        )

    @property
    def sane(self) -> bool:
        """Whether every figure is a finite number that is not negative."""
        figures = (self.requests, self.cached_tokens, *self.prompts.counts, *self.outputs.counts)
        return all(0 <= figure < math.inf for figure in (*figures, self.prompts.tokens, self.outputs.tokens))


@dataclass(frozen=True, slots=True)
class DemandSettings:
    """How quickly the past is forgotten."""

    stale_after_s: float = 60.0
    """A router that is silent for longer is gone: its traffic comes through others."""
    level_gain: float = 0.3
    """Weight of the newest rate, in the level."""
    trend_gain: float = 0.1
    damping: float = 0.9
    """What is left of the trend from one interval to the next."""
    lengths_memory_s: float = 600.0
    """Time after which a length has lost two thirds of its weight."""


@dataclass(frozen=True, slots=True)
class Seen:
    """What the meter says."""

    demand: Demand
    rate: float
    """Requests per second in the newest interval."""
    stale: bool
    """Whether a router is missing, or nothing was ever seen: nothing should be taken away on the ground of this."""
    burst: bool
    missing: tuple[str, ...] = ()
    """The routers that did not answer."""


class DemandMeter:
    """Demand of all routers together. `observe` at every interval of some seconds, then ask for `demand`."""

    def __init__(self, settings: DemandSettings | None = None) -> None:
        self._settings = settings or DemandSettings()
        self._before: dict[str, tuple[float, Traffic]] = {}
        self._interval_s = 0.0
        self._rate = 0.0
        self._level = self._trend = self._deviation = 0.0
        self._intervals = 0
        self._dispersion = 1.0
        self._burst = False
        self._missing: tuple[str, ...] = ()
        self._prompts, self._outputs = _Histogram(), _Histogram()
        self._cached = self._prompt_tokens = 0.0

    def observe(self, now_s: float, routers: Mapping[str, Traffic | None]) -> None:
        """Takes in the totals of every router; None for one that did not answer or sent rubbish."""
        heard = {name: traffic for name, traffic in routers.items() if traffic is not None and traffic.sane}
        news: list[tuple[float, Traffic]] = []
        for name, traffic in heard.items():
            if name in self._before:
                then_s, before = self._before[name]
                if now_s > then_s:
                    news.append((now_s - then_s, traffic.since(before)))
            if name in self._before or len(self._before) < MAX_ROUTERS:
                self._before[name] = (now_s, traffic)
        patience = self._settings.stale_after_s
        self._before = {n: seen for n, seen in self._before.items() if n in heard or now_s - seen[0] <= patience}
        self._missing = tuple(sorted(name for name in self._before if name not in heard))
        if news and not self._missing:
            self._learn(news)

    def demand(self, horizon_s: float = 0.0) -> Seen:
        """The demand `horizon_s` seconds from now."""
        rate = max(self._forecast(horizon_s), self._rate if self._burst else 0.0)
        prompts, outputs = self._prompts.lengths(), self._outputs.lengths()
        if not (prompts.points and outputs.points):
            rate = 0.0
        cached = min(self._cached / self._prompt_tokens, 1.0) if self._prompt_tokens > 0 else 0.0
        demand = Demand(rate, prompts, outputs, cached, self._dispersion)
        return Seen(demand, self._rate, bool(self._missing) or not self._intervals, self._burst, self._missing)

    def _learn(self, news: Sequence[tuple[float, Traffic]]) -> None:
        rate = sum(traffic.requests / elapsed for elapsed, traffic in news)
        elapsed = max(elapsed for elapsed, _ in news)
        expected = self._forecast(elapsed)
        spread = max(math.sqrt(self._deviation), math.sqrt(max(expected, rate, 0.0) / elapsed), 1e-9)
        self._burst = self._intervals > 0 and rate > expected + _BURST_DEVIATIONS * spread
        self._smooth(rate, expected, elapsed)
        self._rate, self._interval_s = rate, elapsed
        kept = math.exp(-elapsed / self._settings.lengths_memory_s)
        for histogram, parts in (
            (self._prompts, [traffic.prompts for _, traffic in news]),
            (self._outputs, [traffic.outputs for _, traffic in news]),
        ):
            histogram.learn(kept, parts)
        self._cached = self._cached * kept + sum(traffic.cached_tokens for _, traffic in news)
        self._prompt_tokens = self._prompt_tokens * kept + sum(traffic.prompts.tokens for _, traffic in news)

    def _smooth(self, rate: float, expected: float, elapsed: float) -> None:
        settings = self._settings
        if not self._intervals:
            self._level = rate
        else:
            level = settings.level_gain * rate + (1 - settings.level_gain) * expected
            trend = (
                settings.trend_gain * (level - self._level) + (1 - settings.trend_gain) * settings.damping * self._trend
            )
            self._level, self._trend = level, trend
            missed = (rate - expected) ** 2
            self._deviation += settings.level_gain * (missed - self._deviation)
            if expected > 0 and not self._burst:
                dispersion = missed * elapsed / expected
                self._dispersion += 0.05 * (min(dispersion, _MAX_BURSTINESS) - self._dispersion)
                self._dispersion = min(max(self._dispersion, 1.0), _MAX_BURSTINESS)
        self._intervals += 1

    def _forecast(self, horizon_s: float) -> float:
        """Requests per second, `horizon_s` from the newest interval on."""
        if self._interval_s <= 0 or not math.isfinite(horizon_s):
            return max(self._level, 0.0)
        steps = max(horizon_s, 0.0) / self._interval_s
        damping = self._settings.damping
        reach = float(damping * (1 - damping**steps) / (1 - damping))
        return max(self._level + self._trend * reach, 0.0)


class _Histogram:
    """Lengths of late, older ones with less weight."""

    def __init__(self) -> None:
        self._bounds: tuple[float, ...] = ()
        self._counts: list[float] = []
        self._tokens = 0.0

    def learn(self, kept: float, news: Sequence[LengthCounts]) -> None:
        """Adds histograms, after all that is known was multiplied by `kept`."""
        self._tokens *= kept
        self._counts = [count * kept for count in self._counts]
        for part in news:
            if part.bounds != self._bounds:  # routers of another version: begin anew with the buckets of the newest
                self._bounds, self._counts, self._tokens = part.bounds, [0.0] * len(part.counts), 0.0
            self._counts = [mine + new for mine, new in zip(self._counts, part.counts, strict=True)]
            self._tokens += part.tokens

    def lengths(self) -> Lengths:
        """A point for each bucket, moved together so that the mean is what was counted."""
        if sum(self._counts) < 1e-9:
            return Lengths()
        edges = (0.0, *self._bounds)
        last = 2 * self._bounds[-1] if self._bounds else self._tokens / self._counts[0]
        middles = [(low + high) / 2 for low, high in zip(edges, (*self._bounds, last), strict=True)]
        guess = sum(count * middle for count, middle in zip(self._counts, middles, strict=True))
        scale = self._tokens / guess if guess > 0 and self._tokens > 0 else 1.0
        return Lengths.of((middle * scale, count) for count, middle in zip(self._counts, middles, strict=True))
