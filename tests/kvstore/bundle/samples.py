"""A small bundle whose bytes are the same everywhere, and the golden files made of it.

`python -m tests.kvstore.bundle.samples` writes the golden files anew: only with a new format version.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np

from tandem.kvstore.bundle import BundleWriter, ChunkSpec, bundle_size, transcode
from tandem.kvstore.codecs import CODECS

GOLDEN = Path(__file__).parent / "golden"
SPEC = ChunkSpec(
    key=bytes(range(32)),
    namespace=bytes(range(100, 132)),
    tokens=[7 * index % 1000 for index in range(33)],
    start_position=256,
    num_layers=2,
    num_kv_heads=1,
    head_dim=32,
    dtype="bfloat16",
    owner="tenant-ä",
    model="small",
    provenance="prefill-0",
)


def sample_rows(spec: ChunkSpec, layer: int) -> bytes:
    """Exact multiples of 1/256 between -2 and 2, different in every layer."""
    count = spec.layer_shape.raw_bytes // (4 if spec.dtype == "float32" else 2)
    values = ((np.arange(count) + 7919 * layer) * 2654435761 % 1024 - 512).astype(np.float32) / 256
    if spec.dtype == "bfloat16":
        return (values.view(np.uint32) >> 16).astype("<u2").tobytes()
    return values.astype({"float16": "<f2", "float32": "<f4"}[spec.dtype]).tobytes()


def build(spec: ChunkSpec = SPEC, memory: bytearray | None = None) -> bytearray:
    """A raw bundle of `spec`, in `memory` where that is given."""
    out = bytearray(bundle_size(spec)) if memory is None else memory
    writer = BundleWriter(spec, memoryview(out))
    for layer in range(spec.num_layers):
        writer.layer(layer)[:] = sample_rows(spec, layer)
    writer.finish()
    return out


if __name__ == "__main__":
    for codec in CODECS:
        content = transcode(memoryview(build()), codec)
        assert content is not None
        (GOLDEN / f"{codec}.bin").write_bytes(content)
