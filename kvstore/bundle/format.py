"""The bytes of a bundle: 64-byte preamble, protobuf header, layers.

    0                preamble: magic, format version, header length, size of the bundle, length of the header region,
                     zeros, XXH3-64 of the preamble before it and the header
    64               protobuf header (proto/bundle.proto), zeros up to a multiple of HEADER_ALIGN
    header region    layer 0, layer 1, ... each starts at a multiple of LAYER_ALIGN, zeros between

The size is part of the preamble, so a cut or a joined file is known from its first bytes. Everything that a header says
is checked against fixed limits before anything is allocated: headers come from disks and from other nodes.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass

import xxhash
from google.protobuf.message import DecodeError

from tandem.kvstore.bundle.header import (
    MAX_LAYER_BYTES,
    MAX_LAYERS,
    MAX_ROWS,
    BundleHeader,
    PositionRun,
    RopeState,
    Segment,
)
from tandem.kvstore.codecs import CODECS, DTYPE_BYTES, Fidelity
from tandem.proto import bundle_pb2

FORMAT_VERSION = 1
"""1: first version."""
MAGIC = b"TNDMBNDL"
HEADER_ALIGN = 4096
"""One page and one disk sector: the first read of a loader, which nearly always holds the whole header."""
LAYER_ALIGN = 64
MAX_HEADER_BYTES = 1 << 18

_PREAMBLE = struct.Struct("<8sIIQI28sQ")
_ZEROS = bytes(28)
PREAMBLE_BYTES = _PREAMBLE.size


class Malformed(Exception):
    """These bytes are no bundle. Stays inside this package: readers get None."""


@dataclass(frozen=True, slots=True)
class LayerRange:
    """Where a layer is stored, `offset` bytes after the header region, and the XXH3-64 of these bytes."""

    offset: int
    length: int
    checksum: int


@dataclass(frozen=True, slots=True)
class Frame:
    """What the preamble says."""

    header_length: int
    header_checksum: int
    region: int
    """Bytes before the first layer."""
    size: int


def align(value: int, step: int) -> int:
    return -(-value // step) * step


def checksum(content: memoryview | bytes) -> int:
    return xxhash.xxh3_64_intdigest(content)


def pack_layers(lengths: list[int]) -> list[LayerRange]:
    """Places layers of these lengths one after the other; checksums are not known yet."""
    placed: list[LayerRange] = []
    offset = 0
    for length in lengths:
        placed.append(LayerRange(offset, length, 0))
        offset = align(offset + length, LAYER_ALIGN)
    return placed


def region_and_size(header: BundleHeader, layers: list[LayerRange]) -> tuple[int, int]:
    """Length of the header region and of the bundle. The same whatever the checksums: they have a fixed width."""
    region = align(PREAMBLE_BYTES + len(encode_header(header, layers)), HEADER_ALIGN)
    return region, region + layers[-1].offset + layers[-1].length


def write_head(out: memoryview, header: BundleHeader, layers: list[LayerRange]) -> None:
    """Fills the header region of `out`, which holds the layers already: the preamble last, so that an unfinished
    bundle is none. Zeros what no layer covers: memory is reused and must not carry another tenant's bytes."""
    region, size = region_and_size(header, layers)
    end = region
    for layer in layers:
        start = region + layer.offset
        out[end:start] = bytes(start - end)
        end = start + layer.length
    encoded = encode_header(header, layers)
    out[PREAMBLE_BYTES : PREAMBLE_BYTES + len(encoded)] = encoded
    out[PREAMBLE_BYTES + len(encoded) : region] = bytes(region - PREAMBLE_BYTES - len(encoded))
    unsigned = _PREAMBLE.pack(MAGIC, FORMAT_VERSION, len(encoded), size, region, _ZEROS, 0)[:-8]
    out[:PREAMBLE_BYTES] = unsigned + struct.pack("<Q", checksum(unsigned + encoded))


def read_frame(head: memoryview) -> Frame:
    """Reads the first PREAMBLE_BYTES. Raises Malformed."""
    if len(head) < PREAMBLE_BYTES:
        raise Malformed("shorter than a preamble")
    magic, version, length, size, region, zeros, expected = _PREAMBLE.unpack_from(head)
    if magic != MAGIC or version != FORMAT_VERSION or zeros != _ZEROS:
        raise Malformed("no bundle of this format version")
    if length > MAX_HEADER_BYTES or region != align(PREAMBLE_BYTES + length, HEADER_ALIGN) or size <= region:
        raise Malformed("lengths that cannot be")
    return Frame(length, expected, region, size)


def read_header(head: memoryview, frame: Frame) -> tuple[BundleHeader, tuple[LayerRange, ...]]:
    """`head` has at least the header region. Raises Malformed."""
    encoded = bytes(head[PREAMBLE_BYTES : PREAMBLE_BYTES + frame.header_length])
    if checksum(bytes(head[: PREAMBLE_BYTES - 8]) + encoded) != frame.header_checksum:
        raise Malformed("header checksum")
    try:
        header, layers = decode_header(bundle_pb2.BundleHeader.FromString(encoded))
    except (DecodeError, ValueError, KeyError) as error:
        raise Malformed(f"header: {error}") from error
    end = 0
    for layer in layers:
        if layer.offset % LAYER_ALIGN or not end <= layer.offset < end + LAYER_ALIGN:
            raise Malformed("layers overlap or leave a gap")
        end = layer.offset + layer.length
    if frame.region + end != frame.size:
        raise Malformed("the layers do not end where the bundle does")
    return header, layers


def encode_header(header: BundleHeader, layers: list[LayerRange]) -> bytes:
    """The protobuf of a header with the places of its layers. Raises ValueError when owner or model are too long."""
    message = bundle_pb2.BundleHeader(
        key=header.key,
        namespace=header.namespace,
        tokens_digest=header.tokens_digest,
        num_tokens=header.num_tokens,
        fidelity=bundle_pb2.Fidelity.ValueType(header.fidelity),
        query_dependent=header.query_dependent,
        token_preserving=header.token_preserving,
        owner=header.owner,
        model=header.model,
        provenance=header.provenance,
    )
    for segment in header.segments:
        own = layers[segment.first_layer : segment.first_layer + segment.num_layers]
        message.segments.add(
            first_layer=segment.first_layer,
            num_kv_heads=segment.num_kv_heads,
            head_dim=segment.head_dim,
            dtype=segment.dtype,
            kind=bundle_pb2.SEGMENT_KIND_KEY_VALUE,
            positions=[bundle_pb2.PositionRun(start=run.start, count=run.count) for run in segment.positions],
            rope_state=bundle_pb2.RopeState.ValueType(segment.rope_state),
            codec=segment.codec,
            offsets=[layer.offset for layer in own],
            lengths=[layer.length for layer in own],
            checksums=[layer.checksum for layer in own],
        )
    encoded = message.SerializeToString(deterministic=True)
    if len(encoded) > MAX_HEADER_BYTES:
        raise ValueError(f"a header of {len(encoded)} bytes, the limit is {MAX_HEADER_BYTES}: shorten owner or model")
    return encoded


def decode_header(message: bundle_pb2.BundleHeader) -> tuple[BundleHeader, tuple[LayerRange, ...]]:
    """Raises Malformed, ValueError and KeyError for everything that a writer would not have written."""
    layers: list[LayerRange] = []
    segments: list[Segment] = []
    if len(message.segments) > MAX_LAYERS:
        raise Malformed("too many segments")
    for stored in message.segments:
        segments.append(_decode_segment(stored, len(layers)))
        layers += map(LayerRange, stored.offsets, stored.lengths, stored.checksums)
    header = BundleHeader(
        key=message.key,
        namespace=message.namespace,
        tokens_digest=message.tokens_digest,
        num_tokens=message.num_tokens,
        segments=tuple(segments),
        fidelity=Fidelity(message.fidelity),
        query_dependent=message.query_dependent,
        token_preserving=message.token_preserving,
        owner=message.owner,
        model=message.model,
        provenance=message.provenance,
    )
    if not 0 < len(layers) <= MAX_LAYERS or not 0 < header.num_tokens <= MAX_ROWS:
        raise Malformed("number of layers or tokens")
    if any(len(digest) != 32 for digest in (header.key, header.namespace, header.tokens_digest)):
        raise Malformed("a digest is not of 32 bytes")
    if header.token_preserving and any(segment.num_rows != header.num_tokens for segment in segments):
        raise Malformed("token preserving, but not one row per token")
    return header, tuple(layers)


def _decode_segment(stored: bundle_pb2.Segment, first_layer: int) -> Segment:
    segment = Segment(
        first_layer=stored.first_layer,
        num_layers=len(stored.offsets),
        num_kv_heads=stored.num_kv_heads,
        head_dim=stored.head_dim,
        dtype=stored.dtype,
        positions=tuple(PositionRun(run.start, run.count) for run in stored.positions),
        rope_state=RopeState(stored.rope_state),
        codec=stored.codec,
    )
    if stored.kind != bundle_pb2.SEGMENT_KIND_KEY_VALUE or segment.first_layer != first_layer:
        raise Malformed("kind or order of segments")
    if not len(stored.offsets) == len(stored.lengths) == len(stored.checksums) > 0:
        raise Malformed("offsets, lengths and checksums differ in number")
    if any(run.count == 0 for run in segment.positions) or not 0 < segment.num_rows <= MAX_ROWS:
        raise Malformed("rows")
    if segment.dtype not in DTYPE_BYTES or not 0 < segment.shape.raw_bytes <= MAX_LAYER_BYTES:
        raise Malformed("dtype or size of a layer")
    least, most = CODECS[segment.codec].size_bounds(segment.shape)
    if any(not least <= length <= most for length in stored.lengths):
        raise Malformed("a layer's length does not fit its codec")
    return segment
