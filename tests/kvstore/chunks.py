"""Real bundles of a tiny model, for tests that move whole objects about."""

from __future__ import annotations

import random

from tandem.kvstore.bundle import BundleWriter, ChunkSpec, bundle_size, parse
from tandem.kvstore.interfaces import Fetch, HomeNode, ObjectInfo, ObjectKey, Refusal

NUM_LAYERS = 3


def spec(number: int, *, owner: str = "default", head_dim: int = 16) -> ChunkSpec:
    return ChunkSpec(
        key=key(number),
        namespace=bytes(32),
        tokens=range(256),
        start_position=0,
        num_layers=NUM_LAYERS,
        num_kv_heads=2,
        head_dim=head_dim,
        dtype="bfloat16",
        owner=owner,
        model="tiny",
    )


def key(number: int) -> ObjectKey:
    return ObjectKey(random.Random(number).randbytes(32))


def rows(number: int, layer: int, length: int) -> bytes:
    return random.Random(1000 * number + layer).randbytes(length)


def info(number: int, *, owner: str = "default", head_dim: int = 16) -> ObjectInfo:
    size = bundle_size(spec(number, owner=owner, head_dim=head_dim))
    return ObjectInfo(size=size, num_tokens=256, owner=owner, model="tiny")


def put(home: HomeNode, number: int, *, owner: str = "default", head_dim: int = 16) -> bool:
    ticket = home.begin_put(key(number), info(number, owner=owner, head_dim=head_dim))
    if isinstance(ticket, Refusal):
        return False
    writer = BundleWriter(spec(number, owner=owner, head_dim=head_dim), ticket.buffer)
    for index in range(NUM_LAYERS):
        layer = writer.layer(index)
        layer[:] = rows(number, index, len(layer))
        del layer
    writer.finish()
    return ticket.commit()


def is_sound(fetch: Fetch, index: int, number: int) -> bool:
    """Object `index` of the fetch is chunk `number`, every byte."""
    bundle = parse(fetch.buffer(index))
    if bundle is None:
        return False
    layers = [bundle.layer(layer) for layer in range(NUM_LAYERS)]
    return all(layer is not None and bytes(layer) == rows(number, i, len(layer)) for i, layer in enumerate(layers))
