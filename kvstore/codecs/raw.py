"""The bytes as they are: no time, no copy."""

from __future__ import annotations

from tandem.kvstore.codecs.interfaces import Fidelity, LayerShape, check_raw


class RawCodec:
    """A `Codec` that changes nothing: `encode` and `decode` return the buffer that they were given."""

    name = "raw"
    fidelity = Fidelity.EXACT

    def size_bounds(self, shape: LayerShape) -> tuple[int, int]:
        return shape.raw_bytes, shape.raw_bytes

    def estimate(self, shape: LayerShape) -> int:
        return shape.raw_bytes

    def encode(self, raw: memoryview, shape: LayerShape) -> memoryview:
        check_raw(raw, shape)
        return raw

    def decode(self, encoded: memoryview, shape: LayerShape) -> memoryview | None:
        return encoded if encoded.nbytes == shape.raw_bytes else None
