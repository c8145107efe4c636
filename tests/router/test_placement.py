"""The placement policy, as a pure function."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tandem.kvstore.identity import BlockHash
from tandem.router.placement import (
    REASONS,
    SLACK_REQUESTS,
    DecodeCandidate,
    PrefillCandidate,
    PrefixAffinity,
    PrefixMatch,
    RequestFacts,
    place,
)

counts = st.integers(0, 10000)
decodes = st.lists(
    st.builds(
        DecodeCandidate,
        requests=st.integers(0, 300),
        prefix_tokens=counts,
        cached_tokens=counts,
        prefill_tokens_per_s=st.floats(0, 1e6),
        picks=counts,
    ),
    min_size=1,
    max_size=6,
)
prefills = st.lists(st.builds(PrefillCandidate, prompt_tokens=counts, picks=counts), max_size=6)
requests = st.builds(RequestFacts, prompt_tokens=st.integers(1, 10000), needs_prompt_logprobs=st.booleans())
modes = st.sampled_from(["auto", "always", "never"])


@given(decodes, prefills, requests, modes)
def test_choice_is_valid_and_says_why(decodes, prefills, request, mode) -> None:  # type: ignore[no-untyped-def]
    placement = place(decodes, prefills, request, mode)
    assert 0 <= placement.decode < len(decodes)
    assert placement.reason in REASONS
    assert (placement.prefill is not None) == (placement.reason == "handover")
    if placement.prefill is not None:
        chosen = prefills[placement.prefill]
        assert chosen.prompt_tokens == min(candidate.prompt_tokens for candidate in prefills)
    if mode == "never" or not prefills or request.needs_prompt_logprobs:
        assert placement.prefill is None


@given(decodes, prefills, requests)
def test_a_prefix_never_overloads_a_worker(decodes, prefills, request) -> None:  # type: ignore[no-untyped-def]
    chosen = decodes[place(decodes, prefills, request).decode]
    least = min(candidate.requests for candidate in decodes)
    assert chosen.requests <= least + max(SLACK_REQUESTS, least // 2)
    alike = [c for c in decodes if c.requests <= chosen.requests]
    assert chosen.prefix_tokens == max(candidate.prefix_tokens for candidate in alike)


def test_in_flight_requests_count_and_ties_rotate() -> None:
    loads, picks = [0, 0, 0], [0, 0, 0]
    for _ in range(30):
        chosen = place([DecodeCandidate(loads[i], picks=picks[i]) for i in range(3)], [], RequestFacts(100)).decode
        loads[chosen] += 1
        picks[chosen] += 1
    assert loads == [10, 10, 10]


def test_short_uncached_part_stays_local() -> None:
    def reason(prompt: int, cached: int, rate: float) -> str:
        decode = DecodeCandidate(0, cached_tokens=cached, prefill_tokens_per_s=rate)
        return place([decode], [PrefillCandidate(0)], RequestFacts(prompt)).reason

    assert reason(20, 0, 10000) == "short_prompt"
    assert reason(2000, 0, 10000) == "handover"
    assert reason(2000, 1990, 10000) == "short_prompt"
    assert reason(2000, 0, 1e6) == "short_prompt"
    assert reason(20, 0, 0) == "short_prompt"
    assert reason(2000, 0, 0) == "handover"


def test_without_a_decode_worker_there_is_no_placement() -> None:
    with pytest.raises(ValueError, match="no decode"):
        place([], [], RequestFacts(1))


def chain(*names: str) -> list[BlockHash]:
    return [BlockHash(name.encode()) for name in names]


def test_affinity_counts_leading_blocks_of_one_worker() -> None:
    affinity = PrefixAffinity()
    affinity.sent(chain("a", "b"), ("w0", 1))
    affinity.sent(chain("a", "b", "c"), ("w1", 1))
    assert affinity.match(chain("a", "b", "c", "d")) == PrefixMatch(("w1", 1), 3, 0)
    affinity.sent(chain("a"), ("w0", 1))
    assert affinity.match(chain("a", "b")) == PrefixMatch(("w0", 1), 1, 0)
    assert affinity.match(chain("x")) == PrefixMatch()


def test_a_prefix_is_cached_only_once_it_was_computed() -> None:
    affinity = PrefixAffinity()
    affinity.sent(chain("a", "b"), ("w0", 1))
    assert affinity.match(chain("a", "b")).computed_blocks == 0
    affinity.computed(chain("a", "b"), ("w0", 1))
    affinity.sent(chain("a", "b", "c"), ("w0", 1))
    assert affinity.match(chain("a", "b", "c")) == PrefixMatch(("w0", 1), 3, 2)
    affinity.sent(chain("a", "b", "c"), ("w0", 2))
    assert affinity.match(chain("a", "b", "c")) == PrefixMatch(("w0", 2), 3, 0), "a restarted worker starts empty"


@given(st.lists(st.lists(st.sampled_from("abcdefgh"), max_size=5), max_size=20))
def test_affinity_is_bounded(chains: list[list[str]]) -> None:
    affinity = PrefixAffinity(max_blocks=4)
    for index, names in enumerate(chains):
        (affinity.computed if index % 2 else affinity.sent)(chain(*names), ("w", 1))
        assert len(affinity) <= 4
