"""The replay behind `docs/eviction.md`, on a slice of its trace: pins the ceiling and who beats whom."""

from __future__ import annotations

from pathlib import Path

import pytest

from bench.eviction import BLOCK_TOKENS, POLICIES, Request, Result, curve, read_trace, replay, table
from tandem.kvstore.eviction import DEFAULT_POLICY
from tandem.kvstore.interfaces import ObjectKey

SLICE = Path(__file__).parent / "trace" / "first_requests.jsonl.gz"


@pytest.fixture(scope="module")
def requests() -> list[Request]:
    return read_trace(SLICE)


def test_the_ceiling_of_the_slice(requests: list[Request]) -> None:
    assert len(requests) == 1400
    ceiling = replay(requests, "lru", None)
    seen: set[ObjectKey] = set()
    hits = blocks = 0
    for request in requests:
        new = [key for key in request.blocks if key not in seen]
        hits += request.blocks.index(new[0]) if new else len(request.blocks)
        blocks += len(request.blocks)
        seen.update(request.blocks)
    assert ceiling.block_hits == hits / blocks
    assert ceiling.block_hits == pytest.approx(0.219, abs=0.001)


def test_the_default_beats_lru_by_a_twentieth_where_memory_is_scarce(requests: list[Request]) -> None:
    for capacity in (2000, 4000):
        lru, chosen = (replay(requests, name, capacity).block_hits for name in ("lru", DEFAULT_POLICY))
        assert chosen >= 1.05 * lru


@pytest.mark.parametrize("name", POLICIES)
def test_with_room_for_everything_every_policy_reaches_the_ceiling(requests: list[Request], name: str) -> None:
    part = requests[:300]
    distinct = len({key for request in part for key in request.blocks})
    ceiling = replay(part, "lru", None)
    limited = replay(part, name, distinct)
    assert (limited.block_hits, limited.token_hits) == (ceiling.block_hits, ceiling.token_hits)


def test_only_a_leading_run_counts() -> None:
    first, second, third = (ObjectKey(bytes([number]) * 32) for number in range(3))
    chain = Request(3 * BLOCK_TOKENS, (first, second, third))
    tail_only = Request(2 * BLOCK_TOKENS, (ObjectKey(b"x" * 32), second))
    assert replay([chain, tail_only], "lru", None).block_hits == 0.0
    assert replay([chain, chain], "lru", None).token_hits == 0.5


def test_the_table_and_the_curve_show_every_policy() -> None:
    results = [Result(name, capacity, 0.2, 0.2) for name in POLICIES for capacity in (10, 20)]
    ceiling = Result("lru", None, 0.6, 0.7)
    assert "| 20 | 20.0 | 20.0 (+0.0 %) |" in table(results, ceiling)
    drawing = curve(results, ceiling)
    assert drawing.count("<polyline") == len(POLICIES)
