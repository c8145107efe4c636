"""Which workers serve a request. A pure policy: `fleet` facts in, a decision with its reason out.

Decode worker: among those not much busier than the least busy one, the one that holds most of the prompt's prefix.
Prefill worker: the one with the fewest prompt tokens ahead. None (the decode worker computes the prompt itself) where
a hand-over does not pay or is not possible.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass

from tandem.kvstore.identity import BlockHash
from tandem.router.settings import Disaggregate

HANDOVER_OVERHEAD_S = 0.010
"""What a hand-over adds to TTFT: one more queue, stream and wake-up. Prompts that compute faster stay local."""
ASSUMED_PREFILL_TOKENS_PER_S = 5000.0
"""Used until a worker has measured its own."""
SLACK_REQUESTS = 2
"""A prefix hit may cost this many requests more, or half as many again, than the least busy worker has."""


@dataclass(frozen=True, slots=True)
class DecodeCandidate:
    requests: int
    """Unfinished requests on it, those placed but not yet confirmed included."""
    prefix_tokens: int = 0
    """Leading prompt tokens that it was sent before: it has their KV, or will have it soon."""
    cached_tokens: int = 0
    """Those of them whose KV it is known to have had: a request with them was answered."""
    prefill_tokens_per_s: float = 0.0
    """Measured; 0 before any."""
    picks: int = 0
    """Requests ever placed there; the smaller wins a tie."""


@dataclass(frozen=True, slots=True)
class PrefillCandidate:
    prompt_tokens: int
    """Prompt tokens it has still to compute, those placed but not yet confirmed included."""
    picks: int = 0


@dataclass(frozen=True, slots=True)
class RequestFacts:
    prompt_tokens: int
    needs_prompt_logprobs: bool = False
    """They are made where the prompt is computed and would have to travel: such requests stay in one place."""


@dataclass(frozen=True, slots=True)
class Placement:
    decode: int
    """Index of the decode candidate."""
    prefill: int | None
    """Index of the prefill candidate; None: the decode worker computes the prompt."""
    reason: str
    """Why this prefill choice: `handover`, or the bypass reason. One of `REASONS`."""


REASONS = ("handover", "no_prefill_worker", "short_prompt", "prompt_logprobs", "switched_off")


def place(
    decodes: Sequence[DecodeCandidate],
    prefills: Sequence[PrefillCandidate],
    request: RequestFacts,
    disaggregate: Disaggregate = "auto",
) -> Placement:
    """Raises ValueError where there is no decode candidate."""
    if not decodes:
        raise ValueError("no decode candidate")
    chosen = _choose_decode(decodes)
    reason = _bypass_reason(decodes[chosen], prefills, request, disaggregate)
    if reason is not None:
        return Placement(chosen, None, reason)
    prefill = min(range(len(prefills)), key=lambda i: (prefills[i].prompt_tokens, prefills[i].picks))
    return Placement(chosen, prefill, "handover")


def _choose_decode(decodes: Sequence[DecodeCandidate]) -> int:
    least = min(candidate.requests for candidate in decodes)
    limit = least + max(SLACK_REQUESTS, least // 2)
    return min(
        (i for i, candidate in enumerate(decodes) if candidate.requests <= limit),
        key=lambda i: (-decodes[i].prefix_tokens, decodes[i].requests, decodes[i].picks),
    )


def _bypass_reason(
    decode: DecodeCandidate, prefills: Sequence[PrefillCandidate], request: RequestFacts, disaggregate: Disaggregate
) -> str | None:
    if disaggregate == "never":
        return "switched_off"
    if not prefills:
        return "no_prefill_worker"
    if request.needs_prompt_logprobs:
        return "prompt_logprobs"
    if disaggregate == "always":
        return None
    rate = decode.prefill_tokens_per_s or ASSUMED_PREFILL_TOKENS_PER_S
    uncached = max(0, request.prompt_tokens - decode.cached_tokens)
    return "short_prompt" if uncached / rate <= HANDOVER_OVERHEAD_S else None


@dataclass(frozen=True, slots=True)
class PrefixMatch:
    worker: tuple[str, int] | None = None
    """Id and epoch of the worker that was last sent the first block; None for a new prefix."""
    sent_blocks: int = 0
    """Leading blocks last sent to it."""
    computed_blocks: int = 0
    """Leading blocks of those whose request was answered."""


class PrefixAffinity:
    """Remembers which worker was last sent each prefix block: a guess at what its cache holds.

    Bounded: the least recently used blocks are forgotten. Workers are told apart by start, so a restarted one, whose
    cache is empty, matches nothing.
    """

    def __init__(self, max_blocks: int = 32768) -> None:
        self._max_blocks = max_blocks
        self._owner: OrderedDict[BlockHash, tuple[tuple[str, int], bool]] = OrderedDict()

    def __len__(self) -> int:
        return len(self._owner)

    def match(self, chain: Sequence[BlockHash]) -> PrefixMatch:
        worker: tuple[str, int] | None = None
        sent = computed = 0
        for block in chain:
            entry = self._owner.get(block)
            if entry is None or (worker is not None and entry[0] != worker):
                break
            worker = entry[0]
            if entry[1] and computed == sent:
                computed += 1
            sent += 1
        return PrefixMatch(worker, sent, computed)

    def sent(self, chain: Sequence[BlockHash], worker: tuple[str, int]) -> None:
        """A request with this prefix goes to `worker`."""
        new, known = (worker, False), (worker, True)
        for block in chain:
            if self._owner.get(block) != known:
                self._owner[block] = new
            self._owner.move_to_end(block)
        self._forget()

    def computed(self, chain: Sequence[BlockHash], worker: tuple[str, int]) -> None:
        """The worker has the KV of this prefix now."""
        known = (worker, True)
        for block in chain:
            self._owner[block] = known
            self._owner.move_to_end(block)
        self._forget()

    def _forget(self) -> None:
        while len(self._owner) > self._max_blocks:
            self._owner.popitem(last=False)
