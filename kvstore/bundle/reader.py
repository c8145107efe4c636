"""Reads bundles from bytes that nobody vouches for: wrong bytes are None, never an exception."""

from __future__ import annotations

from dataclasses import dataclass

from tandem.kvstore.bundle.format import (
    HEADER_ALIGN,
    LayerRange,
    Malformed,
    checksum,
    read_frame,
    read_header,
)
from tandem.kvstore.bundle.header import BundleHeader, ChunkSpec, Segment, difference
from tandem.kvstore.codecs import CODECS


@dataclass(frozen=True, slots=True)
class BundleLayout:
    """What a loader needs to read a bundle layer by layer."""

    size: int
    """Bytes of the whole bundle."""
    header_bytes: int
    """Bytes before the first layer. When `header` is None: read so many and ask again."""
    header: BundleHeader | None
    ranges: tuple[tuple[int, int], ...]
    """(offset in the bundle, length) per layer; empty while `header` is None."""


class Bundle:
    """A view of bytes with a sound header. Layers are checked when they are read."""

    def __init__(self, content: memoryview, header: BundleHeader, region: int, layers: tuple[LayerRange, ...]) -> None:
        self._content = content
        self._layers = layers
        self._segments = [segment for segment in header.segments for _ in range(segment.num_layers)]
        self.header = header
        self.ranges = _absolute(region, layers)
        """(offset, length) of each layer in the bundle, as stored."""

    def segment(self, index: int) -> Segment:
        """The segment that layer `index` belongs to."""
        return self._segments[index]

    def stored(self, index: int) -> memoryview | None:
        """Layer `index` as stored, a view. None: the checksum is wrong."""
        offset, length = self.ranges[index]
        content = self._content[offset : offset + length]
        return content if checksum(content) == self._layers[index].checksum else None

    def layer(self, index: int) -> memoryview | None:
        """Raw rows `[K|V][row][kv_head][dim]` of layer `index`; a view of the content under the raw codec. None: the
        stored bytes are wrong."""
        content = self.stored(index)
        if content is None:
            return None
        segment = self._segments[index]
        return CODECS[segment.codec].decode(content, segment.shape)

    def matches(self, spec: ChunkSpec) -> str:
        """ "" when these are rows of exactly that chunk; otherwise what differs, for logs."""
        return difference(self.header, spec)


def parse(content: memoryview) -> Bundle | None:
    """Looks at the header only. `content` is the whole bundle, of any origin, and has to outlive the Bundle; layers
    may still be on their way into it."""
    content = content.cast("B")
    try:
        frame = read_frame(content)
        if frame.size != len(content):
            return None
        header, layers = read_header(content, frame)
    except Malformed:
        return None
    return Bundle(content, header, frame.region, layers)


def layer_ranges(head: memoryview) -> BundleLayout | None:
    """Reads the first HEADER_ALIGN bytes of a bundle, or more. None: no bundle, or fewer bytes than that."""
    head = head.cast("B")
    try:
        frame = read_frame(head)
        if len(head) < HEADER_ALIGN:
            return None
        if len(head) < frame.region:
            return BundleLayout(frame.size, frame.region, None, ())
        header, layers = read_header(head, frame)
    except Malformed:
        return None
    return BundleLayout(frame.size, frame.region, header, _absolute(frame.region, layers))


def _absolute(region: int, layers: tuple[LayerRange, ...]) -> tuple[tuple[int, int], ...]:
    return tuple((region + layer.offset, layer.length) for layer in layers)
