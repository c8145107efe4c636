"""Seconds that KV costs: to fetch, to compute again, to encode. Used by workers and nodes to choose the cheapest way.

Pure apart from what `LinkCosts` has learned: no clock, no I/O. Times that were measured are passed in.
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from tandem.kvstore.interfaces import Located, TierName

PIPELINE_DEPTH = 8
"""Reads of one fetch that are under way at once: each object after the first adds an eighth of the latency."""


@dataclass(frozen=True, slots=True)
class LinkCost:
    """Time of a fetch over one link: a latency and a time per byte."""

    latency_s: float
    seconds_per_byte: float

    def seconds(self, num_bytes: int, num_objects: int) -> float:
        if num_objects <= 0:
            return 0.0
        return self.latency_s * _latencies(num_objects) + self.seconds_per_byte * num_bytes


PRIORS: dict[str, LinkCost] = {
    TierName.DEVICE: LinkCost(1e-6, 1 / 20e9),
    TierName.HOST: LinkCost(1e-5, 1 / 5e9),
    TierName.DISK: LinkCost(0.2e-3, 1 / 1e9),
    TierName.PEER: LinkCost(0.5e-3, 1 / 1e9),
    TierName.REMOTE: LinkCost(1e-3, 1 / 0.3e9),
}
"""Costs by the part of a link's name before `:`, believed until there is data."""


def _latencies(num_objects: int) -> float:
    return 1.0 + (num_objects - 1) / PIPELINE_DEPTH


class _Fit:
    """Recency-weighted least squares for one link, in units of its prior.

    A measured time over the prior's time is `ratio = x * f + y * (1 - f)`: f is the share of latency in the prior's
    time, x and y say how many times slower latency and bytes are than the prior. Where all fetches look alike, x and y
    cannot be told apart; a small ridge then gives both the mean ratio.
    """

    DECAY = 0.95
    """Share of the weight of old data that each observation leaves: some 20 fetches are remembered."""
    DOUBT = 0.85
    """Share of the weight of old data that is left after each look-up that passes the link over: it is tried again
    after some 20, and one slow fetch in 20 look-ups costs little."""
    RIDGE = 0.005
    PRIOR_WEIGHT = 0.1
    CLIP = 3.0
    """One stalled fetch moves a settled estimate no more than a fetch that took 3 times as long as expected."""
    SETTLED_WEIGHT = 3.0

    def __init__(self, prior: LinkCost) -> None:
        self.prior = prior
        self.cost = prior
        self._weight = self._ratio = self._ff = self._fg = self._gg = self._fr = self._gr = 0.0

    def observe(self, num_bytes: int, num_objects: int, seconds: float) -> None:
        """Takes in a measured fetch: `num_bytes` and `num_objects` in all, `seconds` for them."""
        expected = self.prior.seconds(num_bytes, num_objects)
        ratio = seconds / expected
        if self._weight >= self.SETTLED_WEIGHT:
            settled = self.cost.seconds(num_bytes, num_objects) / expected
            ratio = min(max(ratio, settled / self.CLIP), settled * self.CLIP)
        f = self.prior.latency_s * _latencies(num_objects) / expected
        g = 1.0 - f
        self._decay(self.DECAY)
        self._weight += 1.0
        self._ratio += ratio
        self._ff += f * f
        self._fg += f * g
        self._gg += g * g
        self._fr += f * ratio
        self._gr += g * ratio
        self._solve()

    def doubt(self) -> None:
        self._decay(self.DOUBT)
        self._solve()

    def _decay(self, kept: float) -> None:
        for name in ("_weight", "_ratio", "_ff", "_fg", "_gg", "_fr", "_gr"):
            setattr(self, name, getattr(self, name) * kept)

    def _solve(self) -> None:
        mean = (self._ratio + self.PRIOR_WEIGHT) / (self._weight + self.PRIOR_WEIGHT)
        ff, gg = self._ff + self.RIDGE, self._gg + self.RIDGE
        fr, gr = self._fr + self.RIDGE * mean, self._gr + self.RIDGE * mean
        least = 0.01 * mean
        x = (fr * gg - gr * self._fg) / (ff * gg - self._fg * self._fg)
        x = max(x, least)
        y = (gr - self._fg * x) / gg
        if y < least:
            y = least
            x = max((fr - self._fg * y) / ff, least)
        self.cost = LinkCost(x * self.prior.latency_s, y * self.prior.seconds_per_byte)


class LinkCosts:
    """Learns latency and bandwidth per link (`host`, `disk`, `remote`, `peer:NODE_ID`) from measured fetches.

    Safe from any thread. Bounded: the link that was used longest ago is forgotten first.
    """

    MAX_LINKS = 1024

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._fits: OrderedDict[str, _Fit] = OrderedDict()

    def cost(self, link: str) -> LinkCost:
        with self._lock:
            fit = self._fits.get(link)
        return fit.cost if fit is not None else _prior(link)

    def estimate(self, link: str, num_bytes: int, num_objects: int = 1) -> float:
        """Seconds to fetch `num_objects` objects of `num_bytes` in all."""
        return self.cost(link).seconds(num_bytes, num_objects)

    def observe(self, link: str, num_bytes: int, num_objects: int, seconds: float) -> None:
        """A fetch of `num_objects` objects of `num_bytes` in all took `seconds`. Impossible figures are ignored."""
        if num_objects <= 0 or num_bytes < 0 or not 0.0 < seconds < float("inf"):
            return
        with self._lock:
            fit = self._fits.get(link)
            if fit is None:
                fit = self._fits[link] = _Fit(_prior(link))
            self._fits.move_to_end(link)
            fit.observe(num_bytes, num_objects, seconds)
            if len(self._fits) > self.MAX_LINKS:
                self._fits.popitem(last=False)

    def passed_over(self, link: str) -> None:
        """A fetch over `link` was judged too slow and not tried. What is known of it fades towards the prior, so that
        a link that was slow once is tried again soon."""
        with self._lock:
            fit = self._fits.get(link)
            if fit is not None:
                fit.doubt()


def _prior(link: str) -> LinkCost:
    return PRIORS.get(link.partition(":")[0], PRIORS[TierName.REMOTE])


@dataclass(frozen=True, slots=True)
class FetchPlan:
    """How many leading objects to fetch, and what that takes."""

    num_objects: int
    fetch_s: float
    recompute_s: float
    """Prefill of what is left after the fetch."""
    why: str


def choose_fetch(
    located: Sequence[Located],
    chunk_tokens: int,
    cached_tokens: int,
    prompt_tokens: int,
    prefill_tokens_per_s: float,
    links: LinkCosts,
) -> FetchPlan:
    """Splits a prompt into a part to fetch and a part to compute so that both together take least time.

    `located[0]` is the chunk that holds token `cached_tokens`, the first one that is not on the device. The last token
    of a prompt is always computed, since its logits are needed. Time over different links is added up: they do
    overlap, but share the processor that copies. A link that is passed over entirely is told so (`passed_over`).
    """
    first = cached_tokens // chunk_tokens * chunk_tokens
    to_compute = max(prompt_tokens - cached_tokens, 0)
    if prefill_tokens_per_s <= 0.0:
        useful = sum(1 for index in range(len(located)) if first + index * chunk_tokens < prompt_tokens - 1)
        fetch_s = sum(links.estimate(item.link, item.size) for item in located[:useful])
        return FetchPlan(useful, fetch_s, 0.0, "the prefill rate is not known yet")

    costs: dict[str, LinkCost] = {}
    loads: dict[str, tuple[int, int]] = {}
    best = FetchPlan(0, 0.0, to_compute / prefill_tokens_per_s, "computing is faster")
    fetch_s = 0.0
    for index, item in enumerate(located):
        if first + index * chunk_tokens >= prompt_tokens - 1:
            break
        if item.link not in costs:
            costs[item.link] = links.cost(item.link)
        cost = costs[item.link]
        size, count = loads.get(item.link, (0, 0))
        fetch_s += cost.seconds(size + item.size, count + 1) - cost.seconds(size, count)
        loads[item.link] = (size + item.size, count + 1)
        reached = min(first + (index + 1) * chunk_tokens, prompt_tokens - 1)
        recompute_s = (prompt_tokens - max(reached, cached_tokens)) / prefill_tokens_per_s
        if fetch_s + recompute_s < best.fetch_s + best.recompute_s:
            best = FetchPlan(index + 1, fetch_s, recompute_s, "")
    if not located:
        return FetchPlan(0, 0.0, best.recompute_s, "nothing is stored")
    for link in costs.keys() - {item.link for item in located[: best.num_objects]}:
        links.passed_over(link)
    if best.num_objects == 0:
        return best
    saved = to_compute / prefill_tokens_per_s - best.recompute_s
    why = f"{best.num_objects} of {len(located)} objects in {best.fetch_s:.4f} s save {saved:.4f} s of prefill"
    return FetchPlan(best.num_objects, best.fetch_s, best.recompute_s, why)


@dataclass(frozen=True, slots=True)
class CodecCost:
    """What a codec costs, in bytes of raw KV."""

    encode_bytes_per_s: float
    """`inf` for raw."""
    decode_bytes_per_s: float
    ratio: float
    """Raw bytes per encoded byte."""
    exact: bool
    """Whether decoding gives back the same bits."""


RAW = "raw"
FIRST_LAYERS = 0.2
"""Share of a raw transfer that nothing hides: the first layers, before computing can begin."""


def choose_codec(
    size: int,
    link: str,
    codecs: Mapping[str, CodecCost],
    near_allowed: bool,
    links: LinkCosts,
    stored: str = RAW,
    *,
    num_objects: int = 1,
    overlap_s: float = 0.0,
) -> str:
    """The codec in which objects of `size` raw bytes in all that are held as `stored` cross `link` in least time.

    Sending them as they are costs transfer and decoding; any other codec costs decoding and encoding before that. `raw`
    need not be listed. Ties go to what is stored. Returns "" if no codec is allowed: the objects were stored in one
    that is not exact, and `near_allowed` is False.

    Raw objects are read together, layer by layer, and up to `overlap_s` of their transfer hides behind computing with
    the first layers. Encoded ones come whole, one after the other: nothing is hidden, and each costs a latency.
    """
    table = {RAW: CodecCost(float("inf"), float("inf"), 1.0, True), **codecs}
    held = table.get(stored)
    if held is None or not (held.exact or near_allowed):
        return ""
    path = links.cost(link)

    def seconds(name: str) -> float:
        """Estimated seconds to have all objects here, raw, if they cross the link in the codec `name`."""
        codec = table[name]
        if name == RAW:
            whole = path.seconds(size, num_objects)
            sent = max(whole * FIRST_LAYERS, whole - overlap_s * (1 - FIRST_LAYERS))
        else:
            wire = path.seconds(round(size / codec.ratio / num_objects), 1)
            sent = num_objects * wire + size / codec.decode_bytes_per_s
        if name == stored:
            return sent
        return size / held.decode_bytes_per_s + size / codec.encode_bytes_per_s + sent

    allowed = [name for name, codec in table.items() if codec.exact or near_allowed]
    return min(allowed, key=lambda name: (seconds(name), name != stored, name))
