"""What a hand-over costs over each link, a pair of hosts: learned from those that arrived and from those that failed.

A link that was found slow is used no more, so nothing more is learned of it. What is believed of it therefore fades
towards the first guess, until a prompt is worth a try. That is one try: until its outcome is known the others go by
what was measured. Where the link is as slow as ever, the next try comes after twice the time.

No clock: the time is passed in.
"""

from __future__ import annotations

import math
from collections import OrderedDict, deque
from collections.abc import Sequence

Link = tuple[str, str]
"""Hosts of the sender and the receiver."""
Terms = tuple[float, float]
"""Seconds, and seconds per token."""

MAX_LINKS = 4096
"""Links that are remembered, the latest used."""
MIN_S, MAX_S = 1e-5, 600.0
"""No hand-over is believed to take less or more."""
HALF_LIFE_S = 60.0
"""After so long without a hand-over, half of what a link is slower than guessed is forgotten."""
MAX_HALF_LIFE_S = 3600.0
TRY_S = 30.0
"""The outcome of a try is waited for this long."""
SURPRISE = 3.0
"""So many times slower or faster than believed is either an accident or a link that has changed."""
_REMEMBERED, _DECAY = 32, 0.95
"""Hand-overs of a link, and the weight of each beside the one after it."""
_SETTLED = 4
"""From so many on a single surprise is taken for an accident."""
_RIDGE, _LATENCY_SHARE = 1e-3, 0.2


class Links:
    """Used from one thread."""

    def __init__(self, near: Terms, far: Terms) -> None:
        """First guesses: on one host, and between two."""
        self._near = near
        self._far = far
        self._links: OrderedDict[Link, _Learned] = OrderedDict()

    def seconds(self, link: Link, tokens: float, now: float) -> float:
        """Seconds by which the first tokens come later because the KV of `tokens` is moved over `link`."""
        learned = self._links.get(link)
        latency_s, per_token_s = self._guess(link) if learned is None else learned.terms(now)
        return latency_s + per_token_s * tokens

    def observe(self, link: Link, tokens: int, seconds: float, now: float) -> None:
        """A hand-over took `seconds`. Times that are not positive and finite are dropped."""
        if 0.0 < seconds < math.inf:
            self._learned(link).observe(tokens, seconds, now)

    def failed(self, link: Link, tokens: int, seconds: float, now: float) -> None:
        """A hand-over would have taken at least `seconds`, and was given up then."""
        learned = self._learned(link)
        self.observe(link, tokens, max(seconds, learned.measured_s(tokens)), now)

    def tried(self, link: Link, now: float) -> None:
        learned = self._links.get(link)
        if learned is not None:
            learned.tried(now)

    def _guess(self, link: Link) -> Terms:
        return self._near if link[0] == link[1] else self._far

    def _learned(self, link: Link) -> _Learned:
        learned = self._links.get(link)
        if learned is None:
            learned = self._links[link] = _Learned(self._guess(link))
            if len(self._links) > MAX_LINKS:
                self._links.popitem(last=False)
        self._links.move_to_end(link)
        return learned


class _Learned:
    """One link: the line `latency + tokens * rate` through its latest hand-overs, by relative errors, the last most.

    Where they are all of one size latency and rate cannot be told apart; a small ridge then takes `_LATENCY_SHARE` of
    the time for latency.
    """

    __slots__ = ("_guess", "_half_life_s", "_seen", "_since", "_surprise", "_terms", "_trying_until")

    def __init__(self, guess: Terms) -> None:
        self._guess = guess
        self._terms = guess
        self._seen: deque[tuple[int, float]] = deque(maxlen=_REMEMBERED)
        """Tokens and seconds."""
        self._since = -math.inf
        """When something was learned last."""
        self._half_life_s = HALF_LIFE_S
        self._trying_until = -math.inf
        self._surprise = 0
        """The last observation was far too long (1), far too short (-1), or as expected."""

    def terms(self, now: float) -> Terms:
        """What to go by: what was measured, or closer to the guess if that is quicker and the data is old."""
        latency_s, per_token_s = self._terms
        if now < self._trying_until:
            return self._terms
        forgotten = 1.0 - 0.5 ** (max(now - self._since, 0.0) / self._half_life_s)
        return (
            latency_s + min(self._guess[0] - latency_s, 0.0) * forgotten,
            per_token_s + min(self._guess[1] - per_token_s, 0.0) * forgotten,
        )

    def measured_s(self, tokens: int) -> float:
        return self._terms[0] + self._terms[1] * tokens

    def tried(self, now: float) -> None:
        """The first one after a pause is the try."""
        if now - self._since >= self._half_life_s and now >= self._trying_until:
            self._trying_until = now + TRY_S

    def observe(self, tokens: int, seconds: float, now: float) -> None:
        """Two surprises in a row, or one after a pause, say that the link has changed: only the last counts then. A
        single one is cut."""
        seconds = min(max(seconds, MIN_S), MAX_S)
        expected = self.measured_s(tokens)
        surprise = (seconds > expected * SURPRISE) - (seconds < expected / SURPRISE)
        after_pause = now - self._since >= self._half_life_s
        if surprise and (after_pause or surprise == self._surprise):
            self._seen.clear()
        elif surprise and len(self._seen) >= _SETTLED:
            seconds = min(max(seconds, expected / SURPRISE), expected * SURPRISE)
        self._seen.append((tokens, seconds))
        self._terms = _line(self._seen)
        if surprise < 0 or seconds < SURPRISE * (self._guess[0] + self._guess[1] * tokens):
            self._half_life_s = HALF_LIFE_S
        elif after_pause and self._since > -math.inf:
            self._half_life_s = min(2.0 * self._half_life_s, MAX_HALF_LIFE_S)
        self._surprise, self._since, self._trying_until = surprise, now, -math.inf


def _line(seen: Sequence[tuple[int, float]]) -> Terms:
    """Weighted least squares of `latency / seconds + rate * tokens / seconds = 1`; neither is negative."""
    mean_s = sum([seconds for _, seconds in seen]) / len(seen)
    mean_tokens = sum([tokens for tokens, _ in seen]) / len(seen)
    # In units of the mean hand-over, where latency and rate are shares of its time.
    xx, xy, yy = _RIDGE, 0.0, _RIDGE
    x, y = _RIDGE * _LATENCY_SHARE, _RIDGE * (1.0 - _LATENCY_SHARE)
    weight = 1.0
    for tokens, seconds in reversed(seen):
        a, b = mean_s / seconds, tokens / mean_tokens * mean_s / seconds
        xx, xy, yy = xx + weight * a * a, xy + weight * a * b, yy + weight * b * b
        x, y = x + weight * a, y + weight * b
        weight *= _DECAY
    determinant = xx * yy - xy * xy
    apart = determinant > 1e-9 * xx * yy
    latency = max((x * yy - y * xy) / determinant, 0.0) if apart else _LATENCY_SHARE * x / xx
    rate = max((y - latency * xy) / yy, 0.0)
    if rate == 0.0:
        latency = x / xx
    return latency * mean_s, rate * mean_s / mean_tokens
