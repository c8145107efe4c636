"""KV identity: equal digests only for equal fields and tokens, the same in every process and every release."""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import fields, replace

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from tandem.kvstore.identity import (
    NO_ADAPTER,
    KvIdentity,
    Namespace,
    _encode,
    extend_chain,
    namespace,
    prefix_chain,
    request_namespace,
)

EXAMPLE = KvIdentity(
    weights_digest=bytes(32),
    tokenizer_digest=b"\x01" * 32,
    kv_dtype="bfloat16",
    layout="[K|V][token][kv_head][dim]",
    rope='{"theta":10000.0}',
    attention='{"kv_heads":2}',
    num_layers=4,
)
TOKENS = st.lists(st.integers(0, 2**32 - 1), max_size=40)
FIELD = st.one_of(st.binary(max_size=12), st.text(max_size=12), st.integers(-(2**63), 2**63 - 1))
IDENTITIES = st.builds(
    KvIdentity,
    st.binary(max_size=4),
    st.binary(max_size=4),
    st.text(max_size=4),
    st.text(max_size=4),
    st.text(max_size=4),
    st.text(max_size=4),
    st.integers(0, 2**31),
)

GOLDEN = """
import tandem.kvstore.identity as identity
example = identity.KvIdentity(bytes(32), bytes([1]) * 32, "bfloat16", "[K|V][token][kv_head][dim]",
                              '{"theta":10000.0}', '{"kv_heads":2}', 4)
root = identity.namespace(example)
print(root.hex())
print(identity.request_namespace(root, b"").hex())
print(identity.request_namespace(root, b"tenant").hex())
print(identity.request_namespace(root, b"tenant", bytes([2]) * 32).hex())
for block in identity.prefix_chain(root, range(40), 16):
    print(block.hex())
"""


def golden(hash_seed: str) -> list[str]:
    environment = {**os.environ, "PYTHONHASHSEED": hash_seed}
    return subprocess.run(
        [sys.executable, "-c", GOLDEN], env=environment, capture_output=True, text=True, check=True
    ).stdout.split()


def test_digests_never_change_silently():
    """Stored and shared KV is found by these bytes. A change needs a new SCHEMA_VERSION, not a new expectation."""
    root = namespace(EXAMPLE)
    chain = prefix_chain(root, range(40), 16)
    derived = [
        request_namespace(root, b""),
        request_namespace(root, b"tenant"),
        request_namespace(root, b"tenant", b"\x02" * 32),
    ]
    assert [digest.hex() for digest in (root, *derived, *chain)] == [
        "6192f776fe5bda5b9e67aeaf44ed01ef7d63a33cfa576f0c796a76549dceccad",
        "b23c121a23c625a400c9b004e9a224202106776677327520320cad52b4b5c187",
        "14d99eab3031cab7aae9bb9969cc9fec8b659db35bc19f5c90d0c84e66a7445b",
        "ceec2f502c995d334e592664ecefc8dfb0ba0acf2a0a35ffcb61aacbd29fce8b",
        "89894f2f5de4e78db1d2703acd850d14380572b551685ee4e9b7f2ccf3593749",
        "e102ba014d332d483f5d7c11fee6a7d7771627b96bfff416a81eb33bde198b15",
    ]


def test_digests_do_not_depend_on_the_process():
    first, second = golden("1"), golden("2")
    assert first == second
    assert first[0] == namespace(EXAMPLE).hex()


@settings(deadline=None)
@given(st.lists(FIELD, max_size=6), st.lists(FIELD, max_size=6))
def test_different_field_lists_never_share_an_encoding(left, right):
    same = left == right and [type(value) for value in left] == [type(value) for value in right]
    assert (_encode(left) == _encode(right)) == same


@settings(deadline=None)
@given(st.text(max_size=20), st.integers(0, 20))
def test_moving_text_between_neighbouring_fields_changes_the_namespace(text, cut):
    assume(cut < len(text))
    one = replace(EXAMPLE, kv_dtype=text[:cut], layout=text[cut:])
    other = replace(EXAMPLE, kv_dtype=text, layout="")
    assert namespace(one) != namespace(other)


@settings(deadline=None)
@given(IDENTITIES, IDENTITIES)
def test_namespaces_are_equal_only_for_equal_identities(left, right):
    assert (namespace(left) == namespace(right)) == (left == right)


@pytest.mark.parametrize("name", [item.name for item in fields(KvIdentity)])
def test_every_field_counts(name):
    value = getattr(EXAMPLE, name)
    other = {bytes: b"other", str: "other", int: 99}[type(value)]
    assert namespace(replace(EXAMPLE, **{name: other})) != namespace(EXAMPLE)


@settings(deadline=None)
@given(TOKENS, st.integers(1, 9))
def test_a_chain_has_one_hash_per_full_block(tokens, block_size):
    chain = prefix_chain(namespace(EXAMPLE), tokens, block_size)
    assert len(chain) == len(tokens) // block_size
    assert len(set(chain)) == len(chain)
    assert all(len(block) == 32 for block in chain)


@settings(deadline=None)
@given(TOKENS, st.integers(1, 9))
def test_a_chain_is_its_blocks_extended_one_by_one(tokens, block_size):
    parent: bytes = namespace(EXAMPLE)
    expected = []
    for start in range(0, len(tokens) // block_size * block_size, block_size):
        parent = extend_chain(parent, tokens[start : start + block_size])
        expected.append(parent)
    assert prefix_chain(namespace(EXAMPLE), tokens, block_size) == expected


@settings(deadline=None, max_examples=40)
@given(st.lists(st.integers(0, 3), max_size=12), st.sampled_from([1, 3, 16, 256, 511, 512, 513]), st.integers(0, 600))
def test_long_chains_are_their_blocks_too_where_their_beginnings_were_hashed_before(pieces, block_size, rest):
    """Prompts of these begin alike, and so find some of their segments remembered."""
    tokens = [token for piece in pieces for token in [piece] * 300] + [9] * rest
    parent: bytes = namespace(EXAMPLE)
    expected = []
    for start in range(0, len(tokens) // block_size * block_size, block_size):
        parent = extend_chain(parent, tokens[start : start + block_size])
        expected.append(parent)
    for _ in range(2):
        assert prefix_chain(namespace(EXAMPLE), tokens, block_size) == expected
    other = request_namespace(namespace(EXAMPLE), b"tenant")
    assert not set(prefix_chain(other, tokens, block_size)) & set(expected)


@settings(deadline=None)
@given(TOKENS, TOKENS, st.integers(1, 9))
def test_chains_share_exactly_the_blocks_of_the_common_prefix(left, right, block_size):
    root = namespace(EXAMPLE)
    a, b = prefix_chain(root, left, block_size), prefix_chain(root, right, block_size)
    for i, (one, other) in enumerate(zip(a, b, strict=False), 1):
        assert (one == other) == (left[: i * block_size] == right[: i * block_size])


@settings(deadline=None)
@given(TOKENS, st.integers(1, 9), st.data())
def test_one_changed_token_changes_its_block_and_all_after_it(tokens, block_size, data):
    assume(len(tokens) >= block_size)
    at = data.draw(st.integers(0, len(tokens) // block_size * block_size - 1))
    changed = [*tokens[:at], tokens[at] ^ 1, *tokens[at + 1 :]]
    root = namespace(EXAMPLE)
    before, after = prefix_chain(root, tokens, block_size), prefix_chain(root, changed, block_size)
    assert before[: at // block_size] == after[: at // block_size]
    assert not set(before[at // block_size :]) & set(after[at // block_size :])


@settings(deadline=None)
@given(st.binary(max_size=8), st.binary(max_size=8))
def test_adapters_never_share_a_root(left, right):
    root = namespace(EXAMPLE)
    one, other = request_namespace(root, b"tenant", left), request_namespace(root, b"tenant", right)
    assert (one == other) == (left == right)
    assert (request_namespace(root, left, right) == request_namespace(root, right, left)) == (left == right)
    assert request_namespace(root, b"tenant") == request_namespace(root, b"tenant", NO_ADAPTER)


@settings(deadline=None)
@given(st.binary(max_size=8), st.binary(max_size=8))
def test_tenants_never_share_a_root_or_a_block(left, right):
    root = namespace(EXAMPLE)
    one, other = request_namespace(root, left), request_namespace(root, right)
    assert (one == other) == (left == right)
    assert one != root, "an empty salt is a tenant of its own"
    assert (prefix_chain(one, range(4), 4) == prefix_chain(other, range(4), 4)) == (left == right)


@settings(deadline=None)
@given(st.binary(max_size=40))
def test_namespace_salt_and_chain_are_separate_domains(raw):
    root = Namespace(raw)
    tokens = [0] * 8
    assert len({request_namespace(root, b""), extend_chain(root, tokens), extend_chain(root, [])}) == 3


def test_tokens_outside_32_bits_are_an_error():
    for token in (-1, 2**32):
        with pytest.raises((OverflowError, ValueError)):
            prefix_chain(namespace(EXAMPLE), [token], 1)
