"""Passages have an identity of their own: wherever they stand, and never that of a prefix chunk."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from tandem.kvstore.identity import (
    Namespace,
    extend_chain,
    passage_hash,
    prefix_chain,
    request_namespace,
    tokens_digest,
)

ROOT, OTHER = Namespace(bytes(32)), Namespace(b"\x01" * 32)
TOKENS = st.lists(st.integers(0, 2**32 - 1), min_size=1, max_size=20)


def test_digests_never_change() -> None:
    """A change here makes every stored passage unreachable: raise the schema version instead."""
    assert passage_hash(ROOT, [1, 2, 3]).hex() == "9b5c3ed6a6f29c8c4d4268b922abc06a12e53d8cbdc23510cfbb37122c054bbd"
    assert tokens_digest([1, 2, 3]).hex() == "32dbbfc2c89c28c006e0ecb309f7d9b0d27b68ff0b38f6edc68bae8650e4fa4a"


@given(tokens=TOKENS)
def test_a_passage_is_never_taken_for_a_prefix_chunk(tokens: list[int]) -> None:
    passage = passage_hash(ROOT, tokens)
    assert len(passage) == 32
    assert passage != extend_chain(ROOT, tokens)
    assert passage not in prefix_chain(ROOT, tokens, 1)
    assert passage != tokens_digest(tokens)


@given(first=TOKENS, second=TOKENS)
def test_equal_hashes_mean_equal_tokens_and_namespace(first: list[int], second: list[int]) -> None:
    assert (passage_hash(ROOT, first) == passage_hash(ROOT, second)) == (first == second)
    assert (tokens_digest(first) == tokens_digest(second)) == (first == second)
    assert passage_hash(ROOT, first) != passage_hash(OTHER, first)
    assert passage_hash(request_namespace(ROOT, b"a"), first) != passage_hash(request_namespace(ROOT, b"b"), first)
