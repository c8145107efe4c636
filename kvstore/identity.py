"""KV identity: which cached KV may answer which tokens (DESIGN 5).

A namespace digests everything that shapes KV values. It is derived in steps, base -> adapter -> salt: workers announce
the base, which is their model's, and everybody derives from it what a request needs (`request_namespace`). A prefix
chain goes on from there: it digests the tokens before and in each block, so two equal hashes mean equal KV. All digests
are keyed BLAKE3, 32 bytes, over typed and length-prefixed fields: never Python's `hash()`, never plain concatenation.
"""

from __future__ import annotations

import struct
from array import array
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, fields
from functools import lru_cache
from typing import NewType, cast

import numpy as np
from blake3 import blake3

SCHEMA_VERSION = 2
"""1: first version. 2: the adapter is no field of the base any more, but comes between base and salt."""

Namespace = NewType("Namespace", bytes)
BlockHash = NewType("BlockHash", bytes)
PassageHash = NewType("PassageHash", bytes)

_NAMESPACE_KEY = blake3(b"tandem kv namespace v1").digest()
_PREFIX_KEY = blake3(b"tandem kv prefix chain v1").digest()
_PASSAGE_KEY = blake3(b"tandem kv passage v1").digest()
_TOKENS_KEY = blake3(b"tandem kv tokens v1").digest()
_ADAPTER_KEY = blake3(b"tandem kv adapter v1").digest()
_SALT_KEY = blake3(b"tandem kv tenant salt v1").digest()
NO_ADAPTER = b""
"""The digest of no adapter: the model's weights as they are."""
SALT_PURPOSE = "tenant salts"
"""What the key of `keyed_salt` is derived from the deployment's secret for."""
_SEGMENT_TOKENS = 512
_SEGMENTS = 8192
"""Remembered; with blocks of 16 tokens about 40 MB for 4M tokens."""


@dataclass(frozen=True, slots=True)
class KvIdentity:
    """The fields of a model's namespace: neither adapter nor salt."""

    weights_digest: bytes
    tokenizer_digest: bytes
    kv_dtype: str
    layout: str
    rope: str
    """Canonical JSON of the rope settings."""
    attention: str
    """Canonical JSON: head counts, head size, sliding window."""
    num_layers: int


def _encode(values: Iterable[bytes | str | int]) -> bytes:
    """Typed, length-prefixed: no two different field lists share an encoding."""
    out = bytearray()
    for value in values:
        if isinstance(value, bytes):
            tag, raw = b"b", value
        elif isinstance(value, str):
            tag, raw = b"s", value.encode()
        else:
            tag, raw = b"i", struct.pack("<q", value)
        out += tag + struct.pack("<I", len(raw)) + raw
    return bytes(out)


def namespace(identity: KvIdentity) -> Namespace:
    """The base: the namespace of a model."""
    values = [SCHEMA_VERSION, *(getattr(identity, item.name) for item in fields(identity))]
    return Namespace(blake3(_encode(values), key=_NAMESPACE_KEY).digest())


@lru_cache(maxsize=1024)
def keyed_salt(key: bytes, name: bytes) -> bytes:
    """The salt of whom `name` names. Who does not have the deployment's `key` (32 bytes) cannot compute it."""
    return blake3(name, key=key).digest()


@lru_cache(maxsize=1024)  # a router asks for the same few with every request
def request_namespace(base: Namespace, cache_salt: bytes, adapter_digest: bytes = NO_ADAPTER) -> Namespace:
    """The namespace of one tenant's requests: base -> adapter -> salt.

    `base` is the model's (`namespace`), `adapter_digest` the content digest of a LoRA adapter. An empty salt is a
    tenant of its own.
    """
    adapted = blake3(_encode([base, adapter_digest]), key=_ADAPTER_KEY).digest()
    return Namespace(blake3(_encode([adapted, cache_salt]), key=_SALT_KEY).digest())


def extend_chain(parent: bytes, tokens: Sequence[int]) -> BlockHash:
    """The hash of a block: h_i = H(h_{i-1}, tokens_i). `parent` is the request's namespace for the first block."""
    return BlockHash(blake3(parent + _token_bytes(tokens), key=_PREFIX_KEY).digest())


def prefix_chain(root: Namespace, tokens: Sequence[int], block_size: int) -> list[BlockHash]:
    """Hashes of the full blocks of `tokens`; an unfilled last block has none. Segments of `_SEGMENT_TOKENS` that were
    hashed before, after the same tokens, are remembered: prompts mostly begin like earlier ones."""
    raw = _token_bytes(tokens[: len(tokens) - len(tokens) % block_size])
    width = 4 * block_size
    step = _SEGMENT_TOKENS // block_size * width
    chain: list[BlockHash] = []
    parent: bytes = root
    start = 0
    while 0 < step <= len(raw) - start:
        chain += _segment(parent, raw[start : start + step], width)
        parent = chain[-1]
        start += step
    chain += _blocks(parent, raw[start:], width)
    return chain


@lru_cache(maxsize=_SEGMENTS)
def _segment(parent: bytes, raw: bytes, width: int) -> tuple[BlockHash, ...]:
    """Looked up by all of the bytes, so exact; `parent` stands for the tenant and all tokens before."""
    return tuple(_blocks(parent, raw, width))


def _blocks(parent: bytes, raw: bytes, width: int) -> list[BlockHash]:
    # One hasher for all blocks: making one, with its key, costs more than hashing a block.
    hasher = blake3(key=_PREFIX_KEY)
    update, digest, reset = hasher.update, hasher.digest, hasher.reset
    chain: list[bytes] = []
    for (block,) in struct.iter_unpack(f"{width}s", raw):
        update(parent + block)
        parent = digest()
        chain.append(parent)
        reset()
    return cast(list[BlockHash], chain)


def passage_hash(root: Namespace, tokens: Sequence[int]) -> PassageHash:
    """Identity of a passage wherever it stands. A key of its own keeps it out of the prefix chains, so KV computed
    without the tokens before it can never answer an exact look-up."""
    return PassageHash(blake3(_encode([root, "passage", _token_bytes(tokens)]), key=_PASSAGE_KEY).digest())


def tokens_digest(tokens: Sequence[int]) -> bytes:
    """32 bytes over the token ids alone: a second check that a stored object is of these tokens."""
    return blake3(_token_bytes(tokens), key=_TOKENS_KEY).digest()


def _token_bytes(tokens: Sequence[int]) -> bytes:
    """Little-endian, four bytes each. numpy alone takes three times as long for a list."""
    return np.asarray(array("I", tokens), dtype="<u4").tobytes()
