"""Consistent hashing: fair shares, and nothing moves that need not."""

from __future__ import annotations

from collections import Counter

import pytest
from blake3 import blake3
from hypothesis import given, settings
from hypothesis import strategies as st

from tandem.kvstore.replication.ring import Ring

KEYS = [blake3(number.to_bytes(4, "big")).digest() for number in range(2_000)]
names = st.sets(st.text(min_size=1, max_size=12), min_size=1, max_size=12)


@settings(max_examples=40, deadline=None)
@given(nodes=names, n=st.integers(0, 14))
def test_owners_are_different_nodes_and_as_many_as_there_are(nodes: set[str], n: int) -> None:
    ring = Ring(nodes)
    for key in KEYS[:50]:
        owners = ring.owners(key, n)
        assert len(owners) == len(set(owners)) == min(n, len(nodes))
        assert set(owners) <= nodes
        assert owners == ring.owners(key, 14)[:n], "more copies: the same first ones"


@settings(max_examples=30, deadline=None)
@given(nodes=names, joining=st.text(min_size=13, max_size=20), copies=st.integers(1, 3))
def test_a_node_that_joins_only_takes_and_one_that_leaves_only_gives(
    nodes: set[str], joining: str, copies: int
) -> None:
    small, large = Ring(nodes), Ring({*nodes, joining})
    for key in KEYS[:200]:
        before, after = small.owners(key, copies), large.owners(key, copies)
        kept = [node for node in after if node != joining]
        assert tuple(kept) == before[: len(kept)], "the others keep their order"


@pytest.mark.parametrize("count", [2, 5, 16])
def test_shares_are_near_the_mean(count: int) -> None:
    ring = Ring(f"store-{number}" for number in range(count))
    shares = Counter(ring.owners(key, 1)[0] for key in KEYS)
    mean = len(KEYS) / count
    assert len(shares) == count
    assert 0.5 * mean < min(shares.values())
    assert max(shares.values()) < 1.6 * mean


def test_every_process_makes_the_same_ring() -> None:
    """Pinned: nodes of different versions have to agree."""
    ring = Ring(["c", "a", "b", "a"])
    assert ring.node_ids == ("a", "b", "c")
    assert Ring(["b", "c", "a"]).owners(KEYS[0], 3) == ring.owners(KEYS[0], 3)
    assert "".join(ring.owners(key, 1)[0] for key in KEYS[:24]) == "aaababaabcbaacaaabccabca"


def test_a_ring_without_nodes_has_no_owners() -> None:
    assert Ring([]).owners(KEYS[0], 3) == ()
