"""Writes bundles: `BundleWriter` in place, from an engine's rows; `transcode` from one codec to another."""

from __future__ import annotations

from dataclasses import replace

from tandem.kvstore.bundle.format import (
    PREAMBLE_BYTES,
    LayerRange,
    checksum,
    pack_layers,
    region_and_size,
    write_head,
)
from tandem.kvstore.bundle.header import ChunkSpec, header_of
from tandem.kvstore.bundle.reader import parse
from tandem.kvstore.codecs import get_codec


def bundle_size(spec: ChunkSpec) -> int:
    """Bytes of the bundle of `spec` with raw rows."""
    return region_and_size(header_of(spec), _raw_layers(spec))[1]


class BundleWriter:
    """Writes raw rows straight into `out` (`bundle_size(spec)` bytes, for instance memory of the store node).

    Until `finish` the bytes are no bundle, whatever was there before. ValueError when `out` has another size."""

    def __init__(self, spec: ChunkSpec, out: memoryview) -> None:
        self._header = header_of(spec)
        self._layers = _raw_layers(spec)
        self._region, size = region_and_size(self._header, self._layers)
        self._out = out.cast("B")
        if len(self._out) != size:
            raise ValueError(f"out has {len(self._out)} bytes; bundle_size says {size}")
        self._out[:PREAMBLE_BYTES] = bytes(PREAMBLE_BYTES)

    def layer(self, index: int) -> memoryview:
        """Writable bytes of layer `index`: `[K|V][token][kv_head][dim]`."""
        layer = self._layers[index]
        start = self._region + layer.offset
        return self._out[start : start + layer.length]

    def finish(self) -> None:
        """Call it once, when all rows are written: they are checksummed as they are now."""
        layers = [replace(layer, checksum=checksum(self.layer(index))) for index, layer in enumerate(self._layers)]
        write_head(self._out, self._header, layers)


def transcode(content: memoryview, codec: str) -> bytearray | None:
    """The same rows under another codec. None: `content` is no intact bundle. Raises ValueError for an unknown codec.

    Fidelity only ever gets worse: rows that went through a lossy codec stay marked so, in raw form, too."""
    target = get_codec(codec)
    bundle = parse(content)
    if bundle is None:
        return None
    encoded: list[memoryview] = []
    for index in range(len(bundle.ranges)):
        if bundle.segment(index).codec == codec:
            layer = bundle.stored(index)
        else:
            raw = bundle.layer(index)
            layer = None if raw is None else target.encode(raw, bundle.segment(index).shape)
        if layer is None:
            return None
        encoded.append(layer)
    header = replace(
        bundle.header,
        segments=tuple(replace(segment, codec=codec) for segment in bundle.header.segments),
        fidelity=max(bundle.header.fidelity, target.fidelity),
    )
    placed = pack_layers([layer.nbytes for layer in encoded])
    region, size = region_and_size(header, placed)
    result = bytearray(size)
    out = memoryview(result)
    for layer, place in zip(encoded, placed, strict=True):
        out[region + place.offset : region + place.offset + place.length] = layer
    write_head(
        out, header, [replace(place, checksum=checksum(raw)) for place, raw in zip(placed, encoded, strict=True)]
    )
    return result


def _raw_layers(spec: ChunkSpec) -> list[LayerRange]:
    return pack_layers([spec.layer_shape.raw_bytes] * spec.num_layers)
